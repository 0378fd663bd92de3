// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/configdb/storetest"
)

func TestPartsOfATransaction(t *testing.T) {
	db := storetest.New(t)
	for _, k := range []string{"a", "b", "ref/x"} {
		if err := change(db, func(_ *configdb.View, tx *configdb.Txn) error { tx.Put(k, []byte("old")); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	v := db.Local()
	tx := &configdb.Txn{Actor: "ann", Note: "n"}

	// The first part frees a and takes c.
	one := tx.Part()
	a, _ := v.Get("a")
	one.RequireRevision("a", a.Revision)
	one.Delete("a")
	one.RequireRevision("c", 0)
	one.Put("c", []byte("one"))
	if err := tx.Join(one, 0); err != nil {
		t.Fatal(err)
	}
	seen := tx.Seen(v)
	if _, ok := seen.Get("a"); ok {
		t.Error("the next part still sees a")
	}
	if c, ok := seen.Get("c"); !ok || string(c.Value) != "one" || c.Revision != 0 {
		t.Errorf("the next part sees c as %+v", c)
	}
	if _, ok := v.Get("a"); !ok || v.Len() != 3 || seen.Revision() != v.Revision() {
		t.Error("the view itself changed")
	}

	// The second takes what the first freed: it finds nothing there.
	two := tx.Part()
	two.RequireRevision("a", 0)
	two.Put("a", []byte("two"))
	two.RequireExists("c")
	if err := tx.Join(two, 0); err != nil {
		t.Fatal(err)
	}

	// A third that needs ref/ empty, which another part empties, has to wait.
	three := tx.Part()
	three.Delete("ref/x")
	if err := tx.Join(three, 0); err != nil {
		t.Fatal(err)
	}
	four := tx.Part()
	four.RequireEmpty("ref/")
	four.Delete("b")
	before := tx.Len()
	if err := tx.Join(four, 0); !errors.Is(err, configdb.ErrPartOrder) || tx.Len() != before {
		t.Errorf("%v, %d changes", err, tx.Len())
	}

	// One that is too large leaves nothing behind.
	five := tx.Part()
	for i := range fsm.MaxTxnOps - tx.Len() {
		five.Put(fmt.Sprintf("many/%d", i), nil)
	}
	if err := tx.Join(five, 1); !errors.Is(err, configdb.ErrPartTooLarge) || tx.Len() != before {
		t.Errorf("%v, %d changes", err, tx.Len())
	}
	if err := tx.Join(five, 0); err != nil || tx.Len() != fsm.MaxTxnOps {
		t.Errorf("%v, %d changes", err, tx.Len())
	}
	if _, err := db.Txn(context.Background(), tx); err != nil {
		t.Fatal(err)
	}
	if e, ok := db.Local().Get("a"); !ok || string(e.Value) != "two" {
		t.Errorf("a is %q", e.Value)
	}
	if _, ok := db.Local().Get("b"); !ok {
		t.Error("the refused part was carried out")
	}
}

// What a part was decided on still has to hold when all of it is committed.
func TestPartsKeepTheirPreconditions(t *testing.T) {
	db := storetest.New(t)
	tx := &configdb.Txn{}
	for i, key := range []string{"a", "b"} {
		part := tx.Part()
		part.RequireRevision(key, 0)
		part.RequireRevision("shared", 0) // kept once
		part.Put(key, nil)
		if err := tx.Join(part, 0); err != nil {
			t.Fatal(i, err)
		}
	}
	if err := change(db, func(_ *configdb.View, tx *configdb.Txn) error { tx.Put("b", nil); return nil }); err != nil {
		t.Fatal(err)
	}
	var c *configdb.ConflictError
	if _, err := db.Txn(context.Background(), tx); !errors.As(err, &c) || c.Precondition.Key != "b" {
		t.Errorf("committed although b exists: %v", err)
	}
	if _, ok := db.Local().Get("a"); ok {
		t.Error("half of it was carried out")
	}
}
