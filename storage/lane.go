// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/contain"
)

// Limits of the calls into one pool's file system.
const (
	// maxWorkCalls is how many calls of one pool may run, or hang, at a time.
	maxWorkCalls = 16
	// checkDeadline is how long the check of a pool may take.
	checkDeadline = 10 * time.Second
	// callDeadline is how long one read, write, link or unlink may take. It is
	// generous because a write may have to wait for a busy disk.
	callDeadline = 60 * time.Second
)

// lane runs calls that may hang in the kernel, where no context reaches them.
type lane struct {
	what  string // for the error, such as: pool "nfs" at /srv/vm
	slots chan struct{}
	began atomic.Pointer[time.Time] // the newest call, unless one has ended since
}

func newLane(what string, slots int) *lane {
	return &lane{what: what, slots: make(chan struct{}, slots)}
}

func (l *lane) hung(deadline time.Duration) error {
	return api.Errorf(api.CodeTimeout, "%s: the file system has not answered for %s; check that its disk or server is reachable", l.what, deadline)
}

// call runs f in a goroutine of its own and waits for it until the deadline or
// the context's end. A call that hangs keeps its slot until the kernel lets it
// go; its late result is dropped, so f must own everything it touches.
func call[T any](ctx context.Context, l *lane, deadline time.Duration, f func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	var none T
	timer := time.NewTimer(deadline)
	defer timer.Stop()
	select {
	case l.slots <- struct{}{}:
	case <-timer.C:
		return none, l.hung(deadline)
	case <-ctx.Done():
		return none, context.Cause(ctx)
	}
	now := time.Now()
	l.began.Store(&now)
	done := make(chan result, 1)
	go func() {
		var v T
		err := contain.Call(func() (err error) { v, err = f(); return err })
		l.began.Store(nil)
		<-l.slots // before the result: who has it must not find the lane busy
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-timer.C:
		return none, l.hung(deadline)
	case <-ctx.Done():
		return none, context.Cause(ctx)
	}
}

// do is call for functions without a result.
func (l *lane) do(ctx context.Context, deadline time.Duration, f func() error) error {
	_, err := call(ctx, l, deadline, func() (struct{}, error) { return struct{}{}, f() })
	return err
}

// attempt is do for what must not be done late, such as the removal of a file: f asks
// wanted right before that, which is an error once nobody waits for f any more.
func (l *lane) attempt(ctx context.Context, deadline time.Duration, f func(wanted func() error) error) error {
	var abandoned atomic.Bool
	defer abandoned.Store(true)
	return l.do(ctx, deadline, func() error {
		return f(func() error {
			if abandoned.Load() {
				return api.Errorf(api.CodeTimeout, "%s: the file system answered after the attempt was given up", l.what)
			}
			return nil
		})
	})
}

// hangs reports whether every slot is taken by a call that has had the deadline. One
// that was given up before, by the end of its context, may be about to end.
func (l *lane) hangs(deadline time.Duration) bool {
	began := l.began.Load()
	return len(l.slots) == cap(l.slots) && began != nil && time.Since(*began) >= deadline
}
