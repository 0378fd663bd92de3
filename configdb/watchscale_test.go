// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb_test

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
)

const (
	manyWatchers = 1000
	// watcherBytes is how much memory a waiting watcher may need, with its
	// goroutine.
	watcherBytes = 16 << 10
	// slowdownMost is by how much 1,000 watchers may slow writes down at most, the
	// best turn of each compared: a test machine and its disk are shared. What is
	// measured is in the test's log.
	slowdownMost  = 1.5
	watchWriters  = 16
	watchPatience = 2 * time.Minute
)

// crowd is many watchers of one database, each of a prefix of its own. Each ends
// with the change of its key "end".
type crowd struct {
	t    *testing.T
	seen []watched
	stop context.CancelFunc
	all  sync.WaitGroup
}

// watched is what one watcher saw. Only its goroutine uses it until all ended.
type watched struct {
	changes []configdb.Change
	at      []time.Time
	err     error
}

func crowdKey(watcher int, name string) string { return fmt.Sprintf("crowd/%04d/%s", watcher, name) }

// gather lets n watchers begin and waits until they have their initial sets.
func gather(t *testing.T, db configdb.DB, n int) *crowd {
	c := &crowd{t: t, seen: make([]watched, n)}
	ctx, cancel := context.WithTimeout(t.Context(), watchPatience)
	c.stop = cancel
	var begun sync.WaitGroup
	begun.Add(n)
	for i := range n {
		c.all.Go(func() {
			c.seen[i].err = c.watch(ctx, &c.seen[i], db.Watch(crowdKey(i, ""), 0), crowdKey(i, "end"), begun.Done)
		})
	}
	begun.Wait()
	return c
}

func (c *crowd) watch(ctx context.Context, s *watched, w *configdb.Watch, end string, begun func()) error {
	b, err := w.Next(ctx)
	begun()
	for ; err == nil; b, err = w.Next(ctx) {
		now := time.Now()
		for _, e := range b.Changes {
			s.changes, s.at = append(s.changes, e), append(s.at, now)
			if e.Key == end {
				return nil
			}
		}
	}
	return err
}

// wait ends when all watchers have seen their last change.
func (c *crowd) wait() {
	c.t.Helper()
	c.all.Wait()
	c.stop()
	for i := range c.seen {
		if err := c.seen[i].err; err != nil {
			c.t.Fatalf("watcher %d after %d changes: %v", i, len(c.seen[i].changes), err)
		}
	}
}

// disperse ends the watchers at once.
func (c *crowd) disperse() {
	c.stop()
	c.all.Wait()
}

func quantile(d []time.Duration, q float64) time.Duration {
	slices.Sort(d)
	return d[int(q*float64(len(d)-1))]
}

func writeKeys(t *testing.T, db configdb.DB, keys ...string) {
	tx := &configdb.Txn{Actor: "test"}
	for _, k := range keys {
		tx.Put(k, []byte("v"))
	}
	ctx, cancel := context.WithTimeout(t.Context(), watchPatience)
	defer cancel()
	if _, err := db.Txn(ctx, tx); err != nil {
		t.Errorf("write %s: %v", keys[0], err)
	}
}

// inParallel calls f with 0 to n-1, each of the workers with the next that is left.
func inParallel(workers, n int, f func(worker, i int)) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for k := range workers {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				f(k, i)
			}
		})
	}
	wg.Wait()
}

