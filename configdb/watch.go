// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"context"
	"errors"

	"github.com/muster-vm/muster/configdb/fsm"
)

// Change is one step of a Watch. Deleted changes have only a key and the
// revision at which the watcher learned of it.
type Change struct {
	Entry
	Deleted bool
}

// Batch is what a Watch delivers at once.
type Batch struct {
	// Revision up to which the watcher now knows everything; give it to
	// DB.Watch to resume.
	Revision uint64
	// Changes in order of revision; of several changes of one key only the
	// last is seen.
	Changes []Change
	// Synced is true in the first batch that completes the initial set.
	Synced bool
}

// Watch is a position in the sequence of changes. It holds no goroutine, no
// buffer and no lock, so that it may be dropped at any time and a stalled
// reader costs nothing.
type Watch struct {
	state  *fsm.State
	closed <-chan struct{}
	prefix string
	at     uint64
	listed bool
}

// NewWatch returns a watch on a state machine that ends when closed is closed.
func NewWatch(state *fsm.State, closed <-chan struct{}, prefix string, from uint64) *Watch {
	return &Watch{state: state, closed: closed, prefix: prefix, at: from, listed: from > 0}
}

// Next waits for changes and returns them. It fails with ErrCompacted when the
// reader fell too far behind (begin anew from 0), with the context's error, or
// with ErrClosed.
func (w *Watch) Next(ctx context.Context) (Batch, error) {
	if !w.listed {
		return w.list(), nil
	}
	if b, err := w.look(); err != nil || len(b.Changes) > 0 {
		return b, err
	}
	for {
		b, err := w.wait(ctx)
		if err != nil || len(b.Changes) > 0 {
			return b, err
		}
	}
}

// wait looks once, and again when something may have changed.
func (w *Watch) wait(ctx context.Context) (Batch, error) {
	changed, stop := w.state.Await(w.prefix) // before the look, so that nothing is missed
	defer stop()
	if b, err := w.look(); err != nil || len(b.Changes) > 0 {
		return b, err
	}
	select {
	case <-changed:
		return w.look()
	case <-ctx.Done():
		return Batch{Revision: w.at}, context.Cause(ctx)
	case <-w.closed:
		return Batch{Revision: w.at}, ErrClosed
	}
}

// look delivers what has changed, perhaps nothing.
func (w *Watch) look() (Batch, error) {
	v := w.state.View()
	if v.Revision() <= w.at {
		return Batch{Revision: w.at}, nil
	}
	return w.step(v)
}

// list delivers the whole set at one revision.
func (w *Watch) list() Batch {
	v := w.state.View()
	b := Batch{Revision: v.Revision(), Synced: true}
	for e := range v.Scan(w.prefix, "") {
		b.Changes = append(b.Changes, Change{Entry: e})
	}
	w.at, w.listed = v.Revision(), true
	return b
}

func (w *Watch) step(v *View) (Batch, error) {
	keys, err := w.state.ChangedKeys(w.prefix, w.at, v.Revision())
	if err != nil {
		return Batch{Revision: w.at}, err
	}
	b := Batch{Revision: v.Revision()}
	for _, k := range keys {
		if e, ok := v.Get(k); ok {
			b.Changes = append(b.Changes, Change{Entry: e})
		} else {
			b.Changes = append(b.Changes, Change{Entry: Entry{Key: k, Revision: v.Revision()}, Deleted: true})
		}
	}
	w.at = v.Revision()
	return b, nil
}

// Follow calls f with every batch until the context ends, beginning with the
// whole set, and begins anew after ErrCompacted. The restart of a list is
// visible as another batch with Synced set, in which deletions that happened
// in between are not named: f must compare with what it knows.
func Follow(ctx context.Context, db DB, prefix string, f func(Batch) error) error {
	w := db.Watch(prefix, 0)
	for {
		b, err := w.Next(ctx)
		if errors.Is(err, ErrCompacted) {
			w = db.Watch(prefix, 0)
			continue
		}
		if err != nil {
			return err
		}
		if err := f(b); err != nil {
			return err
		}
	}
}
