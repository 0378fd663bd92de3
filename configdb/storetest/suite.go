// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/fsm"
)

// suiteTimeout bounds each case.
const suiteTimeout = 2 * time.Minute

// Run checks what every DB promises. pick returns some handle of one and the
// same database: for a cluster, each call may return another node.
func Run(t *testing.T, pick func() configdb.DB) {
	for _, c := range []struct {
		name string
		run  func(context.Context, *testing.T, func() configdb.DB)
	}{
		{"a write is read on the node that wrote it", testReadYourWrites},
		{"a linearizable view anywhere has every acknowledged write", testLinearizable},
		{"a failed precondition changes nothing and says what it found", testPreconditions},
		{"all changes of a transaction land together", testAtomic},
		{"concurrent increments are never lost", testIncrements},
		{"one of many creators of a key wins", testOneWins},
		{"limits are refused before anything is written", testLimits},
		{"a watch has the initial set, then every last state", testWatch},
		{"a watch resumes after a revision", testWatchResume},
		{"binary and empty values survive", testValues},
		{"a cancelled context ends a wait", testCancel},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), suiteTimeout)
			defer cancel()
			c.run(ctx, t, pick)
		})
	}
}

func put(ctx context.Context, t *testing.T, db configdb.DB, key, value string) uint64 {
	t.Helper()
	tx := &configdb.Txn{Actor: "test"}
	tx.Put(key, []byte(value))
	rev, err := db.Txn(ctx, tx)
	if err != nil {
		t.Fatalf("put %s: %v", key, err)
	}
	return rev
}

func testReadYourWrites(ctx context.Context, t *testing.T, pick func() configdb.DB) {
	for i := range 20 {
		db, key := pick(), fmt.Sprintf("ryw/%d", i)
		rev := put(ctx, t, db, key, "v")
		if e, ok := db.Local().Get(key); !ok || e.Revision != rev || string(e.Value) != "v" {
			t.Fatalf("local read after write: %v %+v, want revision %d", ok, e, rev)
		}
	}
}