// A thousand watchers of one node, while others write through all nodes: each
// sees every change below its prefix, once and in order, and nothing else.
func TestAThousandWatchersSeeEveryChangeOnce(t *testing.T) {
	const rounds = 8
	c := storetest.NewCluster(t, 3)
	leader := c.Leader()
	crowd := gather(t, leader, manyWatchers)
	sent := make([]time.Time, rounds*manyWatchers)
	writing := make([]time.Duration, rounds*manyWatchers)
	name := func(n int) string { return fmt.Sprintf("%06d", n) }
	inParallel(watchWriters, len(sent), func(worker, n int) {
		sent[n] = time.Now()
		writeKeys(t, c.Nodes[worker%len(c.Nodes)], crowdKey(n%manyWatchers, name(n)))
		writing[n] = time.Since(sent[n])
	})
	inParallel(watchWriters, manyWatchers, func(_, i int) { writeKeys(t, leader, crowdKey(i, "end")) })
	crowd.wait()
	var delays []time.Duration
	v := leader.Local()
	for i := range crowd.seen {
		var want []configdb.Entry
		for e := range v.Scan(crowdKey(i, ""), "") {
			want = append(want, e)
		}
		slices.SortFunc(want, func(a, b configdb.Entry) int {
			return cmp.Or(cmp.Compare(a.Revision, b.Revision), strings.Compare(a.Key, b.Key))
		})
		got := crowd.seen[i].changes
		if len(want) != rounds+1 || len(got) != len(want) {
			t.Fatalf("watcher %d saw %d changes of %d", i, len(got), len(want))
		}
		for k, e := range got {
			if e.Deleted || e.Key != want[k].Key || e.Revision != want[k].Revision {
				t.Fatalf("watcher %d: change %d is %s of %d, want %s of %d", i, k, e.Key, e.Revision, want[k].Key, want[k].Revision)
			}
			if n, err := strconv.Atoi(e.Key[len(crowdKey(i, "")):]); err == nil { // not the end
				delays = append(delays, crowd.seen[i].at[k].Sub(sent[n]))
			}
		}
	}
	t.Logf("%d changes, %d watchers, %d writers: from sending a change to its acknowledgement p50 %v, p99 %v; to its watcher p50 %v, p99 %v",
		len(sent), manyWatchers, watchWriters, quantile(writing, 0.5), quantile(writing, 0.99), quantile(delays, 0.5), quantile(delays, 0.99))
}

// A watcher is a goroutine of whoever watches, and a position.
func TestAWaitingWatcherNeedsLittleMemory(t *testing.T) {
	db := storetest.New(t)
	for i := range manyWatchers {
		writeKeys(t, db, crowdKey(i, "a"))
	}
	memory := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc + m.StackInuse) //nolint:gosec // not so much
	}
	before := memory()
	crowd := gather(t, db, manyWatchers)
	each := (memory() - before) / manyWatchers
	t.Logf("%d bytes for a watcher that waits, with its goroutine", each)
	if each > watcherBytes {
		t.Errorf("a watcher needs %d bytes, want at most %d", each, watcherBytes)
	}
	crowd.disperse()
}

// Writes go on as they did: with watchers and without, in turns. What else the machine does
// makes turns longer, never shorter, so the best of each are compared, and turns are added
// until those are alike: writes that do wait for watchers do so in all of them.
func TestWritersDoNotFeelAThousandWatchers(t *testing.T) {
	const leastTurns, mostTurns, writes = 5, 40, 500
	c := storetest.NewCluster(t, 3)
	leader := c.Leader()
	measure := func() time.Duration {
		began := time.Now()
		inParallel(watchWriters, writes, func(worker, n int) {
			writeKeys(t, c.Nodes[worker%len(c.Nodes)], crowdKey(n%manyWatchers, "x"))
		})
		return time.Since(began)
	}
	measure() // connections stand, files are there
	var with, without []time.Duration
	ratio := math.Inf(1)
	for turn := 0; turn < leastTurns || turn < mostTurns && ratio > slowdownMost; turn++ {
		without = append(without, measure())
		crowd := gather(t, leader, manyWatchers)
		with = append(with, measure())
		crowd.disperse()
		ratio = float64(slices.Min(with)) / float64(slices.Min(without))
	}
	t.Logf("%d writes by %d writers: without watchers %v, with %d on the leader %v; ratio of the best %.2f, of the medians %.2f",
		writes, watchWriters, without, manyWatchers, with, ratio, float64(quantile(with, 0.5))/float64(quantile(without, 0.5)))
	if ratio > slowdownMost {
		t.Errorf("%d watchers make writes take %.2f times as long, want at most %.1f", manyWatchers, ratio, slowdownMost)
	}
}
