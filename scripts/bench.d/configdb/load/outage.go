// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package load

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

const (
	// outageClients write while the leader dies.
	outageClients = 16
	// outageAttempt is how long a client waits for an answer before it asks
	// the next node.
	outageAttempt = 200 * time.Millisecond
	// outagePause keeps clients from asking dead nodes without a break.
	outagePause = 5 * time.Millisecond
	// outageBefore is how long they write before the leader dies, outageAfter
	// how long after the first acknowledgement that follows.
	outageBefore, outageAfter = time.Second, 1500 * time.Millisecond
	// outageLimit is when a cluster counts as lost.
	outageLimit = 60 * time.Second
)

// Outage kills the leader with SIGKILL under load and returns the longest time
// between two acknowledged writes. Then it starts the node again.
func Outage(ctx context.Context, c Killable, run string) (time.Duration, error) {
	leader, err := c.Leader(ctx)
	if err != nil {
		return 0, err
	}
	o := &outage{c: c, run: run, last: make([]int, outageClients)}
	lctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for i := range outageClients {
		wg.Go(func() { o.write(lctx, i) })
	}
	begin, end, err := o.trial(ctx, leader)
	cancel()
	wg.Wait()
	if err != nil {
		return 0, err
	}
	gap := longestGap(begin, within(o.acks, begin, end), end)
	if err := c.Restart(ctx, leader); err != nil {
		return 0, err
	}
	return gap, readBack(ctx, c, run, o.last, All(0))
}

type outage struct {
	c    Killable
	run  string
	last []int // of each client, the last write that was acknowledged

	mu   sync.Mutex
	acks []time.Time
}

// trial returns the begin and the end of what counts.
func (o *outage) trial(ctx context.Context, leader int) (begin, end time.Time, err error) {
	if err = o.await(ctx, time.Now(), "a first write"); err != nil {
		return
	}
	begin = time.Now()
	if err = pause(ctx, outageBefore); err != nil {
		return
	}
	if err = o.c.Kill(leader); err != nil {
		return
	}
	// An answer that was under way when it died is no sign of a new leader: every
	// attempt of then is over by this time, and its answers with it.
	over := time.Now().Add(2 * outageAttempt)
	if err = o.await(ctx, over, "a write after the leader's death"); err != nil {
		return
	}
	err = pause(ctx, outageAfter)
	return begin, time.Now(), err
}

// await waits for an acknowledgement after a time.
func (o *outage) await(ctx context.Context, after time.Time, what string) error {
	for limit := time.Now().Add(outageLimit); time.Now().Before(limit); {
		o.mu.Lock()
		n := len(o.acks)
		if n > 0 && o.acks[n-1].After(after) {
			o.mu.Unlock()
			return nil
		}
		o.mu.Unlock()
		if err := pause(ctx, outagePause); err != nil {
			return err
		}
	}
	return fmt.Errorf("waited %s in vain for %s", outageLimit, what)
}

// write is one client, which asks the next node after each failure.
func (o *outage) write(ctx context.Context, client int) {
	var sessions [Nodes]Session
	defer func() {
		for _, s := range sessions {
			if s != nil {
				s.Close()
			}
		}
	}()
	node := client % Nodes
	for n := 1; ctx.Err() == nil; {
		if err := o.attempt(ctx, &sessions[node], node, client, n); err != nil {
			node = (node + 1) % Nodes
			_ = pause(ctx, outagePause) // the loop looks for the end itself
			continue
		}
		o.mu.Lock()
		o.acks = append(o.acks, time.Now())
		o.last[client] = n
		o.mu.Unlock()
		n++
	}
}

func (o *outage) attempt(ctx context.Context, s *Session, node, client, n int) (err error) {
	ctx, cancel := context.WithTimeout(ctx, outageAttempt)
	defer cancel()
	if *s == nil {
		if *s, err = o.c.DialShared(ctx, node); err != nil {
			*s = nil
			return err
		}
	}
	return (*s).Put(ctx, key(o.run, client, n), value(client, n))
}

func within(all []time.Time, begin, end time.Time) []time.Time {
	var out []time.Time
	for _, t := range all {
		if !t.Before(begin) && !t.After(end) {
			out = append(out, t)
		}
	}
	return out
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return errors.Join(context.Cause(ctx), ctx.Err())
	}
}
