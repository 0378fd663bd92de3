// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"testing"

	"github.com/hashicorp/raft"

	"github.com/muster-vm/muster/configdb/fsm"
)

func FuzzSplitAddress(f *testing.F) {
	f.Add("0190aaaa@10.0.0.1:7600")
	f.Add("@")
	f.Add("a@b@c")
	f.Fuzz(func(t *testing.T, s string) {
		id, hostport, err := SplitAddress(raft.ServerAddress(s))
		if err != nil {
			return
		}
		if id == "" || hostport == "" || string(ServerAddress(id, hostport)) != s {
			t.Fatalf("%q became %q and %q", s, id, hostport)
		}
	})
}

// An entry that a node cannot apply stops it: it changes nothing, and nothing
// after it is applied.
func FuzzApply(f *testing.F) {
	good := fsm.Command{Time: 7, Txns: []fsm.Txn{{Ops: []fsm.Op{{Key: "k", Value: []byte("v")}}}}}
	f.Add(good.Encode())
	f.Add([]byte{fsm.Format})
	f.Add([]byte{fsm.Format + 1, 0, 0})
	f.Add([]byte{})
	closed := make(chan struct{})
	close(closed)
	f.Fuzz(func(t *testing.T, data []byte) {
		fatal := 0
		a := &adapter{state: fsm.New(), closing: closed, onFatal: func(error) { fatal++ }}
		r := a.Apply(&raft.Log{Index: 5, Term: 2, Data: data}).(result)
		if (r.err != nil) != (fatal == 1) || fatal > 1 {
			t.Fatalf("error %v, fatal %d times", r.err, fatal)
		}
		want := uint64(5)
		if r.err != nil {
			want = 0
			if next := a.Apply(&raft.Log{Index: 6, Term: 2, Data: good.Encode()}).(result); next.err == nil {
				t.Fatal("the node went on after an entry that it could not apply")
			}
			if _, err := a.Snapshot(); err == nil {
				t.Fatal("a snapshot of a node that skipped an entry")
			}
		}
		if got := a.state.View().Revision(); got != want {
			t.Fatalf("revision %d, want %d", got, want)
		}
	})
}
