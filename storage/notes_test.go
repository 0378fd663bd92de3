// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

// noteKit is two nodes with one pool that both see, and one that only one of them does.
func noteKit(t *testing.T) (k *kit, pool api.Pool, m1, m2 *host) {
	k = newKit(t, "m1", "m2")
	for _, h := range k.nodes {
		h.cfg.NoteKey = []byte("the cluster's key for notes, 32 b")
	}
	k.start("m1", "m2")
	pool = k.pool("shared", api.PoolSpec{Type: api.PoolShared, Path: serviceDir(t)})
	local := k.pool("local", api.PoolSpec{Type: api.PoolDir})
	k.untilReady(pool, "m1", "m2")
	k.untilReady(local, "m1", "m2")
	m1, m2 = k.nodes["m1"], k.nodes["m2"]
	if got := m1.NotePools(); !slices.Equal(got, []string{pool.Meta.ID}) {
		t.Fatalf("notes go through %v; the shared pool is %s", got, pool.Meta.ID)
	}
	if err := m1.WriteNote(t.Context(), local.Meta.ID, nil); api.CodeOf(err) != api.CodeUnsupported {
		t.Errorf("a note in a pool of type dir: %v", err)
	}
	return k, pool, m1, m2
}

func (h *host) note(t *testing.T, pool api.Pool, of *host) string {
	t.Helper()
	b, err := h.ReadNote(t.Context(), pool.Meta.ID, of.id)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestNotesAreReadByOtherNodes(t *testing.T) {
	_, pool, m1, m2 := noteKit(t)
	if b, err := m1.ReadNote(t.Context(), pool.Meta.ID, m2.id); b != nil || err != nil {
		t.Errorf("of nobody: %q, %v", b, err)
	}
	for _, text := range []string{"one", strings.Repeat("a long one ", 1300), "", "x"} {
		if err := m1.WriteNote(t.Context(), pool.Meta.ID, []byte(text)); err != nil {
			t.Fatal(err)
		}
		if got := m2.note(t, pool, m1); got != text {
			t.Errorf("%q was written, %q read", text, got)
		}
	}
	if err := m1.WriteNote(t.Context(), pool.Meta.ID, make([]byte, NoteSize)); err != nil {
		t.Error(err)
	}
	if err := m1.WriteNote(t.Context(), pool.Meta.ID, make([]byte, NoteSize+1)); api.CodeOf(err) != api.CodeTooLarge {
		t.Errorf("too long: %v", err)
	}
	for _, id := range []string{"", "../../etc/passwd", "m1"} {
		if _, err := m2.ReadNote(t.Context(), pool.Meta.ID, id); api.CodeOf(err) != api.CodeInvalid {
			t.Errorf("of node %q: %v", id, err)
		}
	}
	if _, err := m2.ReadNote(t.Context(), api.NewID(), m1.id); api.CodeOf(err) != api.CodeNotFound {
		t.Errorf("in no pool: %v", err)
	}
}

// What is in the place of a note counts only if the node that it names made it.
// A Run that fails is followed by another one of the same service.
func TestNotesGoOnWithTheNextRun(t *testing.T) {
	_, pool, m1, m2 := noteKit(t)
	m1.closeNotes()
	if err := m1.WriteNote(t.Context(), pool.Meta.ID, []byte("between")); err == nil {
		t.Error("a note was written while nothing runs")
	}
	m1.openNotes()
	if err := m1.WriteNote(t.Context(), pool.Meta.ID, []byte("after")); err != nil {
		t.Fatal(err)
	}
	if got := m2.note(t, pool, m1); got != "after" {
		t.Errorf("%q", got)
	}
}

func TestOnlyTheClustersNotesAreRead(t *testing.T) {
	_, pool, m1, m2 := noteKit(t)
	if err := m1.WriteNote(t.Context(), pool.Meta.ID, []byte("mine")); err != nil {
		t.Fatal(err)
	}
	own, other := filepath.Join(pool.Spec.Path, notesFolder, m1.id), filepath.Join(pool.Spec.Path, notesFolder, m2.id)
	if st, err := os.Stat(own); err != nil || st.Mode().Perm() != noteFileMode {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	good := read(t, own)
	put := func(path string, b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	bad := func(what string, h, of *host) {
		t.Helper()
		if b, err := h.ReadNote(t.Context(), pool.Meta.ID, of.id); err == nil {
			t.Errorf("%s: %q", what, b)
		}
	}
	put(other, good)
	bad("another node's note", m1, m2)
	for i := range noteHead + len("mine") {
		b := slices.Clone(good)
		b[i] ^= 1
		put(own, b)
		bad("a note with another bit", m2, m1)
	}
	put(own, append(slices.Clone(good[:noteHead+2]), make([]byte, len(good))...))
	bad("a torn note", m2, m1)
	put(own, noteFrame([]byte("another key"), pool.Meta.ID, m1.id, 1, []byte("forged")))
	bad("a forged note", m2, m1)
	put(own, noteFrame(m1.cfg.NoteKey, api.NewID(), m1.id, 1, []byte("elsewhere")))
	bad("a note of another pool", m2, m1)
	put(own, bytes.Repeat([]byte{7}, noteSlot))
	bad("something else", m2, m1)
	put(own, good)
	if got := m2.note(t, pool, m1); got != "mine" {
		t.Errorf("%q", got)
	}
	secret := filepath.Join(t.TempDir(), "secret")
	put(secret, []byte("of the host"))
	for _, link := range []func() error{func() error { return os.Symlink(secret, own) }, func() error { return os.Link(secret, own) }} {
		if err := errors.Join(os.Remove(own), link()); err != nil {
			continue // a hard link to another file system
		}
		bad("a link", m2, m1)
		if err := m1.WriteNote(t.Context(), pool.Meta.ID, []byte("through the link")); err == nil {
			t.Error("a note was written through a link")
		}
		if got := string(read(t, secret)); got != "of the host" {
			t.Errorf("the file behind the link has %q", got)
		}
	}
}

// A reader gets a note whole, whoever writes meanwhile, or none.
func TestNotesAreNeverMixed(t *testing.T) {
	_, pool, m1, m2 := noteKit(t)
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range 200 {
			if err := m1.WriteNote(t.Context(), pool.Meta.ID, bytes.Repeat([]byte{byte('a' + i%26)}, 100+i*50)); err != nil {
				t.Error(err)
			}
		}
	})
	whole := 0
	for range 400 {
		b, err := m2.ReadNote(t.Context(), pool.Meta.ID, m1.id)
		if err != nil {
			continue // torn twice
		}
		if whole++; len(b) > 0 && len(bytes.TrimLeft(b, string(b[:1]))) > 0 {
			t.Fatalf("a mixture: %q … %q", b[:1], b[len(b)-1:])
		}
	}
	wg.Wait()
	if whole == 0 {
		t.Error("no note was read")
	}
}

// A file server that hangs holds up nobody for longer than he wants to wait.
func TestNotesReturnWhenTheirStorageHangs(t *testing.T) {
	k, pool, m1, _ := noteKit(t)
	files := m1.local(pool).notes.place.(*noteFiles)
	release := make(chan struct{})
	defer close(release)
	for range maxNoteReads {
		go func() { _ = files.reads.do(context.Background(), time.Minute, func() error { <-release; return nil }) }()
	}
	go func() { _ = files.writes.do(context.Background(), time.Minute, func() error { <-release; return nil }) }()
	for end := time.Now().Add(patience); len(files.reads.slots) < maxNoteReads || len(files.writes.slots) < 1; {
		if time.Now().After(end) {
			t.Fatal("the lanes are not taken")
		}
		time.Sleep(time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	began := time.Now()
	if err := m1.WriteNote(ctx, pool.Meta.ID, []byte("x")); err == nil {
		t.Error("written")
	}
	if _, err := m1.ReadNote(ctx, pool.Meta.ID, k.nodes["m2"].id); err == nil {
		t.Error("read")
	}
	if d := time.Since(began); d > patience/4 {
		t.Errorf("they waited for %v", d)
	}
}

func FuzzNoteFrame(f *testing.F) {
	key := []byte("key")
	f.Add(noteFrame(key, api.NewID(), api.NewID(), 7, []byte("note")))
	f.Add(make([]byte, noteHead))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= noteHead { // else no mutation gets past the MAC
			n := min(int(binary.BigEndian.Uint32(b[12:])), len(b)-noteHead)
			copy(b[noteMACAt:noteHead], noteMAC(key, b[:noteMACAt], b[noteHead:noteHead+n]))
		}
		got, err := openFrame(key, b)
		if err != nil || got == nil {
			return
		}
		if len(got.note) > NoteSize || len(got.note) > len(b) {
			t.Fatalf("%d bytes of %d", len(got.note), len(b))
		}
	})
}
