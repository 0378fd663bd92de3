// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package load

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// Spread says which nodes the clients of a load are connected to.
type Spread struct{ first, step int }

// All nodes get the same number of clients, give or take one, beginning with
// the node first: a single client is there.
func All(first int) Spread { return Spread{first, 1} }

// Only one node gets them all.
func Only(node int) Spread { return Spread{node, 0} }

func (s Spread) node(client int) int { return (s.first + client*s.step) % Nodes }

// Window is the time a load takes.
type Window struct {
	Warmup, Measure time.Duration
	// Begun, if set, is called when all clients are connected.
	Begun func()
}

// call is what a client does again and again.
type call func(ctx context.Context, s Session) error

// client is one closed loop.
type client struct {
	session   Session
	next      call
	latencies []time.Duration
	all       int // calls, those before and after the window too
	acks      []time.Time
	errors    int
	first     error
}

func (c *client) run(ctx context.Context, begin, end time.Time, gaps bool) {
	for ctx.Err() == nil {
		sent := time.Now()
		if sent.After(end) {
			return
		}
		cctx, cancel := context.WithTimeout(ctx, callTimeout)
		err := c.next(cctx, c.session)
		cancel()
		now := time.Now()
		c.all++
		switch {
		case now.Before(begin) || now.After(end):
		case err != nil:
			c.errors++
			if c.first == nil || errors.Is(err, errWrong) {
				c.first = err
			}
		default:
			c.latencies = append(c.latencies, now.Sub(sent))
			if gaps {
				c.acks = append(c.acks, now)
			}
		}
	}
}

// loop runs clients until the window is over.
func loop(ctx context.Context, c Cluster, clients int, s Spread, w Window, gaps bool, each func(client int) call) (*Result, error) {
	all := make([]*client, clients)
	defer func() {
		for _, cl := range all {
			if cl != nil {
				cl.session.Close()
			}
		}
	}()
	for i := range all {
		session, err := c.Dial(ctx, s.node(i))
		if err != nil {
			return nil, fmt.Errorf("connect client %d to node %d: %w", i, s.node(i), err)
		}
		all[i] = &client{session: session, next: each(i)}
	}
	if w.Begun != nil {
		w.Begun()
	}
	begin := time.Now().Add(w.Warmup)
	end := begin.Add(w.Measure)
	var wg sync.WaitGroup
	for _, cl := range all {
		wg.Go(func() { cl.run(ctx, begin, end, gaps) })
	}
	wg.Wait()
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	r := total(all, w, gaps, begin, end)
	return r, r.check()
}

// total adds up what the clients have seen.
func total(all []*client, w Window, gaps bool, begin, end time.Time) *Result {
	var latencies []time.Duration
	var acks []time.Time
	failed, calls := 0, 0
	var first error
	for _, cl := range all {
		calls += cl.all
		latencies = append(latencies, cl.latencies...)
		acks = append(acks, cl.acks...)
		failed += cl.errors
		if first == nil || errors.Is(cl.first, errWrong) {
			first = cl.first
		}
	}
	r := newResult(latencies, w.Measure)
	r.Errors, r.First, r.Calls = failed, first, calls
	if gaps {
		r.Gap = longestGap(begin, acks, end)
	}
	return r
}

// errWrong is an answer that breaks the promise of the system. One is enough to
// fail a load.
var errWrong = errors.New("wrong answer")

// maxErrorShare of the calls may fail in a load without faults.
const maxErrorShare = 0.01

func (r *Result) check() error {
	all := r.Count() + r.Errors
	switch {
	case errors.Is(r.First, errWrong):
		return r.First
	case r.Count() == 0:
		return fmt.Errorf("no call succeeded in %s; one of %d errors: %w", r.Took, r.Errors, orNone(r.First))
	case float64(r.Errors) > maxErrorShare*float64(all):
		return fmt.Errorf("%d of %d calls failed, for example: %w", r.Errors, all, r.First)
	}
	return nil
}

