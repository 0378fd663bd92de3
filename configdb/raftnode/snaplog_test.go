// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/hashicorp/raft"
)

// written returns a log store with entries of the given terms, from first on.
func written(t *testing.T, first uint64, terms ...uint64) *raft.InmemStore {
	t.Helper()
	s := raft.NewInmemStore()
	for i, term := range terms {
		if err := s.StoreLog(&raft.Log{Index: first + uint64(i), Term: term, Data: []byte("x")}); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// content lists what a log store holds, as "index:term".
func content(t *testing.T, s raft.LogStore) string {
	t.Helper()
	first, err1 := s.FirstIndex()
	last, err2 := s.LastIndex()
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	var out []string
	for i := max(first, 1); i <= last; i++ {
		var l raft.Log
		if err := s.GetLog(i, &l); err == nil {
			out = append(out, fmt.Sprintf("%d:%d", l.Index, l.Term))
		}
	}
	return strings.Join(out, " ")
}

// snapshotOf puts a snapshot into a store, as Raft does.
func snapshotOf(t *testing.T, s raft.SnapshotStore, index, term uint64) {
	t.Helper()
	sink, err := s.Create(raft.SnapshotVersionMax, index, term, raft.Configuration{}, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := sink.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestALogAndItsSnapshot(t *testing.T) {
	for _, c := range []struct {
		name        string
		first       uint64
		terms       []uint64
		index, term uint64
		left        string // of the log
		at          string // what Raft is told of the snapshot's last entry
		last        uint64
	}{
		{"the log goes on from it", 1, []uint64{1, 1, 2, 2}, 3, 2, "1:1 2:1 3:2 4:2", "3:2", 4},
		{"the log ends with it", 1, []uint64{1, 1, 2}, 3, 2, "1:1 2:1 3:2", "3:2", 3},
		{"the log ends before it", 1, []uint64{1, 1}, 5, 2, "", "5:2", 5},
		{"the log is empty", 1, nil, 5, 2, "", "5:2", 5},
		{"the log has another entry in its place", 1, []uint64{1, 1, 1, 1, 1}, 3, 2, "4:1 5:1", "3:2", 5},
		{"the log begins after it", 4, []uint64{2, 2}, 3, 2, "4:2 5:2", "3:2", 5},
	} {
		t.Run(c.name, func(t *testing.T) {
			check := func(l *snapLog, inner raft.LogStore) {
				t.Helper()
				if got := content(t, inner); got != c.left {
					t.Errorf("the log holds %q, want %q", got, c.left)
				}
				var e raft.Log
				if err := l.GetLog(c.index, &e); err != nil || fmt.Sprintf("%d:%d", e.Index, e.Term) != c.at {
					t.Errorf("the snapshot's last entry is %d:%d, %v; want %s", e.Index, e.Term, err, c.at)
				}
				if last, err := l.LastIndex(); err != nil || last != c.last {
					t.Errorf("the log ends at %d, %v; want %d", last, err, c.last)
				}
			}
			inner, snaps := written(t, c.first, c.terms...), raft.NewInmemSnapshotStore()
			l, err := newSnapLog(inner, snaps, func(err error) { t.Error(err) }, func(uint64) {})
			if err != nil {
				t.Fatal(err)
			}
			snapshotOf(t, snapStore{snaps, l}, c.index, c.term)
			check(l, inner)

			// The same if the node crashed after the snapshot was there.
			inner = written(t, c.first, c.terms...)
			if l, err = newSnapLog(inner, snaps, func(err error) { t.Error(err) }, func(uint64) {}); err != nil {
				t.Fatal(err)
			}
			check(l, inner)
		})
	}
}

func TestNothingIsWrittenBehindAGap(t *testing.T) {
	fatal := 0
	inner := written(t, 1, 1, 1, 1)
	l, err := newSnapLog(inner, raft.NewInmemSnapshotStore(), func(error) { fatal++ }, func(uint64) {})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.StoreLog(&raft.Log{Index: 5, Term: 1}); err == nil || fatal != 1 {
		t.Errorf("entry 5 after 3: %v, fatal %d times", err, fatal)
	}
	if got := content(t, inner); got != "1:1 2:1 3:1" {
		t.Errorf("the log holds %q", got)
	}
	for _, e := range []*raft.Log{{Index: 4, Term: 1}, {Index: 5, Term: 2}} {
		if err := l.StoreLog(e); err != nil {
			t.Error(err)
		}
	}
	if _, ok := raft.LogStore(l).(raft.MonotonicLogStore); ok {
		t.Error("it says that it is monotonic, so that Raft would empty it")
	}
}

func TestIntake(t *testing.T) {
	in := &intake{
		snapshot: func() (uint64, uint64) { return 10, 3 }, applied: func() uint64 { return 12 }, term: func() uint64 { return 5 },
	}
	entries := func(from, to uint64) (out []*raft.Log) {
		for i := from; i <= to; i++ {
			out = append(out, &raft.Log{Index: i, Term: 3})
		}
		return out
	}
	for _, c := range []struct {
		name                   string
		prev, prevTerm, commit uint64
		entries                []*raft.Log
		want                   string // prev:term, entries, commit
	}{
		{"it follows the snapshot", 10, 3, 99, entries(11, 12), "10:3 [11-12] 12"},
		{"it follows the log", 12, 4, 13, entries(13, 14), "12:4 [13-14] 13"},
		{"it begins before the snapshot and goes beyond", 6, 2, 99, entries(7, 12), "10:3 [11-12] 12"},
		{"it is within the snapshot", 2, 1, 99, entries(3, 5), "10:3 [] 10"},
		{"it begins at the beginning", 0, 0, 11, entries(1, 11), "10:3 [11-11] 11"},
		{"it shows no more than where it is", 11, 3, 99, nil, "11:3 [] 11"},
	} {
		t.Run(c.name, func(t *testing.T) {
			req := &raft.AppendEntriesRequest{PrevLogEntry: c.prev, PrevLogTerm: c.prevTerm, LeaderCommitIndex: c.commit, Entries: c.entries}
			in.trim(req)
			span := ""
			if n := len(req.Entries); n > 0 {
				span = fmt.Sprintf("%d-%d", req.Entries[0].Index, req.Entries[n-1].Index)
			}
			if got := fmt.Sprintf("%d:%d [%s] %d", req.PrevLogEntry, req.PrevLogTerm, span, req.LeaderCommitIndex); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
	for _, c := range []struct {
		index, term uint64
		known       bool
	}{{12, 5, true}, {12, 6, true}, {13, 5, false}, {12, 4, false}} {
		if got := in.known(&raft.InstallSnapshotRequest{LastLogIndex: c.index, Term: c.term}); got != c.known {
			t.Errorf("a snapshot of %d in term %d: known %t", c.index, c.term, got)
		}
	}
}

// The intake answers for Raft when a snapshot has nothing new, and takes its
// content off the connection.
func TestAnOldSnapshotIsTakenAndForgotten(t *testing.T) {
	in := &intake{snapshot: func() (uint64, uint64) { return 0, 0 }, applied: func() uint64 { return 12 }, term: func() uint64 { return 5 },
		last: func() (uint64, uint64, bool) { return 12, 5, true }, voter: func() []byte { return nil }, gone: func() bool { return false }}
	from, to, done := make(chan raft.RPC), make(chan raft.RPC), make(chan struct{})
	ended := make(chan struct{})
	go func() { in.run(from, to, done); close(ended) }()
	content := strings.NewReader("old state")
	answer := make(chan raft.RPCResponse, 1)
	from <- raft.RPC{Command: &raft.InstallSnapshotRequest{LastLogIndex: 7, Term: 5}, Reader: content, RespChan: answer}
	r := <-answer
	if resp := r.Response.(*raft.InstallSnapshotResponse); r.Error != nil || !resp.Success || resp.Term != 5 || content.Len() != 0 {
		t.Errorf("answer %+v %v, %d bytes left", resp, r.Error, content.Len())
	}
	from <- raft.RPC{Command: &raft.RequestVoteRequest{Term: 6}}
	if got := (<-to).Command.(*raft.RequestVoteRequest); got.Term != 6 {
		t.Errorf("%+v", got)
	}
	close(done)
	<-ended
}
