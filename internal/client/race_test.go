// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/muster-vm/muster/api"
)

// blackhole makes a server behave like a host without power: a connect hangs.
func blackhole(e *endpoint, dials *atomic.Int32) {
	e.connect = func(ctx context.Context) (net.Conn, error) {
		dials.Add(1)
		<-ctx.Done()
		return nil, ctx.Err()
	}
}

// slow makes a server whose connects take that long, by the clock of a bubble.
func slow(e *endpoint, after time.Duration, dials *atomic.Int32) {
	e.connect = func(ctx context.Context) (net.Conn, error) {
		dials.Add(1)
		select {
		case <-time.After(after):
			conn, _ := net.Pipe()
			return conn, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// unsettled is a client of servers that are not there, for a bubble, in which real ones
// would hold up the clock.
func unsettled(t *testing.T, servers int) *Client {
	t.Helper()
	var cfg Config
	for i := range servers {
		cfg.Servers = append(cfg.Servers, fmt.Sprintf("https://m%d:7600", i+1))
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func empty(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "{}") }

func TestADeadFirstServerCostsOneShortDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dead, living, late atomic.Int32
		c := unsettled(t, 3)
		blackhole(c.endpoints[0], &dead)
		slow(c.endpoints[1], raceDelay-time.Millisecond, &living)
		blackhole(c.endpoints[2], &late)
		began := time.Now()
		won, failed := c.race(t.Context())
		if took := time.Since(began); won.at != 1 || won.conn == nil || len(failed) > 0 || took != 2*raceDelay-time.Millisecond {
			t.Fatalf("won %+v, failed %v after %s", won, failed, took)
		}
		_ = won.conn.Close()
		if dead.Load() != 1 || living.Load() != 1 || late.Load() != 0 {
			t.Errorf("connects: dead %d, living %d, last %d", dead.Load(), living.Load(), late.Load())
		}
	})
}

func TestTheServerThatConnectedIsKept(t *testing.T) {
	var dead, connects atomic.Int32
	c := serve(t, empty, empty)
	blackhole(c.endpoints[0], &dead)
	real := c.endpoints[1].connect
	c.endpoints[1].connect = func(ctx context.Context) (net.Conn, error) { connects.Add(1); return real(ctx) }
	for range 3 {
		if _, err := c.Call(t.Context(), http.MethodGet, "/cluster", nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	if c.good.Load() != 1 || dead.Load() != 1 || connects.Load() != 1 {
		t.Errorf("good server %d; connects: dead %d, living %d", c.good.Load(), dead.Load(), connects.Load())
	}
}

func TestAServerThatRefusesCostsNoDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dials atomic.Int32
		c := unsettled(t, 2)
		c.endpoints[0].connect = func(context.Context) (net.Conn, error) { return nil, errors.New("no route") }
		slow(c.endpoints[1], 0, &dials)
		began := time.Now()
		won, failed := c.race(t.Context())
		if took := time.Since(began); won.at != 1 || won.conn == nil || len(failed) != 1 || took != 0 {
			t.Fatalf("won %+v, failed %v after %s", won, failed, took)
		}
		_ = won.conn.Close()
	})
}

func TestARaceWithoutWinnerEndsAndIsRunAgain(t *testing.T) {
	var dials atomic.Int32
	c := serve(t, empty, empty)
	living := c.endpoints[1].connect
	blackhole(c.endpoints[0], &dials)
	blackhole(c.endpoints[1], &dials)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 2*raceDelay)
		defer cancel()
		if _, err := c.Call(ctx, http.MethodPost, "/vms", nil, nil); api.CodeOf(err) != CodeUnavailable || dials.Load() != 2 {
			t.Errorf("error %v after %d connects", err, dials.Load())
		}
	})
	c.endpoints[1].connect = living
	if _, err := c.Call(t.Context(), http.MethodPost, "/vms", nil, nil); err != nil {
		t.Error(err)
	}
	stop, end := context.WithCancel(t.Context())
	end()
	c = serve(t, empty, empty)
	if _, err := c.Call(stop, http.MethodGet, "/vms", nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled call: %v", err)
	}
}
