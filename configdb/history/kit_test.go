// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package history

import (
	"context"
	"io"
	"log/slog"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
)

// world is a database with objects that tests change.
type world struct {
	t  *testing.T
	db *storetest.Mem
	// clock of the nodes that propose changes.
	clock time.Time
}

func newWorld(t *testing.T) *world {
	return &world{t: t, db: storetest.New(t), clock: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
}

// do commits what f puts into a transaction and returns the revision.
func (w *world) do(actor string, f func(v *configdb.View, tx *configdb.Txn) error) uint64 {
	w.t.Helper()
	rev, err := configdb.Transact(context.Background(), w.db, actor, 1, func(v *configdb.View, tx *configdb.Txn) error {
		tx.Time = w.clock
		return f(v, tx)
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return rev
}

func create[S, T any](w *world, table configdb.Table[S, T], name string, spec S) (api.Object[S, T], uint64) {
	w.t.Helper()
	o := api.Object[S, T]{Meta: api.NewMeta(table.Kind, "", name), Spec: spec}
	if err := o.Prepare(); err != nil {
		w.t.Fatal(err)
	}
	rev := w.do("ann", func(_ *configdb.View, tx *configdb.Txn) error { return table.Create(tx, &o) })
	return o, rev
}

func update[S, T any](w *world, table configdb.Table[S, T], o *api.Object[S, T]) uint64 {
	w.t.Helper()
	return w.do("bob", func(v *configdb.View, tx *configdb.Txn) error { return table.UpdateSpec(v, tx, o) })
}

func remove[S, T any](w *world, table configdb.Table[S, T], o *api.Object[S, T]) uint64 {
	w.t.Helper()
	return w.do("eve", func(_ *configdb.View, tx *configdb.Txn) error { table.Delete(tx, o); return nil })
}

// put writes a key past the tables, as a node of an older version does.
func (w *world) put(key string, value []byte) uint64 {
	w.t.Helper()
	return w.do("old", func(_ *configdb.View, tx *configdb.Txn) error {
		if value == nil {
			tx.Delete(key)
		} else {
			tx.Put(key, value)
		}
		return nil
	})
}

func (w *world) service() *Service {
	return New(ServiceConfig{DB: w.db, Now: func() time.Time { return w.clock }, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
}

// begin lets the leader begin the history.
func (w *world) begin() {
	w.t.Helper()
	if _, _, err := w.service().keep(context.Background(), 1); err != nil {
		w.t.Fatal(err)
	}
}

func all() Selection { return Selection{Kinds: configdb.HistoryKinds()} }

func only(kind api.Kind, name string) Selection {
	return Selection{Kinds: []api.Kind{kind}, Name: name}
}
