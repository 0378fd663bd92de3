// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/cephtest"
)

// rbdNotesLive is the life of notes in a pool of type rbd, with what serves them killed,
// standing still, and locked out.
func rbdNotesLive(t *testing.T, k *kit, ceph *cephtest.Ceph, pool api.Pool, hosts *cephHosts) {
	m1, m2 := k.nodes["m1"], k.nodes["m2"]
	for _, h := range k.nodes {
		if got := h.NotePools(); !slices.Contains(got, pool.Meta.ID) {
			t.Fatalf("notes go through %v; the pool is %s", got, pool.Meta.ID)
		}
	}
	var both sync.WaitGroup
	for _, h := range []*host{m1, m2} { // who is first makes the image
		both.Go(func() { h.untilNoted(t, pool, "first of "+h.id) })
	}
	both.Wait()
	for _, text := range []string{"one", strings.Repeat("n", NoteSize), "", "x"} {
		if err := m1.WriteNote(t.Context(), pool.Meta.ID, []byte(text)); err != nil {
			t.Fatal(err)
		}
		if got := m2.note(t, pool, m1); got != text {
			t.Errorf("%.40q was written, %.40q read", text, got)
		}
	}
	if got := m1.note(t, pool, m2); got != "first of "+m2.id {
		t.Errorf("the other way: %q", got)
	}
	if b, err := m1.ReadNote(t.Context(), pool.Meta.ID, api.NewID()); b != nil || err != nil {
		t.Errorf("of nobody: %q, %v", b, err)
	}
	place := m1.local(pool).notes.place.(*noteImage)
	keyIsHidden(t, place.running().pid(), ceph.Spec.Key)

	killed := place.running()
	if err := killed.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	m1.untilNoted(t, pool, "after it was killed")
	if got := m2.note(t, pool, m1); got != "after it was killed" {
		t.Errorf("after a kill: %q", got)
	}
	notesHang(t, pool, m1, m2)
	notesLockedOut(t, k, pool, hosts)
}

// rbdNotesHalf is what an rbd create leaves that was killed: the name, and no header.
func rbdNotesHalf(t *testing.T, k *kit, ceph *cephtest.Ceph, pool api.Pool) {
	m1 := k.nodes["m1"]
	image := ceph.Spec.Pool + "/" + rbdNotes + pool.Meta.ID
	ceph.Admin(t, "rbd", "create", image, "--size", "1M", "--image-feature", notesFeatures)
	var info struct {
		ID string `json:"id"`
	}
	if err := json.Unmarshal([]byte(ceph.Admin(t, "rbd", "info", image, "--format", "json")), &info); err != nil || info.ID == "" {
		t.Fatalf("%+v, %v", info, err)
	}
	ceph.Admin(t, "rados", "--pool", ceph.Spec.Pool, "rm", "rbd_header."+info.ID)
	for range 2 { // the second one waits, and says why the first one failed
		if err := m1.WriteNote(t.Context(), pool.Meta.ID, nil); err == nil || !strings.Contains(err.Error(), "ended halfway; if that lasts, remove it, and it is made anew: rbd rm "+image) {
			t.Errorf("got %v", err)
		}
	}
	ceph.Admin(t, "rbd", "rm", "--no-progress", image)
	m1.untilNoted(t, pool, "after it was removed")
}

// running is the server there is, nil if there is none.
func (n *noteImage) running() *noteServer {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.server
}

// untilNoted writes until it works.
func (h *host) untilNoted(t *testing.T, pool api.Pool, text string) {
	t.Helper()
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = h.WriteNote(t.Context(), pool.Meta.ID, []byte(text)); err == nil {
			return
		}
	}
	t.Errorf("the note is not written: %v", err)
}

// keyIsHidden looks that nobody sees the key of a process.
func keyIsHidden(t *testing.T, pid int, key string) {
	t.Helper()
	for _, of := range []string{"cmdline", "environ"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, of))
		if err != nil || len(b) == 0 || strings.Contains(string(b), key) {
			t.Errorf("%s of process %d: %v, %q", of, pid, err, b)
		}
	}
}

// What stands still holds up its own pool's writes until it has ended, and nobody for
// longer than he wants to wait.
func notesHang(t *testing.T, pool api.Pool, m1, m2 *host) {
	t.Helper()
	place := m1.local(pool).notes.place.(*noteImage)
	was := place.limit
	place.limit = time.Second // nothing is read or written now
	defer func() { place.limit = was }()
	hung := place.running()
	if err := hung.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	write := func(text string) error {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		return m1.WriteNote(ctx, pool.Meta.ID, []byte(text))
	}
	began := time.Now()
	for _, text := range []string{"hangs", "waits for that"} {
		if err := write(text); err == nil {
			t.Errorf("a server that stands still has written that it %s", text)
		}
	}
	if d := time.Since(began); d > patience/4 {
		t.Errorf("the callers waited for %s", d)
	}
	if got := m2.note(t, pool, m1); got != "after it was killed" {
		t.Errorf("while it hangs: %q", got)
	}
	m1.untilNoted(t, pool, "after it hung")
	if hung.runs() {
		t.Error("it was written by another server while the one that hung was not ended")
	}
	if got := m2.note(t, pool, m1); got != "after it hung" {
		t.Errorf("after it hung: %q", got)
	}
}

// A host that is locked out neither writes nor reads, with no server, and does again
// when it is let in.
func notesLockedOut(t *testing.T, k *kit, pool api.Pool, hosts *cephHosts) {
	t.Helper()
	m1, m2 := k.nodes["m1"], k.nodes["m2"]
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	here := m2.driver(pool).(*rbdDriver)
	elsewhere := *here
	elsewhere.cmd.wrap = []string{"ip", "netns", "exec", hosts.names[0]}
	moves := func(to driver) {
		m2.mu.Lock()
		defer m2.mu.Unlock()
		m2.pools[pool.Meta.ID].driver = to
	}
	moves(&elsewhere)
	defer func() {
		moves(here)
		k.untilReady(pool, "m2") // it may have been looked at meanwhile
	}()
	m2.untilNoted(t, pool, "from another host")
	guard := rbdFencer{m1.driver(pool).(*rbdDriver)}
	if _, err := guard.Fence(ctx, hosts.addrs[:1], nil, false, nil); err != nil {
		t.Fatal(err)
	}
	place := m2.local(pool).notes.place.(*noteImage)
	last, refused := "from another host", "" // the first that was refused
	for old, i := place.running(), 0; ; i++ {
		text := fmt.Sprint("locked out, attempt ", i)
		err := m2.WriteNote(ctx, pool.Meta.ID, []byte(text))
		switch {
		case err == nil && refused != "":
			t.Fatal("a host that is locked out has written a note")
		case err == nil:
			last = text // the OSD has not heard of it yet
		case refused == "":
			refused = text
		}
		if err != nil && strings.Contains(err.Error(), "has locked this host out") { // a new server was refused
			if old.runs() {
				t.Error("the server from before still runs")
			}
			break
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	if b, err := m2.ReadNote(ctx, pool.Meta.ID, m1.id); err == nil {
		t.Errorf("a host that is locked out reads %q", b)
	}
	// Who learns that he is locked out gives up what was on its way, which may be there.
	if got := m1.note(t, pool, m2); got != last && got != refused {
		t.Errorf("of the host that is locked out: %q", got)
	}
	if err := guard.Unfence(ctx, hosts.addrs[:1]); err != nil {
		t.Fatal(err)
	}
	m2.untilNoted(t, pool, "let in")
	if got := m1.note(t, pool, m2); got != "let in" {
		t.Errorf("of the host that was let in: %q", got)
	}
}