func testLinearizable(ctx context.Context, t *testing.T, pick func() configdb.DB) {
	for i := range 20 {
		key := fmt.Sprintf("lin/%d", i)
		rev := put(ctx, t, pick(), key, "v")
		v, err := pick().View(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := v.Get(key); !ok || v.Revision() < rev {
			t.Fatalf("view at %d lacks a write acknowledged at %d", v.Revision(), rev)
		}
	}
}

func testPreconditions(ctx context.Context, t *testing.T, pick func() configdb.DB) {
	rev := put(ctx, t, pick(), "pre/a", "1")
	cases := map[string]func(*configdb.Txn){
		"absent key exists":   func(tx *configdb.Txn) { tx.RequireRevision("pre/a", 0) },
		"other revision":      func(tx *configdb.Txn) { tx.RequireRevision("pre/a", rev+1000) },
		"missing key":         func(tx *configdb.Txn) { tx.RequireExists("pre/none") },
		"prefix is not empty": func(tx *configdb.Txn) { tx.RequireEmpty("pre/") },
		"other term":          func(tx *configdb.Txn) { tx.RequireTerm(1 << 40) },
	}
	for name, require := range cases {
		tx := &configdb.Txn{}
		require(tx)
		tx.Put("pre/b", []byte("x"))
		_, err := pick().Txn(ctx, tx)
		var c *configdb.ConflictError
		if !errors.As(err, &c) || !errors.Is(err, configdb.ErrConflict) || c.Revision == 0 {
			t.Errorf("%s: error %v, want a conflict", name, err)
		}
	}
	v, err := pick().View(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := v.Get("pre/b"); ok {
		t.Error("a refused transaction wrote")
	}
	tx := &configdb.Txn{}
	tx.RequireRevision("pre/a", rev)
	tx.RequireExists("pre/a")
	tx.RequireEmpty("pre/b")
	tx.Put("pre/b", []byte("x"))
	if _, err := pick().Txn(ctx, tx); err != nil {
		t.Errorf("all preconditions hold, but: %v", err)
	}
}

func testAtomic(ctx context.Context, t *testing.T, pick func() configdb.DB) {
	for i := range 10 {
		tx := &configdb.Txn{}
		tx.Put("atom/x", fmt.Append(nil, i))
		tx.Put("atom/y", fmt.Append(nil, i))
		if _, err := pick().Txn(ctx, tx); err != nil {
			t.Fatal(err)
		}
		v := pick().Local()
		x, _ := v.Get("atom/x")
		y, _ := v.Get("atom/y")
		if !bytes.Equal(x.Value, y.Value) || x.Revision != y.Revision {
			t.Fatalf("a view saw half of a transaction: %s/%d and %s/%d", x.Value, x.Revision, y.Value, y.Revision)
		}
	}
}

func testIncrements(ctx context.Context, t *testing.T, pick func() configdb.DB) {
	const clients, each = 8, 10
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for range each {
				_, err := configdb.Transact(ctx, pick(), "test", 10_000, func(v *configdb.View, tx *configdb.Txn) error {
					e, _ := v.Get("incr")
					n := 0
					_, _ = fmt.Sscan(string(e.Value), &n)
					tx.RequireRevision("incr", e.Revision)
					tx.Put("incr", fmt.Append(nil, n+1))
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	v, err := pick().View(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if e, _ := v.Get("incr"); string(e.Value) != fmt.Sprint(clients*each) {
		t.Errorf("counter is %s after %d increments", e.Value, clients*each)
	}
}

func testOneWins(ctx context.Context, t *testing.T, pick func() configdb.DB) {
	const racers = 16
	var wg sync.WaitGroup
	var mu sync.Mutex
	won := 0
	for i := range racers {
		wg.Go(func() {
			tx := &configdb.Txn{}
			tx.RequireRevision("race", 0)
			tx.Put("race", fmt.Append(nil, i))
			_, err := pick().Txn(ctx, tx)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won++
			} else if !errors.Is(err, configdb.ErrConflict) {
				t.Errorf("racer %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if won != 1 {
		t.Errorf("%d creators won, want 1", won)
	}
}

func testLimits(ctx context.Context, t *testing.T, pick func() configdb.DB) {
	for name, fill := range map[string]func(*configdb.Txn){
		"long key":   func(tx *configdb.Txn) { tx.Put(strings.Repeat("k", fsm.MaxKeyBytes+1), nil) },
		"empty key":  func(tx *configdb.Txn) { tx.Put("", nil) },
		"big value":  func(tx *configdb.Txn) { tx.Put("limit", make([]byte, fsm.MaxValueBytes+1)) },
		"big in all": func(tx *configdb.Txn) { fillTxn(tx, 5, fsm.MaxValueBytes) },
		"many":       func(tx *configdb.Txn) { fillTxn(tx, fsm.MaxTxnOps+1, 1) },
	} {
		tx := &configdb.Txn{}
		fill(tx)
		if _, err := pick().Txn(ctx, tx); !errors.Is(err, configdb.ErrTooLarge) {
			t.Errorf("%s: %v, want ErrTooLarge", name, err)
		}
	}
}

func fillTxn(tx *configdb.Txn, n, size int) {
	for i := range n {
		tx.Put(fmt.Sprintf("limit/%d", i), make([]byte, size))
	}
}

func testWatch(ctx context.Context, t *testing.T, pick func() configdb.DB) {
	db := pick()
	put(ctx, t, db, "watch/a", "1")
	put(ctx, t, db, "watch/b", "1")
	w := db.Watch("watch/", 0)
	b, err := w.Next(ctx)
	if err != nil || !b.Synced || len(b.Changes) != 2 {
		t.Fatalf("initial set: %+v, %v", b, err)
	}
	put(ctx, t, db, "other", "1")
	put(ctx, t, db, "watch/a", "2")
	put(ctx, t, db, "watch/a", "3")
	tx := &configdb.Txn{}
	tx.Delete("watch/b")
	if _, err := db.Txn(ctx, tx); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for len(got) < 2 {
		b, err := w.Next(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range b.Changes {
			got[c.Key] = string(c.Value)
			if c.Deleted {
				got[c.Key] = "deleted"
			}
		}
	}
	if got["watch/a"] != "3" || got["watch/b"] != "deleted" || len(got) != 2 {
		t.Errorf("watched %v", got)
	}
}

func testWatchResume(ctx context.Context, t *testing.T, pick func() configdb.DB) {
	rev := put(ctx, t, pick(), "resume/a", "1")
	last := put(ctx, t, pick(), "resume/b", "1")
	db := pick()
	if _, err := db.WaitRevision(ctx, last); err != nil {
		t.Fatal(err)
	}
	b, err := db.Watch("resume/", rev).Next(ctx)
	if err != nil || len(b.Changes) != 1 || b.Changes[0].Key != "resume/b" || b.Synced {
		t.Errorf("resumed after %d: %+v, %v", rev, b, err)
	}
}

func testValues(ctx context.Context, t *testing.T, pick func() configdb.DB) {
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	for name, val := range map[string][]byte{"all": all, "empty": {}, "big": bytes.Repeat([]byte{0xff}, fsm.MaxValueBytes)} {
		tx := &configdb.Txn{}
		tx.Put("value/"+name, val)
		if _, err := pick().Txn(ctx, tx); err != nil {
			t.Fatal(err)
		}
		v, err := pick().View(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if e, ok := v.Get("value/" + name); !ok || !bytes.Equal(e.Value, val) {
			t.Errorf("%s: %d bytes came back as %d", name, len(val), len(e.Value))
		}
	}
}

func testCancel(ctx context.Context, t *testing.T, pick func() configdb.DB) {
	db := pick()
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if _, err := db.WaitRevision(short, 1<<40); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("wait for a far revision: %v", err)
	}
	w := db.Watch("cancel/", db.Local().Revision())
	if _, err := w.Next(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("watch of nothing: %v", err)
	}
}
