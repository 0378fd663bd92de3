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
	changed := make(map[string]bool, len(t.t.Ops))
	for _, op := range t.t.Ops {
		changed[op.Key] = true
	}
	var require []fsm.Precondition
	for _, p := range part.t.Require {
		switch {
		case p.Check == fsm.CheckEmpty && t.removesBelow(p.Key):
			return ErrPartOrder
		case p.Check != fsm.CheckEmpty && p.Check != fsm.CheckTerm && changed[p.Key]:
		case slices.Contains(t.t.Require, p) || slices.Contains(require, p):
		default:
			require = append(require, p)
		}
	}
	added := 0
	for _, op := range part.t.Ops {
		if !changed[op.Key] {
			added++
		}
	}
	if t.Len()+added+len(part.history)+reserve > fsm.MaxTxnOps || len(t.t.Require)+len(require)+reserve > fsm.MaxTxnOps {
		return ErrPartTooLarge
	}
	t.t.Require = append(t.t.Require, require...)
	for _, op := range part.t.Ops {
		t.set(op)
	}
	t.history = append(t.history, part.history...)
	t.done = append(t.done, part.done...)
	return nil
}

// removesBelow reports whether the transaction removes a key with a prefix.
func (t *Txn) removesBelow(prefix string) bool {
	return slices.ContainsFunc(t.t.Ops, func(op fsm.Op) bool { return op.Delete && strings.HasPrefix(op.Key, prefix) })
}
