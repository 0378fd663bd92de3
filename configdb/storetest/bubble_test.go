// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/linear"
	"github.com/muster-vm/muster/internal/torture"
)

// Whole clusters with faults of a seed, each checked for linearizability. By
// default a few seeds run; MUSTER_TEST_SEED=S replays one, MUSTER_TEST_SEED=A-B
// runs many. MUSTER_TEST_LOG=DIR keeps the nodes' logs. One seed gives the same
// faults and operations; how they interleave differs a little each time.

// Sizes of a run.
const (
	bubbleSeeds    = 6 // by default, of each test
	bubbleNodes    = 3
	bubbleClients  = 4
	bubbleFaults   = 8
	bubbleKeys     = 3 // of a group
	bubbleGroups   = 2 // at a time
	groupEpoch     = 3 * time.Second
	clientPause    = 80 * time.Millisecond // at most
	clientDeadline = 2 * time.Second
)

// seeds returns the seeds to run.
func seeds(t *testing.T, usual int) []uint64 {
	t.Helper()
	from, to := uint64(1), uint64(usual)
	if text := os.Getenv("MUSTER_TEST_SEED"); text != "" {
		first, last, isRange := strings.Cut(text, "-")
		if !isRange {
			last = first
		}
		var err1, err2 error
		from, err1 = strconv.ParseUint(first, 10, 64)
		to, err2 = strconv.ParseUint(last, 10, 64)
		if err := errors.Join(err1, err2); err != nil || from > to {
			t.Fatalf("MUSTER_TEST_SEED is %q: give a number, or two as in 1-100 (%v)", text, err)
		}
	}
	var out []uint64
	for s := from; s <= to; s++ {
		out = append(out, s)
	}
	return out
}

// load is the clients, the watches and what they saw.
type load struct {
	b   *Bubble
	rec *linear.Recorder

	mu    sync.Mutex
	known map[string]linear.Cell
	acks  []torture.Ack
	stale []torture.StaleRead
	watch []*bubbleWatch
}

func newLoad(b *Bubble) *load {
	return &load{b: b, rec: linear.NewRecorder(), known: map[string]linear.Cell{}}
}

// group is the keys that are in use at a time.
func group(now time.Duration, slot int) (name string, keys []string) {
	name = fmt.Sprintf("g/%d/%d", int(now/groupEpoch), slot)
	for i := range bubbleKeys {
		keys = append(keys, fmt.Sprintf("%s/%d", name, i))
	}
	return name, keys
}

func (l *load) client(ctx context.Context, id int, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, uint64(1000+id)))
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Duration(rng.Int64N(int64(clientPause)))):
		}
		l.operate(rng, id, i)
	}
}

