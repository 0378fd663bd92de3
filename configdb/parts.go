// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"errors"
	"slices"
	"strings"

	"github.com/muster-vm/muster/configdb/fsm"
)

// A decision about many objects is made in parts, each by the same code that
// decides about one: a part sees what the parts before it have done (Seen), and
// one that is refused leaves nothing behind.

// ErrPartOrder is returned by Join when a part needs that something is gone
// which another part of the same transaction removes: preconditions are checked
// before any change. It can be done in a later transaction.
var ErrPartOrder = errors.New("needs the other changes to be made first")

// ErrPartTooLarge is returned by Join when the transaction would be over the
// limit of changes.
var ErrPartTooLarge = errors.New("does not fit into one transaction")

// Part returns an empty transaction to decide a part in.
func (t *Txn) Part() *Txn {
	return &Txn{Actor: t.Actor, Source: t.Source, Note: t.Note, Time: t.Time}
}

// Seen returns v as it would be after the changes so far.
func (t *Txn) Seen(v *View) *View { return v.With(t.t.Ops) }

// Len is how many changes the transaction will have.
func (t *Txn) Len() int { return len(t.t.Ops) + len(t.history) }

// Join adds a part that was decided on Seen. What the part requires of keys that
// earlier parts change is certain and left out: it follows from those parts, or
// the transaction fails as a whole. reserve is how many changes must be left
// for what else the caller will add. When it fails, t is as it was.
func (t *Txn) Join(part *Txn, reserve int) error {
	have := t.index()
	var require []fsm.Precondition
	for _, p := range part.t.Require {
		switch {
		case p.Check == fsm.CheckEmpty && t.removesBelow(p.Key):
			return ErrPartOrder
		case p.Check != fsm.CheckEmpty && p.Check != fsm.CheckTerm && have.changed[p.Key]:
		case have.required[p] || slices.Contains(require, p):
		default:
			require = append(require, p)
		}
	}
	added := 0
	for _, op := range part.t.Ops {
		if !have.changed[op.Key] {
			added++
		}
	}
	if t.Len()+added+len(part.history)+reserve > fsm.MaxTxnOps || len(t.t.Require)+len(require)+reserve > fsm.MaxTxnOps {
		return ErrPartTooLarge
	}
	for _, p := range require {
		have.required[p] = true
		t.t.Require = append(t.t.Require, p)
	}
	for _, op := range part.t.Ops {
		have.changed[op.Key] = true
		t.set(op)
	}
	t.history = append(t.history, part.history...)
	t.done = append(t.done, part.done...)
	return nil
}

// joined knows what a transaction that is made of parts has.
type joined struct {
	changed  map[string]bool
	required map[fsm.Precondition]bool
}

// index brings joined up to date, should t have been changed by others.
func (t *Txn) index() *joined {
	if j := t.joined; j != nil && len(j.changed) == len(t.t.Ops) && len(j.required) == len(t.t.Require) {
		return j
	}
	t.joined = &joined{map[string]bool{}, map[fsm.Precondition]bool{}}
	for _, op := range t.t.Ops {
		t.joined.changed[op.Key] = true
	}
	for _, p := range t.t.Require {
		t.joined.required[p] = true
	}
	return t.joined
}

// removesBelow reports whether the transaction removes a key with a prefix.
func (t *Txn) removesBelow(prefix string) bool {
	return slices.ContainsFunc(t.t.Ops, func(op fsm.Op) bool { return op.Delete && strings.HasPrefix(op.Key, prefix) })
}
