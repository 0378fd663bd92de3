// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package reconcile

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muster-vm/muster/configdb/storetest"
)

// Hammered from all sides, no change is lost and no object is in two hands.
func TestStress(t *testing.T) {
	db := storetest.New(t)
	const objects, changes = 20, 3000
	var busy [objects]atomic.Bool
	var want, got [objects]atomic.Int64
	l, stop := run(t, Config{DB: db, Workers: 8, MinBackoff: time.Millisecond, MaxBackoff: 2 * time.Millisecond, Reconcile: func(_ context.Context, id string) (Result, error) {
		var i int
		if _, err := fmt.Sscan(id, &i); err != nil {
			t.Error(err)
		}
		if busy[i].Swap(true) {
			t.Errorf("%s is in two hands", id)
		}
		n := want[i].Load() // the state, read after the call began
		busy[i].Store(false)
		got[i].Store(n)
		if n%5 == 0 {
			return Result{}, errors.New("sometimes")
		}
		return Result{}, nil
	}})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for c := range changes {
				i := c % objects
				want[i].Add(1)
				l.Enqueue(fmt.Sprint(i))
			}
		})
	}
	wg.Wait()
	deadline := time.Now().Add(time.Minute)
	for i := range objects {
		for got[i].Load() != want[i].Load() {
			if time.Now().After(deadline) {
				t.Fatalf("object %d was last seen at %d of %d", i, got[i].Load(), want[i].Load())
			}
			runtime.Gosched()
		}
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}
