// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// What is under the path of the pool but is not the directory that the nodes have in
// common, such as the mount point when the file server is not mounted, gets no notes.
func TestNotesStayInTheCommonDirectory(t *testing.T) {
	k, pool, m1, m2 := noteKit(t)
	var said bytes.Buffer
	m1.stop() // nothing but this test looks at the pool
	m1.log = slog.New(slog.NewTextHandler(&said, nil))
	box := m1.local(pool).notes
	box.place = newNoteFiles(m1.local(pool), m1.id) // the stop closed it
	wantCode(t, m1.WriteNote(t.Context(), pool.Meta.ID, nil), api.CodeRefused, "not found to be the directory")
	root, _, err := statRoot(pool.Spec.Path)
	if err != nil {
		t.Fatal(err)
	}
	box.saw(true, &root)
	write := func() error { return m1.WriteNote(t.Context(), pool.Meta.ID, []byte("x")) }
	if err := write(); err != nil {
		t.Fatal(err)
	}
	away := pool.Spec.Path + ".away"
	defer os.RemoveAll(away)
	if err := os.Rename(pool.Spec.Path, away); err != nil {
		t.Fatal(err)
	}
	said.Reset()
	wantCode(t, write(), api.CodeRefused, "mount it again")
	_, err = m1.ReadNote(t.Context(), pool.Meta.ID, m1.id)
	wantCode(t, err, api.CodeRefused, "mount it again")
	if err := os.MkdirAll(filepath.Join(pool.Spec.Path, notesFolder), 0o700); err != nil {
		t.Fatal(err)
	}
	wantCode(t, write(), api.CodeRefused, "mount the same file system")
	if left := files(t, pool.Spec.Path, notesFolder); len(left) > 0 {
		t.Errorf("it has %s", left)
	}
	if err := errors.Join(os.RemoveAll(pool.Spec.Path), os.Rename(away, pool.Spec.Path)); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := write(); err != nil {
			t.Error(err)
		}
	}
	// Of each kind one line when they fail, and one when they work again.
	for line, want := range map[string]int{"attempt=write": 2, "in a pool fail": 2, "work again": 1} {
		if n := strings.Count(said.String(), line); n != want {
			t.Errorf("%d lines have %q, want %d: %s", n, line, want, said.String())
		}
	}
	if got := m2.note(t, pool, m1); got != "x" {
		t.Errorf("the other reads %q", got)
	}
	// When the pool is deleted the notes go.
	k.restart("m1", func(s *Service) { s.cfg.NoteKey = m2.cfg.NoteKey })
	for end := time.Now().Add(patience); !slices.Contains(m1.NotePools(), pool.Meta.ID); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the pool is not ready after a restart")
		}
	}
	if err := m2.WriteNote(t.Context(), pool.Meta.ID, []byte("y")); err != nil {
		t.Fatal(err)
	}
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		p, err := configdb.Pools.Get(v, pool.Meta.ID)
		if err != nil {
			return err
		}
		configdb.Pools.Delete(tx, &p)
		return nil
	})
	k.untilGone(configdb.PoolStates.StatusPrefix() + configdb.PoolStateID(pool.Meta.ID, m1.id))
	k.untilGone(configdb.PoolStates.StatusPrefix() + configdb.PoolStateID(pool.Meta.ID, m2.id))
	if _, err := os.Stat(filepath.Join(pool.Spec.Path, notesFolder)); !os.IsNotExist(err) {
		t.Errorf("the folder of notes is still there: %v", err)
	}
	wantCode(t, m2.WriteNote(t.Context(), pool.Meta.ID, nil), api.CodeNotFound)
}

// A node that is cut off sees in the pool what another daemon wrote at its start, and in
// its own replica what the one before had written: the directory is the common one still.
func TestNotesGoOnWhenStampsDifferFromAnOldReplica(t *testing.T) {
	k, pool, m1, m2 := noteKit(t)
	m1.stop() // nothing but this test looks at the pool
	m2.stop()
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		st, err := configdb.PoolStates.Get(v, configdb.PoolStateID(pool.Meta.ID, m2.id))
		if err != nil {
			return err
		}
		st.Status.Stamp = "as it was in an old replica"
		return configdb.PoolStates.UpdateStatus(v, tx, &st)
	})
	now := time.Now()
	m1.cfg.Now = func() time.Time { return now }
	for range 3 {
		if _, err := m1.reconcilePool(t.Context(), pool.Meta.ID); err != nil {
			t.Fatal(err)
		}
		now = now.Add(2 * staleGrace)
	}
	if m1.local(pool).usable() {
		t.Fatal("the pool need not prove itself again")
	}
	if !slices.Contains(m1.NotePools(), pool.Meta.ID) {
		t.Error("it has no place for notes any more")
	}
	away := pool.Spec.Path + ".away"
	defer os.RemoveAll(away)
	if err := errors.Join(os.Rename(pool.Spec.Path, away), os.Mkdir(pool.Spec.Path, 0o700)); err != nil {
		t.Fatal(err)
	}
	if _, err := m1.reconcilePool(t.Context(), pool.Meta.ID); err != nil {
		t.Fatal(err)
	}
	if slices.Contains(m1.NotePools(), pool.Meta.ID) {
		t.Error("another directory is a place for notes")
	}
}

