// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/hashicorp/raft"
)

func TestTheNoteSurvivesATornWrite(t *testing.T) {
	dir := t.TempDir()
	c, index, _, err := openCommitted(dir)
	if err != nil || index != 0 {
		t.Fatalf("an empty directory: %d, %v", index, err)
	}
	for i := uint64(1); i <= 5; i++ {
		if err := c.note(i, 10+i); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.file.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, committedFile)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for at := range whole {
		torn := append([]byte(nil), whole...)
		torn[at] ^= 0x40
		if err := os.WriteFile(path, torn, 0o600); err != nil {
			t.Fatal(err)
		}
		c, index, term, err := openCommitted(dir)
		if err != nil || (index != 5 && index != 4) || term != 10+index {
			t.Fatalf("byte %d: index %d, term %d, %v", at, index, term, err)
		}
		// The next note goes over the damaged or the older one.
		if err := c.note(6, 16); err != nil {
			t.Fatal(err)
		}
		_ = c.file.Close()
		c, index, _, err = openCommitted(dir)
		if err != nil || index != 6 {
			t.Fatalf("byte %d: then %d, %v", at, index, err)
		}
		_ = c.file.Close()
	}
}

func TestACandidateWithANewerLogIsJudgedByItsLog(t *testing.T) {
	in := &intake{
		last:  func() (uint64, uint64, bool) { return 7, 3, true },
		voter: func() []byte { return []byte("a voter") },
	}
	for _, c := range []struct {
		index, term uint64
		admitted    bool
	}{
		{7, 3, false}, {6, 3, false}, {9, 2, false}, {8, 3, true}, {1, 4, true},
	} {
		h := raft.RPCHeader{ID: []byte("unknown")}
		in.admit(&h, c.index, c.term)
		if got := string(h.ID) == "a voter"; got != c.admitted {
			t.Errorf("a candidate whose log ends with %d of term %d: admitted %t", c.index, c.term, got)
		}
	}
}
