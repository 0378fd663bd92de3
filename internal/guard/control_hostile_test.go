// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package guard

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"
)

// ended waits until the connection has ended.
func ended(t *testing.T, c *Client) {
	t.Helper()
	select {
	case <-c.Done():
	case <-time.After(15 * time.Second):
		t.Fatal("the connection did not end")
	}
}

// A daemon that took control, or the one after it, has asked what runs and acts on
// that: it may tell the cluster that a VM is stopped. What an earlier connection
// still has on its way must not follow.
func TestWhoHadControlIsEnded(t *testing.T) {
	r := newRig(t)
	ctx := testCtx(t)
	wantErr(t, r.Control(ctx), nil)
	wantErr(t, r.Control(ctx), nil) // takes nothing from itself
	wantErr(t, r.start("a", 1, true), nil)
	hold := make(chan struct{})
	r.procs.set(func() { r.procs.hold = hold })
	begun := make(chan error, 1)
	go func() { begun <- r.start("b", 1, true) }()
	<-r.procs.forked

	now := dial(t, r.dir)
	wantErr(t, now.Control(ctx), nil)
	ended(t, r.Client)
	wantErr(t, <-begun, ErrClosed)

	// What was begun before is seen, and goes on.
	if rec := record(t, now, "b"); rec.State != StateStarting {
		t.Errorf("%+v", rec)
	}
	close(hold)
	for _, vm := range []string{"a", "b"} {
		eventually(t, vm+" runs", func() bool { return record(t, now, vm).State == StateRunning })
	}
	if _, err := now.Start(ctx, startReq("c", 1, true)); err != nil {
		t.Error(err)
	}
}

// Connections that never had control are nobody's business.
func TestControlLeavesOthersAlone(t *testing.T) {
	r := newRig(t)
	ctx := testCtx(t)
	for range 3 { // one after the other, each gone before the next
		c := dial(t, r.dir)
		wantErr(t, c.Control(ctx), nil)
		wantErr(t, c.Close(), nil)
	}
	wantErr(t, r.start("a", 1, true), nil)
	c := dial(t, r.dir)
	wantErr(t, c.Control(ctx), nil)
	if _, err := r.Kill(ctx, "a"); err != nil {
		t.Error(err)
	}
}

// What a connection sent last, a start above all, is begun before control is taken, or never.
func TestAStartOnItsWayIsBegunBeforeControlIsTakenOrNever(t *testing.T) {
	running := func(t *testing.T, c *Client) any { return record(t, c, "a").State == StateRunning }
	tests := []struct {
		name string
		// request is what the earlier connection sends; each round has another one.
		op      op
		request func(r *rig, round int) any
		seen    func(t *testing.T, c *Client) any // what the later one relies on
	}{
		{
			"start", opStart, func(*rig, int) any { return startReq("late", 1, true) },
			func(t *testing.T, c *Client) any { return record(t, c, "late").VM != "" },
		},
		{"kill", opKill, func(*rig, int) any { return vmBody{"a"} }, running},
		{
			"protect off", opProtect, func(*rig, int) any { return protectBody{"a", false} },
			func(t *testing.T, c *Client) any { return record(t, c, "a").Protected },
		},
		{
			"extend", opExtend, func(r *rig, round int) any {
				return extendBody{1, r.clock.NowNS() + 20*sec + int64(round)}
			},
			func(t *testing.T, c *Client) any {
				h, err := c.Hello(testCtx(t))
				wantErr(t, err, nil)
				return h.DeadlineNS
			},
		},
		{
			"forget", opForget, func(*rig, int) any { return vmBody{"gone"} },
			func(t *testing.T, c *Client) any { return record(t, c, "gone").VM != "" },
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t)
			ctx := testCtx(t)
			conns := func(n int) func() bool {
				return func() bool {
					r.s.mu.Lock()
					defer r.s.mu.Unlock()
					return len(r.s.conns) == n
				}
			}
			done := 0
			for round := range 50 {
				for _, vm := range []string{"a", "gone", "late"} { // as at first
					_, err := r.Kill(ctx, vm)
					wantErr(t, err, nil)
					wantErr(t, r.Forget(ctx, vm), nil)
				}
				wantErr(t, r.start("a", 1, true), nil)
				wantErr(t, r.start("gone", 1, true), nil)
				_, err := r.Kill(ctx, "gone")
				wantErr(t, err, nil)
				line, err := requestLine(7, tt.op, tt.request(r, round))
				wantErr(t, err, nil)
				first := tt.seen(t, r.Client)

				before, next := dial(t, r.dir), dial(t, r.dir)
				wantErr(t, before.Control(ctx), nil)
				if _, err := before.c.Write(line); err != nil {
					t.Fatal(err)
				}
				wantErr(t, next.Control(ctx), nil)
				then := tt.seen(t, next)
				ended(t, before)
				// What would come late comes when the guard reads on, before it ends the connection.
				eventually(t, "the guard is through with the connection", conns(2))
				if later := tt.seen(t, next); later != then {
					t.Fatalf("round %d: %v after control was taken, and %v later", round, then, later)
				}
				if then != first {
					done++
				}
				wantErr(t, next.Close(), nil)
				eventually(t, "the connection is gone", conns(1))
			}
			t.Logf("done before: %d of 50", done)
		})
	}
}

// Whatever it asks: who has lost control is refused.
func TestWhoHadControlIsRefusedEverything(t *testing.T) {
	r := newRig(t)
	ctx := testCtx(t)
	wantErr(t, r.start("a", 1, true), nil)
	wantErr(t, r.start("gone", 1, true), nil)
	_, err := r.Kill(ctx, "gone")
	wantErr(t, err, nil)
	before, err := r.List(ctx)
	wantErr(t, err, nil)
	for _, tt := range []struct {
		op   op
		body any
	}{
		{opHello, nil}, {opExtend, extendBody{1, r.clock.NowNS() + 20*sec}}, {opStart, startReq("b", 1, true)},
		{opKill, vmBody{"a"}}, {opKill, vmBody{"unknown"}}, {opProtect, protectBody{"a", false}}, {opList, nil},
		{opForget, vmBody{"gone"}}, {opWatch, nil}, {opControl, nil}, {opStop, nil},
	} {
		line, err := requestLine(7, tt.op, tt.body)
		wantErr(t, err, nil)
		cn := &conn{s: r.s, out: newOutQueue(), slots: make(chan struct{}, MaxInFlight), superseded: true}
		cn.handle(line[:len(line)-1])
		cn.waiting.Wait()
		answer, _ := cn.out.next()
		var h head
		if err := json.Unmarshal(answer, &h); err != nil || h.ID != 7 || h.OK || h.Code != CodeSuperseded {
			t.Errorf("%s is answered with %s", tt.op, answer)
		}
	}
	// And nothing was done.
	after, err := r.List(ctx)
	wantErr(t, err, nil)
	if !reflect.DeepEqual(before, after) {
		t.Errorf("%+v became %+v", before, after)
	}
	h, err := r.Hello(ctx)
	wantErr(t, err, nil)
	if h.DeadlineNS != r.clock.NowNS()+10*sec {
		t.Errorf("the deadline was moved to %d", h.DeadlineNS)
	}
}
