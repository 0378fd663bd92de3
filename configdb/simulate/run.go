// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-vm/muster/configdb"
)

// size of a run.
type size struct {
	nodes, vms, changes int
	idle                time.Duration // for which the cluster is left alone
	timing              configdb.Timing
	atEnd               func() error // if set, called while all nodes are there
}

// loaders is how many nodes create VMs at once.
const loaders = 8

// steps of a phase are told to who watches.
const steps = 5

// tell says that another step of n was done.
func (c *cluster) tell(done, part, n int, what string) {
	if step := max(1, n/steps); done/step != (done-part)/step {
		c.say("%d of %d %s", done, n, what)
	}
}

// result is what a run found.
type result struct {
	size
	formed, loaded, changed phase
	idlePhase               phase
	// formedMemory, and so on: heap in use and stacks after the phase, bytes.
	emptyMemory, formedMemory, loadedMemory, changedMemory int64
	keys                                                   int
	stateBytes                                             int64
	entries                                                int
	entryBytes                                             int64
	goroutines                                             int
	// latency of a change until its own node has it; lag of the last node behind
	// the leader; convergence: from the last acknowledgement until all have all.
	latency, lag []time.Duration
	converged    time.Duration
	terms        uint64
	revision     uint64
	hash         [sha256.Size]byte
}

// phase is what happened in one part of a run.
type phase struct {
	took, cpu time.Duration // cpu is of all nodes together
	// of the leader at its end, and of the others: mean and most.
	leader, mean, most traffics
	entries            int
	entryBytes         int64
}

type traffics struct{ bytes, writes int64 }

// simulate carries out one run.
func simulate(ctx context.Context, s size, log *slog.Logger, say func(format string, a ...any)) (r *result, err error) {
	r = &result{size: s, emptyMemory: memoryInUse()}
	say("%d nodes, %d of them voters, form a group", s.nodes, min(s.nodes, voters))
	began := time.Now()
	c, err := form(ctx, s.nodes, s.timing, log)
	if c != nil {
		defer func() { err = errors.Join(err, c.close(), c.broken()) }()
	}
	if err != nil {
		return r, err
	}
	c.say = say
	m := newMeter(c)
	m.begin(began)
	if err := c.parallel(ctx, loaders, len(c.nodes), func(ctx context.Context, _, i int) error { return createNode(ctx, c.nodes[i]) }); err != nil {
		return r, err
	}
	if _, err := c.converge(ctx); err != nil {
		return r, err
	}
	r.formed, r.formedMemory, r.goroutines = m.end(), memoryInUse(), runtime.NumGoroutine()
	first, err := c.leader(ctx)
	if err != nil {
		return r, err
	}
	term := first.Term()

	say("%s with nothing to do", s.idle)
	m.begin(time.Now())
	if !wait(ctx, s.idle) {
		return r, ctx.Err()
	}
	r.idlePhase = m.end()

	say("%d VMs are created", s.vms)
	f := bind(s.vms, s.nodes)
	if err := c.load(ctx, m, f, r); err != nil {
		return r, err
	}
	say("%d reports, by each node on its own VMs", s.changes)
	if err := c.change(ctx, m, f, r); err != nil {
		return r, err
	}
	say("comparing %d replicas", s.nodes)
	last, err := c.leader(ctx)
	if err != nil {
		return r, err
	}
	r.terms = last.Term() - term
	r.revision, r.hash, err = c.compare(ctx)
	v := last.Local()
	r.keys, r.stateBytes = v.Len(), v.Bytes()
	if err == nil && s.atEnd != nil {
		err = s.atEnd()
	}
	return r, err
}

func (c *cluster) load(ctx context.Context, m *meter, f fleet, r *result) error {
	m.begin(time.Now())
	var created atomic.Int64
	err := c.parallel(ctx, loaders, len(c.nodes), func(ctx context.Context, _, i int) error {
		for part := range slices.Chunk(f[i], vmsPerTxn) {
			if err := createVMs(ctx, c.nodes[i], part); err != nil {
				return fmt.Errorf("create VMs through %s: %w", c.nodes[i].name(), err)
			}
			c.tell(int(created.Add(int64(len(part)))), len(part), r.vms, "VMs")
		}
		return nil
	})
	if err != nil {
		return err
	}
	if _, err := c.converge(ctx); err != nil {
		return err
	}
	r.loaded, r.loadedMemory = m.end(), memoryInUse()
	return nil
}

// change lets all nodes report at once, each one thing after the other.
func (c *cluster) change(ctx context.Context, m *meter, f fleet, r *result) error {
	m.begin(time.Now())
	watching, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { r.lag = c.lags(watching) })
	var next, acknowledged atomic.Int64
	latency := make([][]time.Duration, len(c.nodes))
	err := c.parallel(ctx, len(c.nodes), len(c.nodes), func(ctx context.Context, _, i int) error {
		for k := 1; len(f[i]) > 0 && next.Add(1) <= int64(r.changes); k++ {
			began := time.Now()
			if err := report(ctx, c.nodes[i], f[i][k%len(f[i])], k); err != nil {
				return err
			}
			latency[i] = append(latency[i], time.Since(began))
			c.tell(int(acknowledged.Add(1)), 1, r.changes, "reports")
		}
		return nil
	})
	stop()
	wg.Wait()
	if err != nil {
		return err
	}
	r.latency = slices.Concat(latency...)
	if len(r.latency) != r.changes {
		return fmt.Errorf("%d changes were acknowledged, want %d", len(r.latency), r.changes)
	}
	if r.converged, err = c.converge(ctx); err != nil {
		return err
	}
	r.changed, r.changedMemory = m.end(), memoryInUse()
	r.entries, r.entryBytes = r.changed.entries, r.changed.entryBytes
	return nil
}