func orNone(err error) error {
	if err == nil {
		return errors.New("none, all still waited")
	}
	return err
}

// Writes measures acknowledged writes of distinct keys. run makes the keys
// differ from those of other loads. Afterwards it reads back the last value
// that each of some clients was promised, through another node.
func Writes(ctx context.Context, c Cluster, run string, clients int, s Spread, w Window, gaps bool) (*Result, error) {
	last := make([]int, clients)
	r, err := loop(ctx, c, clients, s, w, gaps, func(client int) call {
		return func(ctx context.Context, session Session) error {
			n := last[client] + 1
			err := session.Put(ctx, key(run, client, n), value(client, n))
			if err == nil {
				last[client] = n
			}
			return err
		}
	})
	if err != nil {
		return nil, err
	}
	return r, readBack(ctx, c, run, last, s)
}

// readBackClients is how many clients' last writes are looked up again.
const readBackClients = 16

func readBack(ctx context.Context, c Cluster, run string, last []int, s Spread) error {
	for client, n := range last[:min(len(last), readBackClients)] {
		if n == 0 {
			continue
		}
		if err := expect(ctx, c, (s.node(client)+1)%Nodes, key(run, client, n), string(value(client, n))); err != nil {
			return err
		}
	}
	return nil
}

func expect(ctx context.Context, c Cluster, node int, key, want string) error {
	session, err := c.Dial(ctx, node)
	if err != nil {
		return err
	}
	defer session.Close()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	got, err := session.Get(ctx, key)
	if err != nil {
		return fmt.Errorf("read back %s through node %d: %w", key, node, err)
	}
	if string(got) != want {
		return fmt.Errorf("lost write: node %d has %d bytes at %s that are not what was acknowledged", node, len(got), key)
	}
	return nil
}

func key(run string, client, n int) string { return fmt.Sprintf("bench/%s/%d/%d", run, client, n) }

// value is printable, because one of the systems takes its statements as text,
// and different for each write.
func value(client, n int) []byte {
	v := make([]byte, 0, ValueBytes+32)
	v = fmt.Appendf(v, "%d.%d.", client, n)
	x := uint64(client)<<32 + uint64(n)
	for len(v) < ValueBytes {
		x = x*6364136223846793005 + 1442695040888963407
		v = append(v, "abcdefghijklmnopqrstuvwxyz012345"[x>>59])
	}
	return v[:ValueBytes]
}

// readKeys is how many keys the reads choose from.
const readKeys = 1000

// readLoaders is how many clients write them.
const readLoaders = 32

// PrepareReads writes the keys that Reads reads.
func PrepareReads(ctx context.Context, c Cluster) error {
	var wg sync.WaitGroup
	failed := make([]error, readLoaders)
	for i := range readLoaders {
		wg.Go(func() {
			session, err := c.Dial(ctx, i%Nodes)
			if err != nil {
				failed[i] = err
				return
			}
			defer session.Close()
			for n := i; n < readKeys && failed[i] == nil; n += readLoaders {
				cctx, cancel := context.WithTimeout(ctx, callTimeout)
				failed[i] = session.Put(cctx, key("read", 0, n), value(0, n))
				cancel()
			}
		})
	}
	wg.Wait()
	return errors.Join(failed...)
}

// Reads measures linearizable reads of keys that exist, and checks each answer.
func Reads(ctx context.Context, c Cluster, clients int, s Spread, w Window) (*Result, error) {
	return loop(ctx, c, clients, s, w, false, func(client int) call {
		rnd := rand.New(rand.NewPCG(uint64(client), readKeys))
		return func(ctx context.Context, session Session) error {
			n := rnd.IntN(readKeys)
			got, err := session.Get(ctx, key("read", 0, n))
			if err == nil && string(got) != string(value(0, n)) {
				err = fmt.Errorf("%w: %d bytes for %s", errWrong, len(got), key("read", 0, n))
			}
			return err
		}
	})
}
