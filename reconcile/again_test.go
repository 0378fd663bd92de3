// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
	"github.com/muster-vm/muster/internal/contain"
)

// A supervisor runs a loop again after it ended with an error, or its module
// with a panic. Nothing may be lost by that.

func TestAPanicInASourceEndsTheLoopAndNotTheProgram(t *testing.T) {
	inBubble(t, func(t *testing.T, db *storetest.Mem) {
		var bad atomic.Bool
		bad.Store(true)
		var seen sync.Map
		l := New(Config{
			Name: "test", DB: db, Log: slog.New(slog.DiscardHandler),
			Sources: []Source{{Prefix: "obj/", IDs: func(v *configdb.View, c configdb.Change) []string {
				if bad.Load() {
					panic("a bug of the source")
				}
				return keyIDs(v, c)
			}}},
			Reconcile: func(_ context.Context, id string) (Result, error) { seen.Store(id, true); return Result{}, nil },
		})
		put(t, db, "obj/a")
		err := l.Run(t.Context())
		var p *contain.Panic
		if !errors.As(err, &p) || !strings.Contains(err.Error(), "a bug of the source") {
			t.Fatalf("Run returned %v", err)
		}
		bad.Store(false)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- l.Run(ctx) }()
		synctest.Wait()
		if _, ok := seen.Load("a"); !ok {
			t.Error("the object was not looked at after the loop began again")
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestWhatFailedBeforeTheEndIsLookedAtInTheNextRun(t *testing.T) {
	inBubble(t, func(t *testing.T, db *storetest.Mem) {
		var broken atomic.Bool
		broken.Store(true)
		var calls, outside atomic.Int64
		l := New(Config{
			Name: "test", DB: db, Log: slog.New(slog.DiscardHandler), Sources: source(), MinBackoff: time.Second,
			Reconcile: func(_ context.Context, id string) (Result, error) {
				if id == "outside" {
					outside.Add(1)
					if broken.Load() {
						return Result{After: time.Hour}, nil
					}
					return Result{}, nil
				}
				calls.Add(1)
				if broken.Load() {
					return Result{}, errors.New("broken")
				}
				return Result{}, nil
			},
		})
		put(t, db, "obj/a")
		l.Enqueue("outside")
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if err := l.Run(ctx); err != nil {
			t.Fatal(err)
		}
		before, beforeOutside := calls.Load(), outside.Load()
		broken.Store(false)
		time.Sleep(time.Hour) // longer than any pause of the first run
		ctx, cancel = context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		go func() {
			time.Sleep(10 * time.Second)
			put(t, db, "obj/a")
		}()
		if err := l.Run(ctx); err != nil {
			t.Fatal(err)
		}
		if n := calls.Load() - before; n != 2 && n != 3 { // the set may be told after the first look
			t.Errorf("%d calls in the second run, want one at its beginning and one for the change", n)
		}
		if n := outside.Load() - beforeOutside; n != 1 {
			t.Errorf("%d calls for what was to be looked at later, want 1", n)
		}
	})
}

func TestDeletionsBetweenTwoRunsAreLookedAt(t *testing.T) {
	inBubble(t, func(t *testing.T, db *storetest.Mem) {
		var calls atomic.Int64
		l := New(Config{
			Name: "test", DB: db, Log: slog.New(slog.DiscardHandler), Sources: source(),
			Reconcile: func(context.Context, string) (Result, error) { calls.Add(1); return Result{}, nil },
		})
		put(t, db, "obj/a")
		for range 2 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			if err := l.Run(ctx); err != nil {
				t.Fatal(err)
			}
			cancel()
			tx := &configdb.Txn{}
			tx.Delete("obj/a")
			if _, err := db.Txn(t.Context(), tx); err != nil {
				t.Fatal(err)
			}
		}
		if n := calls.Load(); n != 2 {
			t.Errorf("%d calls, want one for the object and one for its deletion", n)
		}
	})
}
