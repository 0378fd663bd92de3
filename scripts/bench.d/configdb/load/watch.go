// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package load

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

const (
	// touchesPerSecond is the pace of the changes that are watched. It is low,
	// so that the time of a delivery is measured and not that of a queue.
	touchesPerSecond = 5
	// watchDrain is how long the last change may take to arrive.
	watchDrain = 10 * time.Second
	// watchTextBytes is the size of the watched value, which the objects of
	// one of the systems limit to 200 characters.
	watchTextBytes = 190
)

// Watches measures the time from the sending of a change, through the leader,
// to its arrival at each of n watchers of a node that does not lead: the
// commit is part of it. A system may leave out a change that was overtaken by
// the next; the last must arrive everywhere.
func Watches(ctx context.Context, c Watched, n int, w Window) (*Result, error) {
	leader, err := c.Leader(ctx)
	if err != nil {
		return nil, err
	}
	touch, done, err := c.Toucher(ctx, leader)
	if err != nil {
		return nil, err
	}
	defer done()
	begun := time.Now()
	changes := int(w.Measure.Seconds()*touchesPerSecond) + 1 // the first is a warm-up
	m := &deliveries{begun: begun, sent: make([]atomic.Int64, changes), got: make([][]time.Duration, n), last: make(chan struct{}, n)}
	wctx, cancel := context.WithCancel(ctx)
	wait, err := c.Watch(wctx, (leader+1)%Nodes, n, m.seen)
	if err != nil {
		cancel()
		return nil, err
	}
	err = m.touch(ctx, touch)
	if err == nil {
		err = m.drain(ctx)
	}
	cancel()
	if ended := wait(); err == nil {
		err = ended
	}
	if err != nil {
		return nil, err
	}
	var all []time.Duration
	for _, g := range m.got {
		all = append(all, g...)
	}
	r := newResult(all, w.Measure)
	return r, r.check()
}

// deliveries is who got what when.
type deliveries struct {
	begun time.Time
	sent  []atomic.Int64 // nanoseconds after begun
	got   [][]time.Duration
	last  chan struct{} // one for each watcher that got the last change
}

// seen is called by one goroutine per watcher.
func (d *deliveries) seen(watcher int, text string) {
	now := time.Since(d.begun)
	number, _, _ := strings.Cut(text, ".")
	n, err := strconv.Atoi(number)
	if err != nil || n >= len(d.sent) {
		return // of an earlier load
	}
	if n > 0 {
		d.got[watcher] = append(d.got[watcher], now-time.Duration(d.sent[n].Load()))
	}
	if n == len(d.sent)-1 {
		d.last <- struct{}{}
	}
}

func (d *deliveries) touch(ctx context.Context, touch func(context.Context, string) error) error {
	tick := time.NewTicker(time.Second / touchesPerSecond)
	defer tick.Stop()
	for n := range d.sent {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		text := fmt.Sprintf("%d.", n)
		text += strings.Repeat("x", watchTextBytes-len(text))
		d.sent[n].Store(int64(time.Since(d.begun)))
		cctx, cancel := context.WithTimeout(ctx, callTimeout)
		err := touch(cctx, text)
		cancel()
		if err != nil {
			return fmt.Errorf("change %d of what is watched: %w", n, err)
		}
	}
	return nil
}

func (d *deliveries) drain(ctx context.Context) error {
	over := time.After(watchDrain)
	for i := range d.got {
		select {
		case <-d.last:
		case <-over:
			return fmt.Errorf("%d of %d watchers did not get the last change within %s", len(d.got)-i, len(d.got), watchDrain)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}
