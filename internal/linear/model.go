// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package linear

import (
	"fmt"
	"strings"

	"github.com/anishathalye/porcupine"
)

// MaxCells is the most keys of one group.
const MaxCells = 4

// unresolved begins the numbers that stand for revisions nobody learned. They
// differ from each other and from every real one.
const unresolved = uint64(1) << 62

// cell is one key in the model's state. An absent key keeps the revision of
// its deletion.
type cell struct {
	exists   bool
	value    string
	revision uint64
}

// state is comparable, as porcupine wants it.
type state struct {
	cells [MaxCells]cell
	// wrote is the revision of the last transaction, and read that of the last
	// view: what follows cannot be before them.
	wrote, read uint64
}

// step is an operation with its keys as numbers and its revision resolved.
type step struct {
	op       *Op
	reads    []int
	require  []int // the key of each precondition
	changes  []int // the key of each change
	revision uint64
}

func model() porcupine.Model {
	return porcupine.Model{
		Init: func() any { return state{} },
		Step: func(s, in, _ any) (bool, any) {
			ok, next := in.(*step).apply(s.(state))
			return ok, next
		},
		DescribeOperation: func(in, _ any) string { return in.(*step).op.String() },
		DescribeState: func(s any) string {
			var parts []string
			for i, c := range s.(state).cells {
				if c.exists {
					parts = append(parts, fmt.Sprintf("%d: %s @%d", i, c.value, c.revision))
				}
			}
			return strings.Join(parts, ", ")
		},
	}
}

func (p *step) apply(s state) (bool, state) {
	if p.op.IsRead() {
		return p.look(s)
	}
	failed := p.failing(s)
	switch p.op.Status {
	case Applied:
		if failed >= 0 {
			return false, s
		}
		return p.commit(s)
	case Refused:
		// A refusal that names its precondition must be right about it.
		if failed < 0 || p.op.FailedCond >= 0 && failed != p.op.FailedCond {
			return false, s
		}
		return p.pass(s)
	case Unknown:
		if failed >= 0 {
			return true, s
		}
		return p.commit(s)
	}
	return false, s
}

func (p *step) look(s state) (bool, state) {
	for i, k := range p.reads {
		got, have := p.op.Cells[i], s.cells[k]
		if got.Exists != have.exists || got.Exists && (got.Value != have.value || got.Revision != 0 && got.Revision != have.revision) {
			return false, s
		}
	}
	if p.revision == 0 {
		return true, s
	}
	if p.revision < s.wrote {
		return false, s
	}
	s.read = max(s.read, p.revision)
	return true, s
}

// failing returns the first precondition that does not hold, or -1.
func (p *step) failing(s state) int {
	for i, c := range p.op.Require {
		have := s.cells[p.require[i]]
		ok := false
		switch c.Kind {
		case Exists:
			ok = have.exists
		case Unchanged:
			ok = have.exists && have.value == c.Value
		default:
			ok = have.exists && have.revision == c.Revision || !have.exists && c.Revision == 0
		}
		if !ok {
			return i
		}
	}
	return -1
}

// pass notes the revision at which a transaction was decided.
func (p *step) pass(s state) (bool, state) {
	r := p.revision
	if r == 0 || r >= unresolved {
		return true, s
	}
	// Transactions on different keys may share an entry, and so a revision; a
	// view contains the whole entry.
	if r < s.wrote || r <= s.read {
		return false, s
	}
	s.wrote = r
	return true, s
}

func (p *step) commit(s state) (bool, state) {
	ok, s := p.pass(s)
	if !ok {
		return false, s
	}
	for i, c := range p.op.Changes {
		k := p.changes[i]
		if have := s.cells[k].revision; p.revision < unresolved && p.revision != 0 && have < unresolved && p.revision <= have {
			return false, s
		}
		s.cells[k] = cell{exists: !c.Delete, revision: p.revision}
		if !c.Delete {
			s.cells[k].value = c.Value
		}
	}
	return true, s
}
