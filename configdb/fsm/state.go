// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package fsm

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/tidwall/btree"
)

// Outcome is what became of one transaction.
type Outcome struct {
	// Revision of the entry in which it was decided.
	Revision uint64
	// Status is one of the Outcome constants.
	Status OutcomeStatus
	// Failed is the index of the first precondition that did not hold, and
	// Actual what was found in its place (revision of the key, or the term).
	Failed int
	Actual uint64
}

// OutcomeStatus is the kind of an outcome.
type OutcomeStatus uint8

// The outcomes.
const (
	// Applied: all preconditions held and all changes are in the state.
	Applied OutcomeStatus = 1
	// Conflict: a precondition did not hold; nothing changed.
	Conflict OutcomeStatus = 2
	// SessionUnknown: the request names a session that the state machine does
	// not know any more, so it may have been applied before. Nothing changed.
	SessionUnknown OutcomeStatus = 3
	// Overlap: an earlier transaction of the same entry changed one of the
	// keys, which the leader must not pack together. Nothing changed.
	Overlap OutcomeStatus = 4
)

type session struct {
	seen    uint64 // index of the last request
	done    uint64
	results map[uint64]Outcome
}

// State is the state machine. One goroutine applies; any may read.
type State struct {
	mu       sync.Mutex // guards all below, held by Apply and Restore
	tree     *btree.Map[string, item]
	sessions map[[16]byte]*session
	time     int64
	bytes    int64
	level    int // the highest that an entry named

	current atomic.Pointer[View]
	feed    feed
}

// New returns an empty state machine.
func New() *State {
	s := &State{tree: new(btree.Map[string, item]), sessions: map[[16]byte]*session{}, level: 1}
	s.feed.init()
	s.publish(0, 0)
	return s
}

// View returns the current state.
func (s *State) View() *View { return s.current.Load() }

// Apply carries out one committed log entry and returns an outcome for each of
// its transactions. An error means that this node must stop.
func (s *State) Apply(index, term uint64, data []byte) ([]Outcome, error) {
	cmd, err := DecodeCommand(data)
	if err != nil {
		return nil, fmt.Errorf("apply entry %d: %w", index, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if index <= s.current.Load().revision {
		return nil, fmt.Errorf("apply entry %d after %d: out of order", index, s.current.Load().revision)
	}
	s.time = max(s.time, cmd.Time)
	s.level = max(s.level, cmd.Level)
	touched := make(map[string]bool, len(cmd.Txns))
	outcomes := make([]Outcome, len(cmd.Txns))
	for i := range cmd.Txns {
		outcomes[i] = s.applyOnce(index, term, &cmd.Txns[i], touched)
	}
	s.expireSessions(index)
	s.feed.add(index, touched)
	s.publish(index, term)
	s.feed.notify(touched)
	return outcomes, nil
}

// Skip advances the revision over an entry that is not a command, such as a
// change of membership.
func (s *State) Skip(index, term uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if index > s.current.Load().revision {
		s.publish(index, term)
		s.feed.notify(nil)
	}
}

func (s *State) publish(index, term uint64) {
	s.current.Store(&View{tree: s.tree.Copy(), revision: index, term: term, time: s.time, bytes: s.bytes, level: s.level})
}

// applyOnce answers a repeated request with its first outcome.
func (s *State) applyOnce(index, term uint64, t *Txn, touched map[string]bool) Outcome {
	if t.Request.Session == ([16]byte{}) {
		return s.applyTxn(index, term, t, touched)
	}
	ses := s.sessions[t.Request.Session]
	if ses == nil {
		if t.Request.Done != 0 {
			return Outcome{Revision: index, Status: SessionUnknown}
		}
		ses = &session{results: map[uint64]Outcome{}}
		s.sessions[t.Request.Session] = ses
	}
	ses.seen = index
	if r, ok := ses.results[t.Request.Sequence]; ok {
		return r
	}
	if t.Request.Sequence < ses.done || len(ses.results) >= MaxSessionWindow {
		return Outcome{Revision: index, Status: SessionUnknown}
	}
	out := s.applyTxn(index, term, t, touched)
	if out.Status == Overlap {
		return out // the leader proposes it again; it was not decided
	}
	ses.results[t.Request.Sequence] = out
	if t.Request.Done > ses.done {
		ses.done = t.Request.Done
		maps.DeleteFunc(ses.results, func(seq uint64, _ Outcome) bool { return seq < ses.done })
	}
	return out
}

func (s *State) applyTxn(index, term uint64, t *Txn, touched map[string]bool) Outcome {
	for _, op := range t.Ops {
		if touched[op.Key] {
			return Outcome{Revision: index, Status: Overlap}
		}
	}
	for i, p := range t.Require {
		if actual, ok := s.holds(p, term); !ok {
			return Outcome{Revision: index, Status: Conflict, Failed: i, Actual: actual}
		}
	}
	for _, op := range t.Ops {
		touched[op.Key] = true
		if op.Delete {
			if old, ok := s.tree.Delete(op.Key); ok {
				s.bytes -= int64(len(op.Key) + len(old.value))
			}
			continue
		}
		it := item{value: bytes.Clone(op.Value), revision: index, created: index} // the entry is large, the value may live long
		if old, ok := s.tree.Get(op.Key); ok {
			it.created = old.created
			s.bytes -= int64(len(op.Key) + len(old.value))
		}
		s.tree.Set(op.Key, it)
		s.bytes += int64(len(op.Key) + len(op.Value))
	}
	return Outcome{Revision: index, Status: Applied}
}

func (s *State) holds(p Precondition, term uint64) (actual uint64, ok bool) {
	switch p.Check {
	case CheckRevision:
		it, found := s.tree.Get(p.Key)
		if !found {
			return 0, p.Revision == 0
		}
		return it.revision, it.revision == p.Revision
	case CheckExists:
		it, found := s.tree.Get(p.Key)
		return it.revision, found
	case CheckEmpty:
		return 0, treeEmpty(s.tree, p.Key)
	case CheckTerm:
		return term, term == p.Revision
	}
	return 0, false
}

// expireSessions forgets, now and then, sessions that were idle for SessionIdle
// entries. It depends on the indexes alone, so that all nodes forget alike.
func (s *State) expireSessions(index uint64) {
	if index%sweepEvery != 0 || index < SessionIdle {
		return
	}
	maps.DeleteFunc(s.sessions, func(_ [16]byte, ses *session) bool { return ses.seen < index-SessionIdle })
}

// sortedSessions returns the session ids in a fixed order, for snapshots.
func sortedSessions(m map[[16]byte]*session) [][16]byte {
	return slices.SortedFunc(maps.Keys(m), func(a, b [16]byte) int { return slices.Compare(a[:], b[:]) })
}

// ErrCompacted is returned to a reader of changes that fell too far behind.
var ErrCompacted = errors.New("the changes since that revision are no longer kept; list again")

func sortedKeys(m map[uint64]Outcome) []uint64 { return slices.Sorted(maps.Keys(m)) }
