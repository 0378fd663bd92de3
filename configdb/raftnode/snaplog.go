// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"errors"
	"fmt"
	"sync"

	"github.com/hashicorp/raft"
)

// snapLog joins the log to the snapshot before it, which Raft leaves to chance
// when a snapshot of the leader arrives at a node whose log goes on beyond it
// (hashicorp/raft issue 697): of a log that contradicts the snapshot, what the
// snapshot covers stays, or all goes but Raft's idea of where it ends; then no
// entry of the leader fits any more, or entries land behind a gap.
//
// With it, a log either continues the snapshot, or begins after it; the last
// entry of the snapshot can be asked for in either case; and nothing is written
// behind a gap. It does not say that it is monotonic, so that Raft does not
// empty it.
type snapLog struct {
	raft.LogStore
	onFatal func(error)
	// onMembership is told the term of a new membership before Raft goes by it.
	onMembership func(term uint64)

	mu          sync.Mutex
	index, term uint64 // of the newest snapshot; 0 without one
}

// newSnapLog returns the log with what its snapshots cover.
func newSnapLog(logs raft.LogStore, snaps raft.SnapshotStore, onFatal func(error), onMembership func(term uint64)) (*snapLog, error) {
	l := &snapLog{LogStore: logs, onFatal: onFatal, onMembership: onMembership}
	list, err := snaps.List()
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	if len(list) == 0 {
		return l, nil
	}
	return l, l.covers(list[0].Index, list[0].Term) // newest first
}

// covers notes a snapshot that is on the disk. A log that has another entry in
// its place, or ends before, has nothing that is still needed up to there.
func (l *snapLog) covers(index, term uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if index < l.index {
		return nil
	}
	l.index, l.term = index, term
	var e raft.Log
	err := l.LogStore.GetLog(index, &e)
	if err == nil && e.Term == term {
		return nil
	}
	if err != nil && !errors.Is(err, raft.ErrLogNotFound) {
		return err
	}
	first, err1 := l.LogStore.FirstIndex()
	last, err2 := l.LogStore.LastIndex()
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if first == 0 || first > index {
		return nil
	}
	return l.LogStore.DeleteRange(first, min(last, index))
}

// snapshot returns the last entry of the newest snapshot.
func (l *snapLog) snapshot() (index, term uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.index, l.term
}

// GetLog implements raft.LogStore. The last entry of the snapshot has its term
// and nothing else, which is what Raft wants of it: a leader that must send the
// entry itself lacks the one before too, and sends the snapshot.
func (l *snapLog) GetLog(index uint64, out *raft.Log) error {
	err := l.LogStore.GetLog(index, out)
	if !errors.Is(err, raft.ErrLogNotFound) {
		return err
	}
	if at, term := l.snapshot(); index == at && at > 0 {
		*out = raft.Log{Index: index, Term: term, Type: raft.LogNoop}
		return nil
	}
	return err
}

// LastIndex implements raft.LogStore.
func (l *snapLog) LastIndex() (uint64, error) {
	last, err := l.LogStore.LastIndex()
	at, _ := l.snapshot()
	return max(last, at), err
}

// StoreLog implements raft.LogStore.
func (l *snapLog) StoreLog(e *raft.Log) error { return l.StoreLogs([]*raft.Log{e}) }

// StoreLogs implements raft.LogStore.
func (l *snapLog) StoreLogs(entries []*raft.Log) error {
	if len(entries) > 0 {
		last, err := l.LastIndex()
		if err != nil {
			return err
		}
		// Raft remembers by itself where the log ends. If it is wrong, only a
		// new start helps, which looks.
		if entries[0].Index > last+1 {
			err := fmt.Errorf("raft log ends at %d and is to go on at %d", last, entries[0].Index)
			l.onFatal(err)
			return err
		}
	}
	for _, e := range entries {
		if e.Type == raft.LogConfiguration {
			l.onMembership(e.Term)
		}
	}
	return l.LogStore.StoreLogs(entries)
}

// snapStore tells the log of every snapshot that is on the disk.
type snapStore struct {
	raft.SnapshotStore
	log *snapLog
}

// Create implements raft.SnapshotStore.
func (s snapStore) Create(version raft.SnapshotVersion, index, term uint64, c raft.Configuration, cIndex uint64, t raft.Transport) (raft.SnapshotSink, error) {
	s.log.onMembership(term) // it brings one, if it is not this node's own
	sink, err := s.SnapshotStore.Create(version, index, term, c, cIndex, t)
	if err != nil {
		return nil, err
	}
	return &snapSink{sink, s.log, index, term}, nil
}

type snapSink struct {
	raft.SnapshotSink
	log         *snapLog
	index, term uint64
}

// Close implements io.Closer.
func (s *snapSink) Close() error {
	if err := s.SnapshotSink.Close(); err != nil {
		return err
	}
	return s.log.covers(s.index, s.term)
}
