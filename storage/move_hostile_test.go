// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"bytes"
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/greeting"
)

// A network file system under a pool of type dir: the volume of one node is the file
// that makes room for it on the other. The mark of the first was taken for the other's
// own, the copy took its place, and the first removed what it had left behind: the only
// copy.
func TestAMoveWithinOneDirectoryLosesNothing(t *testing.T) {
	k := newMoveKit(t)
	m1, m2, path := k.nodes["m1"], k.nodes["m2"], k.pool["fast"].Spec.Path
	m2.mounts = map[string]string{path: filepath.Join(filepath.Dir(path), "m1")}
	k.restart("m2", func(s *Service) { s.cfg.Streams = &wires{k: k.kit, from: m2} })
	k.untilReady(k.pool["fast"], "m1", "m2")
	vol, file := k.disk("data", api.VolumeSpec{Pool: "fast", Size: 8 * api.MiB})
	was := read(t, file)
	k.wish("m2", "fast", vol)
	if st := k.untilOver(api.TaskFailed); !strings.Contains(st.Message, "the nodes have one directory in pool fast") {
		t.Errorf("%+v", st)
	}
	for end := time.Now().Add(patience); there(file + copyMark); time.Sleep(10 * time.Millisecond) { // files do not tell when they go
		if time.Now().After(end) {
			t.Fatal("the mark is left")
		}
	}
	if _, err := m2.sweepCopies(t.Context(), k.pool["fast"].Meta.ID); err != nil {
		t.Error(err)
	}
	// A sweep that saw the mark just before the first node took it away.
	if err := m2.sweepCopy(t.Context(), k.db.Local(), k.pool["fast"], m2.local(k.pool["fast"]), vol.Meta.ID); err != nil {
		t.Error(err)
	}
	k.at(vol, "m1", "fast")
	if !there(file) || !bytes.Equal(read(t, file), was) {
		t.Error("the volume is gone")
	}
	if m1.poolPath(k.pool["fast"]) != filepath.Dir(filepath.Dir(file)) {
		t.Error("the volume was elsewhere")
	}
}

// A node that is gone asks again when it is back; each of its former questions made
// another whole copy of the volume, as many at a time as there are streams.
func TestNoCopyIsMadeForANodeThatIsGone(t *testing.T) {
	k := newMoveKit(t)
	m1, m2 := k.nodes["m1"], k.nodes["m2"]
	k.upload(m1, "tiny", "local", "8M")
	vol, _ := k.disk("root", api.VolumeSpec{Pool: "local", Image: "tiny"})
	m2.stop() // it is this test that asks
	op := k.wish("m2", "local", vol)
	for range maxCopies { // others have all turns
		m1.copies <- struct{}{}
	}
	here, far := net.Pipe()
	done := make(chan struct{})
	go func() { defer close(done); m1.ServeStream(context.WithoutCancel(t.Context()), far, m2.id) }()
	if err := greeting.Say(here, streamHello{Operation: op.Meta.ID, Task: op.Spec.TaskID, Volume: vol.Meta.ID}); err != nil {
		t.Fatal(err)
	}
	if line, err := greeting.Line(greeting.NewConn(here, 0).R); err != nil || line != wordWait {
		t.Fatalf("%q, %v", line, err)
	}
	_ = here.Close()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("it is prepared for somebody who has gone")
	}
	if left := files(t, m1.poolPath(k.pool["local"]), "tmp"); len(left) > 0 || len(m1.copies) != maxCopies {
		t.Errorf("left: %v; %d turns are taken", left, len(m1.copies))
	}
}
