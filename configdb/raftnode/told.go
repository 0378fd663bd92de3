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
	// answered is the highest term whose leader was answered, or may have been.
	answered uint64
}

// Telling is one such moment.
type Telling struct {
	At time.Duration // by the clock of the one who remembers
	By string        // the node that was told; empty if it was none
}

// NewTold returns the memory of a node that begins in a term and may have told anything
// until now.
func NewTold(term uint64, now time.Duration) *Told {
	return &Told{before: Telling{At: now}, answered: term}
}

// Tell returns the term, which is taken down with its moment, to a node that leads in the
// one that it names.
func (t *Told) Tell(leads uint64, by string, term func() uint64, now func() time.Duration) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	told := term()
	if told != leads {
		by = "" // it may lead no more
	}
	t.note(told, Telling{now(), by})
	return told
}

// Abstain takes down that this node says that nobody leads in a term, if it may say so
// then: as something that it said before that term.
func (t *Told) Abstain(term uint64, now func() time.Duration, may func() bool) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if term <= t.answered || !may() {
		return false
	}
	t.note(term-1, Telling{At: now()})
	return true
}

// Mark takes down that this node stores a membership of a term. Whom those of an earlier
// one confirmed it cannot tell, so the moment counts as one of an earlier term, whatever
// comes; and an earlier life of this node, as another member, may have answered the leader.
func (t *Told) Mark(term uint64, now func() time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.before = later(t.before, Telling{At: now()})
	t.answered = max(t.answered, term)
}

// Before returns the last moment of a term before that of the leader who asks, in whose
// term this node must be. From then on it says of higher terms alone that nobody leads.
func (t *Told) Before(leads uint64, term func() uint64) (Telling, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if now := term(); now != leads {
		return Telling{}, fmt.Errorf("this node is in term %d, not in %d", now, leads)
	}
	t.answered = max(t.answered, leads)
	if t.term < leads {
		return later(t.before, t.last), nil
	}
	return t.before, nil
}

// Answered is the highest term of which this node does not say that nobody leads.
func (t *Told) Answered() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.answered
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

// TellTerm returns this node's term to a node that leads in the one that it names, and has
// itself confirmed.
func (n *Node) TellTerm(leads uint64, by string) uint64 {
	return n.told.Tell(leads, by, n.raft.CurrentTerm, n.clock)
}

// ToldBefore says how long ago this node last told a term before that of the leader who
// asks, and whom.
func (n *Node) ToldBefore(term uint64) (ago time.Duration, by string, err error) {
	t, err := n.told.Before(term, n.raft.CurrentTerm)
	if err != nil {
		return 0, "", err
	}
	return max(0, n.clock()-t.At), t.By, nil
}
