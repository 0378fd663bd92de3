// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package client

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"time"
)

// raceDelay is how long a server may take to connect before the next one is
// tried beside it. A host in the same network answers within a few
// milliseconds; one that lost its power does not answer at all.
const raceDelay = 300 * time.Millisecond

// raceResult is the end of one connect.
type raceResult struct {
	at   int
	conn net.Conn
	err  error
}

// settle finds a server that takes connections before the first request: the
// first one of the list unless it is slow or dead. Nothing is sent yet, so any
// request may be raced. It returns why each server failed if none connected,
// which takes at most the delays and one dialTimeout; the next request then
// tries again.
func (c *Client) settle(ctx context.Context) attempts {
	if len(c.endpoints) < 2 || c.settled.Load() {
		return nil
	}
	select {
	case c.settling <- struct{}{}:
		defer func() { <-c.settling }()
	case <-ctx.Done():
		return attempts{{server: c.endpoints[0].name, err: ctx.Err()}}
	}
	if c.settled.Load() {
		return nil // another goroutine has done it meanwhile
	}
	won, failed := c.race(ctx)
	if won.conn == nil {
		return failed
	}
	c.endpoints[won.at].keep(won.conn)
	c.good.Store(int32(won.at))
	c.settled.Store(true)
	if won.at > 0 && len(failed) == 0 {
		c.notify(fmt.Sprintf("%s: slow to connect; using %s", c.endpoints[0].name, c.endpoints[won.at].name))
	}
	return nil
}

// race connects to one server after the other, without waiting for the end of
// the connects before, and returns the first connection.
func (c *Client) race(ctx context.Context) (raceResult, attempts) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan raceResult, len(c.endpoints))
	errs := make([]error, len(c.endpoints))
	started, running := 0, 0
	start := func() {
		if started == len(c.endpoints) {
			return
		}
		at := started
		started, running = started+1, running+1
		go func() {
			conn, err := c.endpoints[at].connect(ctx)
			results <- raceResult{at: at, conn: conn, err: err}
		}()
	}
	delay := cmp.Or(c.cfg.RaceDelay, raceDelay)
	ticker := time.NewTicker(delay)
	defer ticker.Stop()
	for start(); running > 0; {
		select {
		case <-ticker.C:
			start()
		case r := <-results:
			running--
			if r.err == nil {
				go discard(results, running)
				return r, failures(c.endpoints, errs)
			}
			errs[r.at] = r.err
			if ctx.Err() != nil {
				continue
			}
			if r.at < len(c.endpoints)-1 {
				c.notify(fmt.Sprintf("%s: %s; trying the next server", c.endpoints[r.at].name, brief(r.err)))
			}
			ticker.Reset(delay)
			start()
		}
	}
	return raceResult{}, failures(c.endpoints, errs)
}

// discard closes what connects too late. The connects have been cancelled, so
// it ends at once.
func discard(results <-chan raceResult, n int) {
	for range n {
		if r := <-results; r.err == nil {
			_ = r.conn.Close()
		}
	}
}

func failures(endpoints []*endpoint, errs []error) attempts {
	var out attempts
	for i, err := range errs {
		if err != nil {
			out = append(out, attemptError{server: endpoints[i].name, err: err})
		}
	}
	return out
}

// keep stores a connection for the next dial of the endpoint.
func (e *endpoint) keep(conn net.Conn) {
	if old := e.spare.Swap(&conn); old != nil {
		_ = (*old).Close()
	}
}

// take returns the stored connection, nil if there is none.
func (e *endpoint) take() net.Conn {
	if conn := e.spare.Swap(nil); conn != nil {
		return *conn
	}
	return nil
}
