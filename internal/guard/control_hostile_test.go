// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package guard

import "testing"

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
	<-r.Done()
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

// The start that a connection sent last is begun before control is taken, or never.
func TestAStartOnItsWayIsBegunBeforeControlIsTakenOrNever(t *testing.T) {
	r := newRig(t)
	ctx := testCtx(t)
	line, err := requestLine(7, opStart, startReq("late", 1, true))
	if err != nil {
		t.Fatal(err)
	}
	begun := 0
	for range 50 {
		before := dial(t, r.dir)
		wantErr(t, before.Control(ctx), nil)
		next := dial(t, r.dir)
		if _, err := before.c.Write(line); err != nil {
			t.Fatal(err)
		}
		wantErr(t, next.Control(ctx), nil)
		there := record(t, next, "late").VM != ""
		<-before.Done()
		_ = before.Close()
		if !there {
			// What would come late comes when the guard reads on, before it ends the connection.
			eventually(t, "the guard is through with the connection", func() bool {
				r.s.mu.Lock()
				defer r.s.mu.Unlock()
				return len(r.s.conns) == 2
			})
			if rec := record(t, next, "late"); rec.VM != "" {
				t.Fatalf("%+v was not there before", rec)
			}
		} else {
			begun++
			if _, err := next.Kill(ctx, "late"); err != nil {
				t.Fatal(err)
			}
			wantErr(t, next.Forget(ctx, "late"), nil)
		}
		wantErr(t, next.Close(), nil)
		eventually(t, "the connection is gone", func() bool {
			r.s.mu.Lock()
			defer r.s.mu.Unlock()
			return len(r.s.conns) == 1
		})
	}
	t.Logf("begun: %d of 50", begun)
}
