// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"fmt"
	"sync"
	"time"
)

// Told is what a node remembers of when it told its term: by that leaders are
// confirmed. A leader asks a majority of the voters for it, and knows since when no
// earlier one was. See ha/DESIGN.md, "What the voters remember".
type Told struct {
	mu     sync.Mutex
	term   uint64  // the highest that was told
	last   Telling // of that term
	before Telling // of a lower one
	asked  uint64  // the highest term whose leader was answered
}

// Telling is one such moment.
type Telling struct {
	At time.Duration // by the clock of the one who remembers
	By string        // the node that was told; empty if it was none
}

// NewTold returns the memory of a node that begins in a term and may have told anything
// until now.
func NewTold(term uint64, now time.Duration) *Told {
	return &Told{before: Telling{At: now}, asked: term}
}

// Tell returns the term, which is taken down with its moment.
func (t *Told) Tell(term func() uint64, now func() time.Duration, by string) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	told := term()
	t.note(told, Telling{now(), by})
	return told
}

// Abstain takes down that this node says that nobody leads in a term, if it may say so
// then: as something that it said before that term.
func (t *Told) Abstain(term uint64, now func() time.Duration, may func() bool) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if term <= t.asked || !may() {
		return false
	}
	t.note(term-1, Telling{At: now()})
	return true
}

// Mark takes down a moment that counts as one of an earlier term, whatever comes.
func (t *Told) Mark(now func() time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.before = later(t.before, Telling{At: now()})
}

// Before returns the last moment of a term before that of the leader who asks, in whose
// term this node must be. From then on it says of higher terms alone that nobody leads.
func (t *Told) Before(leads uint64, term func() uint64) (Telling, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if now := term(); now != leads {
		return Telling{}, fmt.Errorf("this node is in term %d, not in %d", now, leads)
	}
	t.asked = max(t.asked, leads)
	if t.term < leads {
		return later(t.before, t.last), nil
	}
	return t.before, nil
}

// Asked is the highest term of which this node does not say that nobody leads.
func (t *Told) Asked() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.asked
}

// note is called with the lock held.
func (t *Told) note(term uint64, at Telling) {
	switch {
	case term > t.term:
		t.before, t.term, t.last = later(t.before, t.last), term, at
	case term == t.term:
		t.last = later(t.last, at)
	default:
		t.before = later(t.before, at)
	}
}

func later(a, b Telling) Telling {
	if b.At > a.At {
		return b
	}
	return a
}

// TellTerm returns this node's term to a leader that has itself confirmed.
func (n *Node) TellTerm(by string) uint64 { return n.told.Tell(n.raft.CurrentTerm, n.clock, by) }

// ToldBefore says how long ago this node last told a term before that of the leader who
// asks, and whom.
func (n *Node) ToldBefore(term uint64) (ago time.Duration, by string, err error) {
	t, err := n.told.Before(term, n.raft.CurrentTerm)
	if err != nil {
		return 0, "", err
	}
	return max(0, n.clock()-t.At), t.By, nil
}

// Electors returns the membership by which the leader of a term was elected; an error
// if it was changed since.
func (n *Node) Electors(term uint64) ([]Member, error) {
	members, err := n.Members()
	if err != nil {
		return nil, err
	}
	// Looked at later: an entry is in the log before Raft goes by it.
	if n.changed.Load() >= term {
		return nil, fmt.Errorf("the membership was changed in term %d", term)
	}
	return members, nil
}

// noteMembership is called before Raft goes by a new membership. Of how many came before
// it this node cannot tell, so the moment counts as one in which it told its term.
func (n *Node) noteMembership(term uint64) {
	n.changed.Store(max(n.changed.Load(), term))
	n.told.Mark(n.clock)
}
