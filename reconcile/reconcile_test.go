// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package reconcile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/configdb/storetest"
)

// keyIDs names the object that a key is about.
func keyIDs(_ *configdb.View, c configdb.Change) []string {
	return []string{strings.TrimPrefix(c.Key, "obj/")}
}

func source() []Source { return []Source{{Prefix: "obj/", IDs: keyIDs}} }

func put(t *testing.T, db configdb.DB, key string) {
	t.Helper()
	tx := &configdb.Txn{}
	tx.Put(key, nil)
	if _, err := db.Txn(context.Background(), tx); err != nil {
		t.Fatal(err)
	}
}

// run starts a loop; stop ends it and returns what Run returned.
func run(t *testing.T, cfg Config) (l *Loop, stop func() error) {
	t.Helper()
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.Name = "test"
	l = New(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	stop = sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() { _ = stop() })
	return l, stop
}

// In a bubble of synctest the database's own clock is the fake one, too.
func inBubble(t *testing.T, f func(t *testing.T, db *storetest.Mem)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, storetest.New(t)) })
}

func TestEveryObjectIsLookedAt(t *testing.T) {
	inBubble(t, func(t *testing.T, db *storetest.Mem) {
		var mu sync.Mutex
		seen := map[string]int{}
		put(t, db, "obj/before")
		put(t, db, "other/x")
		_, stop := run(t, Config{DB: db, Sources: source(), Reconcile: func(_ context.Context, id string) (Result, error) {
			mu.Lock()
			defer mu.Unlock()
			seen[id]++
			return Result{}, nil
		}})
		synctest.Wait()
		put(t, db, "obj/after")
		synctest.Wait()
		put(t, db, "obj/before")
		synctest.Wait()
		tx := &configdb.Txn{}
		tx.Delete("obj/after")
		if _, err := db.Txn(t.Context(), tx); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if want := map[string]int{"before": 2, "after": 2}; !maps.Equal(seen, want) {
			t.Errorf("looked at %v, want %v", seen, want)
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

func TestChangesDuringARunLeadToOneMore(t *testing.T) {
	inBubble(t, func(t *testing.T, db *storetest.Mem) {
		gate := make(chan struct{})
		var calls, at atomic.Int64
		l, _ := run(t, Config{DB: db, Workers: 4, Reconcile: func(context.Context, string) (Result, error) {
			if n := at.Add(1); n > 1 {
				t.Errorf("%d workers have one object", n)
			}
			defer at.Add(-1)
			calls.Add(1)
			<-gate
			return Result{}, nil
		}})
		l.Enqueue("a")
		l.Enqueue("a") // not taken yet: the same look
		synctest.Wait()
		for range 100 {
			l.Enqueue("a")
		}
		synctest.Wait()
		if n := calls.Load(); n != 1 {
			t.Errorf("%d calls while one runs", n)
		}
		close(gate)
		synctest.Wait()
		if n := calls.Load(); n != 2 {
			t.Errorf("%d calls, want one more", n)
		}
	})
}

func TestWorkersShareTheWork(t *testing.T) {
	inBubble(t, func(t *testing.T, db *storetest.Mem) {
		gate := make(chan struct{})
		var at, most, calls atomic.Int64
		l, _ := run(t, Config{DB: db, Workers: 3, Reconcile: func(context.Context, string) (Result, error) {
			n := at.Add(1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			defer at.Add(-1)
			calls.Add(1)
			<-gate
			return Result{}, nil
		}})
		for i := range 50 {
			l.Enqueue(fmt.Sprint(i))
		}
		synctest.Wait()
		close(gate)
		synctest.Wait()
		if most.Load() != 3 || calls.Load() != 50 {
			t.Errorf("%d at once, %d calls", most.Load(), calls.Load())
		}
		if n := len(l.queue.state); n != 0 {
			t.Errorf("%d objects are remembered after all is done", n)
		}
	})
}

// gaps runs a loop on one object and returns the pauses between its calls.
func gaps(t *testing.T, cfg Config, n int, f func(call int) (Result, error)) []time.Duration {
	t.Helper()
	var last time.Time
	var out []time.Duration
	done := make(chan struct{})
	call := 0
	cfg.Reconcile = func(context.Context, string) (Result, error) {
		call++
		if call > 1 {
			out = append(out, time.Since(last))
		}
		last = time.Now()
		if call == n {
			close(done)
			return Result{}, nil
		}
		return f(call)
	}
	l, stop := run(t, cfg)
	l.Enqueue("a")
	<-done
	if err := stop(); err != nil {
		t.Error(err)
	}
	return out
}

func TestBackoffGrowsIsBoundedAndResets(t *testing.T) {
	inBubble(t, func(t *testing.T, db *storetest.Mem) {
		ms := func(n ...int) (out []time.Duration) {
			for _, x := range n {
				out = append(out, time.Duration(x)*time.Millisecond)
			}
			return out
		}
		cfg := Config{DB: db, MinBackoff: 100 * time.Millisecond, MaxBackoff: 700 * time.Millisecond}
		broken := errors.New("broken")
		got := gaps(t, cfg, 9, func(call int) (Result, error) {
			if call == 6 { // success in between
				return Result{After: 5 * time.Second}, nil
			}
			return Result{After: time.Hour}, broken // After of a failure does not count
		})
		if want := ms(100, 200, 400, 700, 700, 5000, 100, 200); !slices.Equal(got, want) {
			t.Errorf("pauses %v, want %v", got, want)
		}
		got = gaps(t, cfg, 4, func(int) (Result, error) {
			return Result{}, fmt.Errorf("write: %w", &configdb.ConflictError{})
		})
		if want := ms(10, 20, 40); !slices.Equal(got, want) {
			t.Errorf("pauses after conflicts %v, want %v", got, want)
		}
		// The longest and oddest settings end in MaxBackoff, never in a busy loop.
		cfg.MinBackoff, cfg.MaxBackoff = 300*24*time.Hour, 400*24*time.Hour
		for i, d := range gaps(t, cfg, 40, func(int) (Result, error) { return Result{}, broken }) {
			if d < cfg.MinBackoff || d > cfg.MaxBackoff {
				t.Errorf("failure %d: pause %v", i, d)
			}
		}
	})
}

func TestAChangeEndsABackoff(t *testing.T) {
	inBubble(t, func(t *testing.T, db *storetest.Mem) {
		var calls atomic.Int64
		l, _ := run(t, Config{DB: db, MinBackoff: time.Hour, MaxBackoff: time.Hour, Reconcile: func(context.Context, string) (Result, error) {
			if calls.Add(1) == 1 {
				return Result{}, errors.New("broken")
			}
			return Result{}, nil
		}})
		l.Enqueue("a")
		synctest.Wait()
		l.Enqueue("a")
		synctest.Wait()
		if n := calls.Load(); n != 2 {
			t.Errorf("%d calls after a change", n)
		}
		time.Sleep(2 * time.Hour) // fake time: the old timer must not fire
		synctest.Wait()
		if n := calls.Load(); n != 2 {
			t.Errorf("%d calls: the pause of a call long past had an effect", n)
		}
	})
}

func TestAFailedCallThatChangesItsOwnObjectIsNotRepeatedAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, db *storetest.Mem) {
		var calls atomic.Int64
		put(t, db, "obj/a")
		run(t, Config{
			DB: db, Sources: source(), MinBackoff: time.Second, MaxBackoff: time.Minute,
			Reconcile: func(context.Context, string) (Result, error) {
				calls.Add(1)
				put(t, db, "obj/a") // such as a status with a time in it
				return Result{}, errors.New("broken")
			},
		})
		time.Sleep(30*time.Second + time.Millisecond) // fake time
		synctest.Wait()
		if n := calls.Load(); n < 4 || n > 35 {
			t.Errorf("%d calls in 30 s with pauses of at least 1 s", n)
		}
	})
}

func TestAPanicIsAnErrorOfItsObject(t *testing.T) {
	inBubble(t, func(t *testing.T, db *storetest.Mem) {
		var buf syncBuffer
		var bad, good atomic.Int64
		l, stop := run(t, Config{
			DB: db, Workers: 1, Log: slog.New(slog.NewTextHandler(&buf, nil)), MinBackoff: time.Second,
			Reconcile: func(_ context.Context, id string) (Result, error) {
				if id == "bad" {
					if bad.Add(1) < 3 {
						panic("a bug of this object")
					}
					return Result{}, nil
				}
				good.Add(1)
				return Result{}, nil
			},
		})
		l.Enqueue("bad")
		l.Enqueue("good")
		time.Sleep(time.Minute)
		if bad.Load() != 3 || good.Load() != 1 {
			t.Errorf("%d calls for the bad one, %d for the good one", bad.Load(), good.Load())
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
		if s := buf.String(); !strings.Contains(s, "a bug of this object") || !strings.Contains(s, "reconcile_test.go") || !strings.Contains(s, "id=bad") {
			t.Errorf("the log has no stack: %s", s)
		}
	})
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// Run waits for the call under way, starts no other, and leaves nothing behind.
func TestTheEndIsClean(t *testing.T) {
	inBubble(t, func(t *testing.T, db *storetest.Mem) {
		began, ended := make(chan struct{}), make(chan struct{})
		var later atomic.Int64
		l, stop := run(t, Config{DB: db, Workers: 1, Sources: source(), Reconcile: func(ctx context.Context, id string) (Result, error) {
			if id == "soon" {
				later.Add(1)
				return Result{After: time.Minute}, nil
			}
			if id == "waiting" {
				t.Error("a call began after the end")
				return Result{}, nil
			}
			close(began)
			<-ctx.Done()
			time.Sleep(time.Second) // fake time: cleaning up
			close(ended)
			return Result{}, ctx.Err()
		}})
		l.Enqueue("soon")
		synctest.Wait()
		l.Enqueue("slow")
		<-began
		if err := stop(); err != nil {
			t.Error(err)
		}
		select {
		case <-ended:
		default:
			t.Error("Run returned before its call did")
		}
		l.Enqueue("waiting")
		time.Sleep(time.Hour)
		synctest.Wait()
		// For the next run, if there is one.
		if got := l.queue.ready; later.Load() != 1 || !slices.Equal(got, []string{"soon", "waiting"}) {
			t.Errorf("a timer outlived the loop: %d calls, queued %v", later.Load(), got)
		}
	})
}

func TestGoroutinesEnd(t *testing.T) {
	db := storetest.New(t)
	before := runtime.NumGoroutine()
	for range 20 {
		l, stop := run(t, Config{DB: db, Sources: source(), Reconcile: func(context.Context, string) (Result, error) { return Result{}, nil }})
		l.Enqueue("a")
		if err := stop(); err != nil {
			t.Error(err)
		}
	}
	deadline := time.Now().Add(time.Minute)
	for runtime.NumGoroutine() > before && time.Now().Before(deadline) {
		runtime.Gosched()
	}
	if n := runtime.NumGoroutine(); n > before {
		t.Errorf("%d goroutines, %d before", n, before)
	}
}

// ownDB is a database on a state machine that the test drives.
type ownDB struct {
	*storetest.Mem
	state  *fsm.State
	closed chan struct{}
}

func (d ownDB) Local() *configdb.View { return d.state.View() }
func (d ownDB) Watch(prefix string, from uint64) *configdb.Watch {
	return configdb.NewWatch(d.state, d.closed, prefix, from)
}

func applyOps(t *testing.T, s *fsm.State, ops ...fsm.Op) {
	t.Helper()
	c := fsm.Command{Txns: []fsm.Txn{{Ops: ops}}}
	if _, err := s.Apply(s.View().Revision()+1, 1, c.Encode()); err != nil {
		t.Fatal(err)
	}
}

// A replica that is restored from a leader's snapshot does not see what was
// deleted meanwhile: the loop must find out by itself, or what belonged to the
// object (a running VM) would stay for ever.
func TestDeletionsDuringARestoreAreLookedAt(t *testing.T) {
	inBubble(t, func(t *testing.T, mem *storetest.Mem) {
		db := ownDB{mem, fsm.New(), nil}
		applyOps(t, db.state, fsm.Op{Key: "obj/kept"}, fsm.Op{Key: "obj/gone"}, fsm.Op{Key: "obj/early"})
		var mu sync.Mutex
		var seen []string
		take := func() string {
			mu.Lock()
			defer mu.Unlock()
			slices.Sort(seen)
			s := fmt.Sprint(seen)
			seen = nil
			return s
		}
		run(t, Config{DB: db, Sources: source(), Reconcile: func(_ context.Context, id string) (Result, error) {
			_, there := db.Local().Get("obj/" + id)
			mu.Lock()
			defer mu.Unlock()
			seen = append(seen, fmt.Sprintf("%s %v", id, there))
			return Result{}, nil
		}})
		synctest.Wait()
		applyOps(t, db.state, fsm.Op{Key: "obj/early", Delete: true})
		synctest.Wait()
		take()
		leader := fsm.New()
		for range 9 {
			applyOps(t, leader, fsm.Op{Key: "obj/kept"}, fsm.Op{Key: "obj/new"})
		}
		var b bytes.Buffer
		if _, err := leader.Snapshot().WriteTo(&b); err != nil {
			t.Fatal(err)
		}
		if err := db.state.Restore(&b); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got := take(); got != "[gone false kept true new true]" {
			t.Errorf("looked at %s", got)
		}
	})
}

func TestAClosedDatabaseEndsTheLoop(t *testing.T) {
	db := ownDB{storetest.New(t), fsm.New(), make(chan struct{})}
	l := New(Config{DB: db, Sources: source(), Reconcile: func(context.Context, string) (Result, error) { return Result{}, nil }})
	done := make(chan error, 1)
	go func() { done <- l.Run(context.Background()) }()
	close(db.closed)
	if err := <-done; err != nil {
		t.Errorf("%v", err)
	}
}

func TestManySourcesManyIDs(t *testing.T) {
	inBubble(t, func(t *testing.T, db *storetest.Mem) {
		var mu sync.Mutex
		seen := map[string]bool{}
		run(t, Config{
			DB: db,
			Sources: []Source{
				{Prefix: "a/", IDs: func(v *configdb.View, c configdb.Change) []string {
					if e, ok := v.Get(c.Key); !ok || e.Revision < c.Revision {
						t.Errorf("the view is older than the change %s", c.Key)
					}
					return []string{"x", "y"}
				}},
				{Prefix: "b/", IDs: func(*configdb.View, configdb.Change) []string { return nil }},
				{Prefix: "c/", IDs: func(*configdb.View, configdb.Change) []string { return []string{"z"} }},
			},
			Reconcile: func(_ context.Context, id string) (Result, error) {
				mu.Lock()
				defer mu.Unlock()
				seen[id] = true
				return Result{}, nil
			},
		})
		for _, k := range []string{"a/1", "b/1", "c/1"} {
			put(t, db, k)
		}
		synctest.Wait()
		if len(seen) != 3 {
			t.Errorf("looked at %v", seen)
		}
	})
}