// parallel calls f for 0 to n-1 with so many workers, until one fails.
func (c *cluster) parallel(ctx context.Context, workers, n int, f func(ctx context.Context, worker, i int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n && ctx.Err() == nil; i = int(next.Add(1)) - 1 {
				if err := f(ctx, w, i); err != nil {
					cancel(err)
				}
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// highest is the newest revision of any voter.
func (c *cluster) highest() (revision uint64) {
	for _, n := range c.nodes[:min(voters, len(c.nodes))] {
		revision = max(revision, n.Local().Revision())
	}
	return revision
}

// reached reports whether all nodes have a revision.
func (c *cluster) reached(revision uint64) bool {
	return !slices.ContainsFunc(c.nodes, func(n *node) bool { return n.Local().Revision() < revision })
}

// converge waits until all nodes have what the voters have now.
func (c *cluster) converge(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	began, to := time.Now(), c.highest()
	for !c.reached(to) {
		if !wait(ctx, time.Millisecond) {
			return 0, fmt.Errorf("not all nodes have revision %d: %w", to, c.behind(to))
		}
	}
	return time.Since(began), nil
}

func (c *cluster) behind(to uint64) error {
	var errs []error
	for _, n := range c.nodes {
		if rev := n.Local().Revision(); rev < to {
			errs = append(errs, fmt.Errorf("%s has %d", n.name(), rev))
		}
	}
	return errors.Join(errs...)
}

// lags measures again and again how long it takes until all nodes have what
// some voter has.
func (c *cluster) lags(ctx context.Context) (all []time.Duration) {
	for ctx.Err() == nil {
		began, to := time.Now(), c.highest()
		for !c.reached(to) {
			if !wait(ctx, time.Millisecond) {
				return all
			}
		}
		all = append(all, time.Since(began))
		wait(ctx, pause)
	}
	return all
}

// hashOf is a hash of all keys of a view.
func hashOf(v *configdb.View) (sum [sha256.Size]byte) {
	h := sha256.New()
	var b []byte
	for e := range v.Scan("", "") {
		b = binary.AppendUvarint(b[:0], uint64(len(e.Key)))
		b = append(b, e.Key...)
		b = binary.AppendUvarint(b, uint64(len(e.Value)))
		b = append(b, e.Value...)
		b = binary.AppendUvarint(b, e.Revision)
		b = binary.AppendUvarint(b, e.Created)
		_, _ = h.Write(b)
	}
	h.Sum(sum[:0])
	return sum
}

// compare returns the one state that all nodes have, or an error that names
// those with another.
func (c *cluster) compare(ctx context.Context) (revision uint64, sum [sha256.Size]byte, err error) {
	if _, err := c.converge(ctx); err != nil {
		return 0, sum, err
	}
	views := make([]*configdb.View, len(c.nodes))
	for i, n := range c.nodes {
		views[i] = n.Local()
	}
	return same(views)
}

func same(views []*configdb.View) (revision uint64, sum [sha256.Size]byte, err error) {
	sums := make([][sha256.Size]byte, len(views))
	var wg sync.WaitGroup
	slots := make(chan struct{}, runtime.NumCPU())
	for i, v := range views {
		slots <- struct{}{}
		wg.Go(func() {
			sums[i] = hashOf(v)
			<-slots
		})
	}
	wg.Wait()
	var errs []error
	for i, v := range views {
		if v.Revision() != views[0].Revision() || sums[i] != sums[0] {
			errs = append(errs, fmt.Errorf("replica %d has revision %d and state %x, the first %d and %x", i+1, v.Revision(), sums[i][:8], views[0].Revision(), sums[0][:8]))
		}
	}
	return views[0].Revision(), sums[0], errors.Join(errs...)
}

// memoryInUse is what the process holds: live heap and stacks.
func memoryInUse() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // what finalizers and pools held in the first
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse) //nolint:gosec // not so much
}

// cpuTime is what the process has used of its processors.
func cpuTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0 // no system that we run on
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// meter measures phases.
type meter struct {
	c          *cluster
	began      time.Time
	cpu        time.Duration
	before     []traffics
	entries    int
	entryBytes int64
}

func newMeter(c *cluster) *meter { return &meter{c: c} }

func (m *meter) now() []traffics {
	out := make([]traffics, len(m.c.nodes))
	for i, n := range m.c.nodes {
		out[i] = traffics{n.sent.bytes.Load(), n.sent.writes.Load()}
	}
	return out
}

func (m *meter) begin(at time.Time) {
	m.before, m.began, m.cpu = m.now(), at, cpuTime()
	m.entries, m.entryBytes = m.c.library.size()
}

// end returns the phase. Its leader is the node that sent most, which led
// longest.
func (m *meter) end() phase {
	p := phase{took: time.Since(m.began), cpu: cpuTime() - m.cpu}
	entries, size := m.c.library.size()
	p.entries, p.entryBytes = entries-m.entries, size-m.entryBytes
	all := m.now()
	for i := range all {
		all[i].bytes -= m.before[i].bytes
		all[i].writes -= m.before[i].writes
	}
	slices.SortFunc(all, func(a, b traffics) int { return int(b.bytes - a.bytes) })
	p.leader = all[0]
	for _, t := range all[1:] {
		p.mean.bytes += t.bytes
		p.mean.writes += t.writes
		p.most.bytes, p.most.writes = max(p.most.bytes, t.bytes), max(p.most.writes, t.writes)
	}
	if others := int64(len(all) - 1); others > 0 {
		p.mean.bytes /= others
		p.mean.writes /= others
	}
	return p
}