// What another node or key wrote in the place of a note is told of in the log at once, by
// name, and in the state of the pool when it lasts.
func TestTheStateOfAPoolNamesNotesThatFail(t *testing.T) {
	k, pool, m1, m2 := noteKit(t)
	for _, h := range []*host{m1, m2} {
		if err := h.WriteNote(t.Context(), pool.Meta.ID, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	var said bytes.Buffer
	m1.stop() // nothing but this test looks at the pool
	m1.log = slog.New(slog.NewTextHandler(&said, nil))
	now := time.Now()
	m1.cfg.Now = func() time.Time { return now }
	m1.openNotes()
	own, other := filepath.Join(pool.Spec.Path, notesFolder, m1.id), filepath.Join(pool.Spec.Path, notesFolder, m2.id)
	good := read(t, other)
	reads := func(works bool) {
		t.Helper()
		if b, err := m1.ReadNote(t.Context(), pool.Meta.ID, m2.id); (err == nil) != works {
			t.Errorf("%q, %v", b, err)
		}
	}
	notes := func() string {
		t.Helper()
		if _, err := m1.reconcilePool(t.Context(), pool.Meta.ID); err != nil {
			t.Fatal(err)
		}
		st := k.state(k.db.Local(), pool, "m1")
		if !st.Ready {
			t.Fatalf("the pool is not ready: %s", st.Reason)
		}
		return st.Notes
	}
	for what, c := range map[string]struct {
		frame []byte
		why   string
	}{
		"another node": {read(t, own), "it cannot read the note of node m2: the note in the place of node m2 is that of node m1"},
		"another key":  {noteFrame([]byte("another key"), pool.Meta.ID, m2.id, 1, []byte("forged")), "it cannot read the note of node m2: what is in the place of node m2: the note is torn, damaged, or made by who has not got the cluster's key"},
	} {
		said.Reset()
		put := func(b []byte) {
			if err := os.WriteFile(other, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		put(c.frame)
		reads(false)
		reads(false)
		if log := said.String(); strings.Count(log, "in a pool fail") != 1 || !strings.Contains(log, "node=m2") || !strings.Contains(log, pool.Meta.Name) {
			t.Errorf("%s: the log has %s", what, log)
		}
		if got := notes(); got != "" {
			t.Errorf("%s: at once the state says %q", what, got)
		}
		lasts := func() {
			for range 2 {
				now = now.Add(noteTrouble / 2)
				reads(false)
			}
		}
		lasts()
		if got := notes(); got != c.why {
			t.Errorf("%s: the state says %q, want %q", what, got, c.why)
		}
		now = now.Add(noteTrouble) // nobody reads it any more
		if got := notes(); got != "" {
			t.Errorf("%s: what nobody tries is said: %q", what, got)
		}
		reads(false)
		if got := notes(); got != "" {
			t.Errorf("%s: at once again the state says %q", what, got)
		}
		lasts()
		if got := notes(); got != c.why {
			t.Errorf("%s: again the state says %q", what, got)
		}
		put(good)
		reads(true)
		if got := notes(); got != "" {
			t.Errorf("%s: it works, and the state says %q", what, got)
		}
	}
}

// Who closes the notes of a pool, to remove them, waits for who is making them.
func TestCloseWaitsForAStartOfNotes(t *testing.T) {
	n := newNoteImage(&Service{log: slog.New(slog.DiscardHandler)}, &localPool{what: "pool"})
	begun, release := make(chan struct{}), make(chan struct{})
	go func() {
		_ = n.starts.do(context.Background(), time.Minute, func() error { close(begun); <-release; return nil })
	}()
	<-begun
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		n.close()
	}()
	select {
	case <-closed:
		t.Error("closed while it is being made")
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	<-closed
	if _, err := n.start(nil); !errors.Is(err, errNotesGone) {
		t.Errorf("a start after that: %v", err)
	}
}

// A note that cannot be read is told of once, however often others can be.
func TestOneUnreadableNoteIsToldOfOnce(t *testing.T) {
	_, pool, m1, m2 := noteKit(t)
	for _, h := range []*host{m1, m2} {
		if err := h.WriteNote(t.Context(), pool.Meta.ID, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	var said bytes.Buffer
	m1.stop()
	m1.log = slog.New(slog.NewTextHandler(&said, nil))
	box := m1.local(pool).notes
	box.place = newNoteFiles(m1.local(pool), m1.id) // the stop closed it
	root, _, err := statRoot(pool.Spec.Path)
	if err != nil {
		t.Fatal(err)
	}
	box.saw(true, &root)
	other := filepath.Join(pool.Spec.Path, notesFolder, m2.id)
	for what, spoil := range map[string]func(path string) error{
		"symbolic link":            func(path string) error { return os.Symlink(filepath.Join(pool.Spec.Path, notesFolder, m1.id), path) },
		"with this name alone":     func(path string) error { return os.Link(filepath.Join(pool.Spec.Path, notesFolder, m1.id), path) },
		"no file with this name a": func(path string) error { return os.Mkdir(path, 0o700) },
	} {
		if err := errors.Join(os.Remove(other), spoil(other)); err != nil {
			t.Fatal(err)
		}
		said.Reset()
		for range 5 {
			if _, err := m1.ReadNote(t.Context(), pool.Meta.ID, m2.id); err == nil || !strings.Contains(err.Error(), what) {
				t.Errorf("%s: %v", what, err)
			}
			if what == "with this name alone" {
				continue // of both names
			}
			if got := m1.note(t, pool, m1); got != "x" {
				t.Errorf("%q", got)
			}
		}
		if err := os.Remove(other); err != nil {
			t.Fatal(err)
		}
		if _, err := m1.ReadNote(t.Context(), pool.Meta.ID, m2.id); err != nil {
			t.Error(err)
		}
		if err := os.WriteFile(other, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if fail, again := strings.Count(said.String(), "in a pool fail"), strings.Count(said.String(), "work again"); fail != 1 || again != 1 {
			t.Errorf("%s: %d lines that it fails, %d that it works again: %s", what, fail, again, said.String())
		}
	}
}
