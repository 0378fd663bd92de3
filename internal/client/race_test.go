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

func TestADeadFirstServerCostsOneShortDelay(t *testing.T) {
	ok := func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "{}") }
	var dead, late, connects atomic.Int32
	c := serve(t, ok, ok, ok)
	blackhole(c.endpoints[0], &dead)
	blackhole(c.endpoints[2], &late)
	real := c.endpoints[1].connect
	c.endpoints[1].connect = func(ctx context.Context) (net.Conn, error) { connects.Add(1); return real(ctx) }
	began := time.Now()
	for range 3 {
		if _, err := c.Call(t.Context(), http.MethodGet, "/cluster", nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	if d := time.Since(began); d < raceDelay || d > dialTimeout/2 {
		t.Errorf("three calls took %s", d)
	}
	if c.good.Load() != 1 || dead.Load() != 1 || late.Load() != 0 || connects.Load() != 1 {
		t.Errorf("good server %d; connects: dead %d, living %d, last %d", c.good.Load(), dead.Load(), connects.Load(), late.Load())
	}
}

func TestAServerThatRefusesCostsNoDelay(t *testing.T) {
	ok := func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "{}") }
	c := serve(t, ok, ok)
	c.endpoints[0].connect = func(context.Context) (net.Conn, error) { return nil, errors.New("no route") }
	tick := time.Now()
	won, failed := c.race(t.Context())
	if won.at != 1 || won.conn == nil || len(failed) != 1 || time.Since(tick) >= raceDelay {
		t.Fatalf("won %+v, failed %v after %s", won, failed, time.Since(tick))
	}
	_ = won.conn.Close()
}

func TestARaceWithoutWinnerEndsAndIsRunAgain(t *testing.T) {
	var dials atomic.Int32
	ok := func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "{}") }
	c := serve(t, ok, ok)
	living := c.endpoints[1].connect
	blackhole(c.endpoints[0], &dials)
	blackhole(c.endpoints[1], &dials)
	ctx, cancel := context.WithTimeout(t.Context(), 2*raceDelay)
	defer cancel()
	if _, err := c.Call(ctx, http.MethodPost, "/vms", nil, nil); api.CodeOf(err) != CodeUnavailable || dials.Load() != 2 {
		t.Errorf("error %v after %d connects", err, dials.Load())
	}
	c.endpoints[1].connect = living
	if _, err := c.Call(t.Context(), http.MethodPost, "/vms", nil, nil); err != nil {
		t.Error(err)
	}
	stop, end := context.WithCancel(t.Context())
	end()
	c = serve(t, ok, ok)
	if _, err := c.Call(stop, http.MethodGet, "/vms", nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled call: %v", err)
	}
}