// operate draws one operation and does it on one node.
func (l *load) operate(rng *rand.Rand, id, i int) {
	what, node, slot := rng.IntN(100), rng.IntN(len(l.b.nodes)), rng.IntN(bubbleGroups)
	at, other := rng.IntN(bubbleKeys), 1+rng.IntN(bubbleKeys-1)
	n := l.b.nodes[node]
	store, life := n.now()
	if store == nil {
		return
	}
	name, keys := group(l.rec.Now(), slot)
	key, key2 := keys[at], keys[(at+other)%bubbleKeys]
	op := &linear.Op{Client: id, Node: n.name(), Group: name}
	value := func(k string) linear.Change { return linear.Change{Key: k, Value: fmt.Sprintf("%d-%d-%s", id, i, k)} }
	switch {
	case what < 30:
		op.Kind, op.Reads = "view", keys
	case what < 38:
		op.Kind, op.Reads, op.Stale = "local", keys, true
	case what < 58:
		op.Kind, op.Changes = "put", []linear.Change{value(key)}
	case what < 76:
		op.Kind, op.Changes = "put-if", []linear.Change{value(key)}
		op.Require = []linear.Cond{l.cond(key)}
	case what < 88: // two keys, each with its condition: both or neither
		op.Kind, op.Changes = "pair", []linear.Change{value(key), value(key2)}
		op.Require = []linear.Cond{l.cond(key), l.cond(key2)}
	case what < 94:
		op.Kind, op.Changes = "move", []linear.Change{{Key: key, Delete: true}, value(key2)}
		op.Require = []linear.Cond{{Key: key, Kind: linear.Exists}}
	default:
		op.Kind, op.Changes = "delete", []linear.Change{{Key: key, Delete: true}}
	}
	ctx, cancel := context.WithTimeout(context.Background(), clientDeadline)
	defer cancel()
	l.rec.Begin(op)
	if op.IsRead() {
		l.read(ctx, n, store, life, op)
		return
	}
	rev, err := commit(ctx, store, op)
	_, lifeNow := n.now()
	l.rec.End(op, func(o *linear.Op) { outcome(o, rev, err) })
	if op.Status != linear.Applied {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range op.Changes {
		l.known[c.Key] = linear.Cell{Key: c.Key, Exists: !c.Delete, Value: c.Value, Revision: rev}
		a := torture.Ack{Node: n.name(), Life: life, Call: time.Duration(op.Call), Return: time.Duration(op.Return), Revision: rev, Key: c.Key}
		if lifeNow != life || err != nil { // it was not there to read at this node
			a.Life = 0
		}
		l.acks = append(l.acks, a)
	}
}

// cond requires that a key is as some client last saw it.
func (l *load) cond(key string) linear.Cond {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.known[key]
	if !c.Exists {
		return linear.Cond{Key: key}
	}
	return linear.Cond{Key: key, Revision: c.Revision}
}

func commit(ctx context.Context, db configdb.DB, o *linear.Op) (uint64, error) {
	tx := &configdb.Txn{Actor: fmt.Sprint("client ", o.Client)}
	for _, c := range o.Require {
		if c.Kind == linear.Exists {
			tx.RequireExists(c.Key)
		} else {
			tx.RequireRevision(c.Key, c.Revision)
		}
	}
	for _, c := range o.Changes {
		if c.Delete {
			tx.Delete(c.Key)
		} else {
			tx.Put(c.Key, []byte(c.Value))
		}
	}
	return db.Txn(ctx, tx)
}

// outcome turns the result of a transaction into what the client knows.
func outcome(o *linear.Op, rev uint64, err error) {
	var conflict *configdb.ConflictError
	switch {
	case rev > 0: // with an error: written, though this node lags
		o.Status, o.Revision = linear.Applied, rev
	case errors.As(err, &conflict):
		o.Status, o.Revision = linear.Refused, conflict.Revision
		o.FailedCond = slices.IndexFunc(o.Require, func(c linear.Cond) bool { return c.Key == conflict.Precondition.Key })
	case errors.Is(err, configdb.ErrUncertain), errors.Is(err, configdb.ErrClosed):
		o.Status = linear.Unknown
	case errors.Is(err, configdb.ErrNoQuorum), errors.Is(err, configdb.ErrDiskFull):
		o.Status = linear.Failed // nothing was changed, they promise
	default:
		o.Status = linear.Unknown
	}
	if err != nil {
		o.Note = err.Error()
	}
}

func (l *load) read(ctx context.Context, n *BubbleNode, store *configdb.Store, life int, o *linear.Op) {
	var v *configdb.View
	var err error
	r := torture.StaleRead{Node: n.name(), Life: life, Call: time.Duration(o.Call), Stated: true}
	if o.Stale {
		r.Age, r.Known = store.Staleness() // before, so that the age is of what is read or of older
		v = store.Local()
		r.Revision = v.Revision()
	} else {
		v, err = store.View(ctx)
	}
	_, lifeNow := n.now()
	l.rec.End(o, func(o *linear.Op) {
		o.Status = linear.Failed
		if err != nil || o.Stale && lifeNow != life {
			return
		}
		o.Status, o.Revision, o.Cells = linear.Applied, v.Revision(), cells(v, o.Reads)
	})
	if o.Status != linear.Applied {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if o.Stale {
		l.stale = append(l.stale, r)
		return
	}
	for _, c := range o.Cells {
		if l.known[c.Key].Revision < c.Revision {
			l.known[c.Key] = c
		}
	}
}

func cells(v *configdb.View, keys []string) []linear.Cell {
	var out []linear.Cell
	for _, k := range keys {
		e, ok := v.Get(k)
		out = append(out, linear.Cell{Key: k, Exists: ok, Value: string(e.Value), Revision: e.Revision})
	}
	return out
}

// run lets clients and watches work while f makes trouble, and checks all.
func (l *load) run(t *testing.T, seed uint64, f func(ctx context.Context)) {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	watchCtx, stopWatching := context.WithCancel(context.Background())
	var clients, watches sync.WaitGroup
	for _, n := range l.b.nodes {
		w := &bubbleWatch{n: n, have: map[string]linear.Cell{}, reached: map[string]uint64{}}
		l.watch = append(l.watch, w)
		watches.Go(func() { w.run(watchCtx) })
	}
	for id := range bubbleClients {
		clients.Go(func() { l.client(ctx, id, seed) })
	}
	defer func() { // also after a failure
		stop()
		clients.Wait()
		stopWatching()
		watches.Wait()
	}()
	f(ctx)
	stop()
	clients.Wait()
	l.b.net.heal()
	final := l.settle()
	stopWatching()
	watches.Wait()
	l.check(t, seed, final)
}

// settle waits until all nodes are up and have everything, and reads it.
func (l *load) settle() map[string]map[string]linear.Cell {
	for _, n := range l.b.nodes {
		n.hold(false)
		n.disk.arm("", 0)
		n.disk.setFull(false)
	}
	// What was given up may still take effect, but not after this.
	time.Sleep(2 * clientDeadline)
	var last uint64
	l.b.Eventually("the last write", func(ctx context.Context) error {
		tx := &configdb.Txn{}
		tx.Put("end", []byte("end"))
		var err error
		last, err = l.b.Leader().Txn(ctx, tx)
		return err
	})
	groups := map[string]bool{}
	for _, o := range l.rec.Ops() {
		groups[o.Group] = true
	}
	final := map[string]map[string]linear.Cell{}
	for i, n := range l.b.nodes {
		var v *configdb.View
		l.b.Eventually(n.name()+" has everything", func(ctx context.Context) error {
			s := n.current()
			if s == nil {
				return errors.New("it is down")
			}
			if _, err := s.WaitRevision(ctx, last); err != nil {
				return err
			}
			var err error
			v, err = s.View(ctx)
			return err
		})
		l.b.Eventually("the watch of "+n.name()+" has everything", func(context.Context) error {
			if at := l.watch[i].position(); at < last {
				return fmt.Errorf("it is at %d of %d", at, last)
			}
			return nil
		})
		all := map[string]linear.Cell{}
		for e := range v.Scan("g/", "") {
			all[e.Key] = linear.Cell{Key: e.Key, Exists: true, Value: string(e.Value), Revision: e.Revision}
		}
		final[n.name()] = all
		for _, name := range slices.Sorted(maps.Keys(groups)) {
			var keys []string
			for k := range bubbleKeys {
				keys = append(keys, fmt.Sprintf("%s/%d", name, k))
			}
			o := &linear.Op{Client: bubbleClients, Node: n.name(), Kind: "final", Group: name, Reads: keys}
			l.rec.Begin(o)
			l.rec.End(o, func(o *linear.Op) { o.Status, o.Revision, o.Cells = linear.Applied, v.Revision(), cells(v, keys) })
		}
	}
	return final
}

// bubbleSlack is what the age of a stale read leaves out: a follower hears from
// its leader before it has what the leader has.
const bubbleSlack = time.Second

func (l *load) check(t *testing.T, seed uint64, final map[string]map[string]linear.Cell) {
	t.Helper()
	ops := l.rec.Ops()
	r, err := linear.Check(ops, linear.Options{})
	if err != nil {
		t.Fatal(err)
	}
	bad := slices.Concat(r.Violations, linear.CheckFinal(ops, final))
	bad = append(bad, torture.CheckStale(l.stale, l.acks, bubbleSlack)...)
	for _, w := range l.watch {
		bad = append(bad, w.check(final[w.n.name()], l.acks)...)
	}
	for _, v := range bad {
		t.Errorf("seed %d: %s", seed, v)
	}
	for _, u := range r.Undecided {
		t.Errorf("seed %d: undecided: %s", seed, u)
	}
	if r.ByStatus["applied"] < len(ops)/4 {
		t.Errorf("seed %d: of %d operations %v: that proves little", seed, len(ops), r.ByStatus)
	}
	t.Logf("seed %d: %d operations %v", seed, len(ops), r.ByStatus)
}

// bubbleWatch follows a node's watch over its lives.
type bubbleWatch struct {
	n *BubbleNode

	mu         sync.Mutex
	at         uint64
	have       map[string]linear.Cell
	reached    map[string]uint64 // the newest revision of each key that was seen
	violations []linear.Violation
}

func (w *bubbleWatch) run(ctx context.Context) {
	var watch *configdb.Watch
	life := 0
	for ctx.Err() == nil {
		s, now := w.n.now()
		if s == nil {
			time.Sleep(20 * time.Millisecond)
			continue
		}
		if watch == nil || now != life {
			life = now
			w.mu.Lock()
			watch = s.Watch("", w.at)
			w.mu.Unlock()
		}
		over, cancel := context.WithTimeout(ctx, time.Second)
		batch, err := watch.Next(over)
		cancel()
		switch {
		case err == nil:
			w.note(batch)
		case errors.Is(err, configdb.ErrCompacted):
			w.mu.Lock()
			w.at = 0
			w.mu.Unlock()
			watch = nil
		case errors.Is(err, configdb.ErrClosed):
			time.Sleep(20 * time.Millisecond)
		}
	}
}

func (w *bubbleWatch) position() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.at
}

func (w *bubbleWatch) note(b configdb.Batch) {
	w.mu.Lock()
	defer w.mu.Unlock()
	wrong := func(format string, args ...any) {
		w.violations = append(w.violations, linear.Violation{Kind: torture.WatchOrder, Group: w.n.name(), Text: fmt.Sprintf(format, args...)})
	}
	if b.Revision < w.at {
		wrong("a batch of revision %d after %d", b.Revision, w.at)
	}
	if b.Synced {
		clear(w.have)
	}
	last := uint64(0)
	for _, c := range b.Changes {
		if !b.Synced && !c.Deleted && c.Revision < last {
			wrong("%s of revision %d after %d in one batch", c.Key, c.Revision, last)
		}
		if c.Revision > b.Revision {
			wrong("%s of revision %d in a batch of %d", c.Key, c.Revision, b.Revision)
		}
		if c.Deleted {
			delete(w.have, c.Key)
		} else {
			last = c.Revision
			if old := w.have[c.Key]; old.Revision > c.Revision {
				wrong("%s went back from revision %d to %d", c.Key, old.Revision, c.Revision)
			}
			w.have[c.Key] = linear.Cell{Key: c.Key, Exists: true, Value: string(c.Value), Revision: c.Revision}
		}
		w.reached[c.Key] = max(w.reached[c.Key], c.Revision)
	}
	w.at = b.Revision
}

// check: the watch ends with what is there, and has seen of each key the last
// acknowledged change or a later one.
func (w *bubbleWatch) check(final map[string]linear.Cell, acks []torture.Ack) []linear.Violation {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := w.violations
	delete(w.have, "end")
	if !maps.Equal(w.have, final) {
		out = append(out, linear.Violation{Kind: torture.WatchWrong, Group: w.n.name(), Text: fmt.Sprintf("it ends with %v, the node with %v", w.have, final)})
	}
	return out
}

// faults draws trouble and makes it, one after the other.
func (b *Bubble) faults(ctx context.Context, rng *rand.Rand, n int) {
	for range n {
		time.Sleep(200*time.Millisecond + time.Duration(rng.Int64N(int64(time.Second))))
		undo := b.fault(rng)
		if rng.IntN(3) == 0 { // and another one on top
			first, second := undo, b.fault(rng)
			undo = func() { first(); second() }
		}
		time.Sleep(300*time.Millisecond + time.Duration(rng.Int64N(int64(3*time.Second))))
		undo()
	}
}

func (b *Bubble) fault(rng *rand.Rand) (undo func()) {
	i, kind, step, count := rng.IntN(len(b.nodes)), rng.IntN(12), diskSteps[rng.IntN(len(diskSteps))], 1+rng.IntN(4)
	n, undo := b.nodes[i], func() {}
	if rng.IntN(2) == 0 { // more often the leader
		for _, m := range b.nodes {
			if s := m.current(); s != nil {
				if _, leads := s.Leadership(); leads {
					n = m
				}
			}
		}
	}
	to := func(silent bool) {
		for _, m := range b.nodes {
			if m != n {
				b.net.setSilent(n.index, m.index, silent)
			}
		}
	}
	from := func(silent bool) {
		for _, m := range b.nodes {
			if m != n {
				b.net.setSilent(m.index, n.index, silent)
			}
		}
	}
	switch kind {
	case 0:
		n.crash()
	case 1: // down for long, so that it needs a snapshot
		n.hold(true)
		n.crash()
		return func() { n.hold(false) }
	case 2, 3, 4:
		n.disk.arm(step, count)
	case 5:
		to(true)
		from(true)
		return func() { to(false); from(false) }
	case 6:
		to(true)
		return func() { to(false) }
	case 7:
		from(true)
		return func() { from(false) }
	case 8:
		b.net.trouble(0.02, 30*time.Millisecond)
		return func() { b.net.trouble(0, slowestChunk) }
	case 9, 10:
		n.disk.setFull(true)
		return func() { n.disk.setFull(false) }
	case 11:
		for _, m := range b.nodes {
			m.crash()
		}
	}
	return undo
}

func TestClustersAreLinearizableUnderFaults(t *testing.T) {
	for _, seed := range seeds(t, bubbleSeeds) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := NewBubble(t, BubbleConfig{Nodes: bubbleNodes, Seed: seed, SnapshotEvery: 40, TrailingLogs: 10})
				defer b.Close()
				rng := rand.New(rand.NewPCG(seed, 0xfa17))
				newLoad(b).run(t, seed, func(ctx context.Context) { b.faults(ctx, rng, bubbleFaults) })
			})
		})
	}
}
