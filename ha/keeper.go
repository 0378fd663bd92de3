// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// ErrLapsed is what Guard.Extend returns (wrapped) when the guard will not
// extend that session any more: it has lapsed there, or a later one exists.
var ErrLapsed = errors.New("lease session has lapsed")

// Guard is what ha needs of the guard process. Deadlines are CLOCK_BOOTTIME.
type Guard interface {
	// Session returns the highest session that the guard has seen.
	Session(ctx context.Context) (uint64, error)
	// Extend sets the deadline of a session, or begins a new one.
	Extend(ctx context.Context, session uint64, deadline time.Duration) error
}

// Caller reaches the leader, which may be this node itself.
type Caller interface {
	CallLeader(ctx context.Context, method string, request []byte) ([]byte, error)
}

// Keeper keeps this node's lease.
type Keeper struct {
	nodeID string
	caller Caller
	guard  Guard
	log    *slog.Logger
	now    func() time.Duration
	wake   func() // called when the lease begins anew
	heard  func(revision uint64, at time.Time)

	mu       sync.Mutex
	session  uint64
	revision uint64 // a decision in this session needs a view of at least this
	deadline time.Duration
	asked    time.Duration // when a request that the network answered was sent; 0: none was yet
}

// KeeperConfig describes a keeper.
type KeeperConfig struct {
	NodeID string
	Caller Caller
	Guard  Guard
	Log    *slog.Logger
	Now    func() time.Duration // nil: BootTime
	// OnLease is called when a new lease session has begun.
	OnLease func()
	// Heard is told which revision the leader had, confirmed by a majority after
	// it was asked.
	Heard func(revision uint64, asked time.Time)
}

// NewKeeper returns a keeper without a lease.
func NewKeeper(c KeeperConfig) *Keeper {
	if c.Now == nil {
		c.Now = BootTime
	}
	if c.OnLease == nil {
		c.OnLease = func() {}
	}
	if c.Heard == nil {
		c.Heard = func(uint64, time.Time) {}
	}
	return &Keeper{nodeID: c.NodeID, caller: c.Caller, guard: c.Guard, log: c.Log, now: c.Now, wake: c.OnLease, heard: c.Heard}
}

// Current returns the lease session under which a VM may be started now, and
// the revision that the decision's view must have reached. The guard checks
// session and deadline once more, so that a decision that was delayed is
// refused.
func (k *Keeper) Current() (session, revision uint64, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.session, k.revision, k.session != 0 && k.now() < k.deadline
}

// Remaining returns how long the lease is still valid; negative when it is not.
func (k *Keeper) Remaining() time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.deadline - k.now()
}

// Run renews until the context ends.
func (k *Keeper) Run(ctx context.Context) error {
	tick := time.NewTicker(RenewEvery)
	defer tick.Stop()
	failing := false
	for {
		err := k.renew(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !failing:
			k.log.Warn("lease not renewed", "err", err, "remaining", max(0, k.Remaining()))
		case err == nil && failing:
			k.log.Info("lease renewed again")
		}
		failing = err != nil
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (k *Keeper) renew(ctx context.Context) error {
	rctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	sent, asked := k.now(), time.Now() // before anything else: the lease counts from here
	req, err := json.Marshal(renewRequest{NodeID: k.nodeID})
	if err != nil {
		return err
	}
	b, err := k.caller.CallLeader(rctx, MethodRenew, req)
	if err != nil {
		return err
	}
	var a renewAnswer
	if err := json.Unmarshal(b, &a); err != nil {
		return fmt.Errorf("renew lease: malformed answer: %w", err)
	}
	k.heard(a.Revision, asked)
	if err := k.extend(rctx, sent+LeaseDuration, a); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.asked = max(k.asked, sent)
	return nil
}

// unanswered returns for how long the network has renewed nothing, if the lease holds.
func (k *Keeper) unanswered() (since time.Duration, held bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.now() - k.asked, k.session != 0 && k.now() < k.deadline
}

// goOn continues the session that holds, from the moment at which that was asked for.
// One that has lapsed stays so: see DESIGN.md, "The storage heartbeat".
func (k *Keeper) goOn(ctx context.Context, sent time.Duration) error {
	k.mu.Lock()
	session, held := k.session, k.session != 0 && k.now() < k.deadline
	k.mu.Unlock()
	if !held {
		return ErrLapsed
	}
	if err := k.guard.Extend(ctx, session, sent+LeaseDuration); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.session == session {
		k.deadline = max(k.deadline, sent+LeaseDuration)
	}
	return nil
}

// extend passes the deadline to the guard. A session that lapsed is never
// taken up again: a new one begins, whose decisions need a view that contains
// whatever was decided while this node had no lease.
func (k *Keeper) extend(ctx context.Context, deadline time.Duration, a renewAnswer) error {
	k.mu.Lock()
	session := k.session
	lapsed := session == 0 || k.now() >= k.deadline
	k.mu.Unlock()
	if !lapsed {
		err := k.guard.Extend(ctx, session, deadline)
		if err == nil {
			k.mu.Lock()
			k.deadline = max(k.deadline, deadline)
			k.mu.Unlock()
			return nil
		}
		if !errors.Is(err, ErrLapsed) {
			return err
		}
	}
	seen, err := k.guard.Session(ctx)
	if err != nil {
		return err
	}
	// Later than those that the guard and this daemon know, and than those that both have
	// forgotten: a start in one of them may still be on its way from an earlier daemon. They
	// began earlier in the same life of the host, so the clock is above them.
	next := max(seen+1, session+1, uint64(k.now().Milliseconds())) //nolint:gosec // the time since the boot
	if err := k.guard.Extend(ctx, next, deadline); err != nil {
		return err
	}
	k.mu.Lock()
	k.session, k.revision, k.deadline = next, a.Revision, deadline
	k.mu.Unlock()
	k.log.Info("lease begun", "session", next, "rev", a.Revision, "term", a.Term)
	k.wake()
	return nil
}
