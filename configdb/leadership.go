// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"context"
	"sync"
	"time"
)

// barrierTimeout bounds the wait of a new leader for its own first entry.
const barrierTimeout = 10 * time.Second

// Leadership is one term in which this node leads.
type Leadership struct {
	// Term in which all decisions of this leadership must commit.
	Term uint64
	// Since is when this node learned that it had won, which is after the
	// votes were given: no earlier leader has been confirmed by a majority
	// since.
	Since time.Time
}

// leaderTracker knows whether this node leads and is ready to serve: it has
// applied everything that earlier leaders acknowledged.
type leaderTracker struct {
	mu      sync.Mutex
	current *Leadership
	changed chan struct{}
}

func newLeaderTracker() *leaderTracker {
	return &leaderTracker{changed: make(chan struct{})}
}

func (t *leaderTracker) set(l *Leadership) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.current == nil && l == nil {
		return
	}
	t.current = l
	close(t.changed)
	t.changed = make(chan struct{})
}

func (t *leaderTracker) get() (*Leadership, <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.current, t.changed
}

// track follows Raft until the context ends.
func (s *Store) track(ctx context.Context) {
	defer s.leading.set(nil)
	changes := s.node.LeaderChanges()
	check := time.NewTimer(0)
	defer check.Stop()
	for {
		select {
		case <-changes:
		case <-check.C:
		case <-ctx.Done():
			return
		}
		check.Reset(s.checkLeadership(ctx))
	}
}

// checkLeadership brings the tracker up to date and says when to look again: a
// barrier that failed must be tried again while Raft calls this node leader.
func (s *Store) checkLeadership(ctx context.Context) time.Duration {
	const idle, retry = 5 * time.Second, 50 * time.Millisecond
	if !s.node.IsLeader() {
		s.leading.set(nil)
		return idle
	}
	term, since := s.node.Term(), time.Now()
	if l, _ := s.leading.get(); l != nil && l.Term == term {
		return idle
	}
	s.leading.set(nil)
	if err := s.node.Barrier(barrierTimeout); err != nil {
		s.log.Debug("leadership lost before it was usable", "err", err)
		return retry
	}
	if ctx.Err() != nil || !s.node.IsLeader() || s.node.Term() != term {
		return retry
	}
	s.Heard(s.state.View().Revision(), since) // the barrier came after it
	s.leading.set(&Leadership{Term: term, Since: since})
	s.log.Info("this node leads", "term", term)
	return idle
}

// WhileLeader runs f each time this node becomes leader, with a context that
// ends when it no longer leads, until ctx ends. It waits for f to return.
func (s *Store) WhileLeader(ctx context.Context, f func(ctx context.Context, l Leadership)) error {
	for {
		l, changed := s.leading.get()
		if l == nil {
			select {
			case <-changed:
				continue
			case <-ctx.Done():
				return nil
			}
		}
		lctx, cancel := context.WithCancel(ctx)
		stop := make(chan struct{})
		go func() {
			defer close(stop)
			select {
			case <-changed:
				cancel()
			case <-lctx.Done():
			}
		}()
		f(lctx, *l)
		if lctx.Err() == nil {
			// f ended by itself; do not run it again in the same term.
			select {
			case <-changed:
			case <-ctx.Done():
			}
		}
		cancel()
		<-stop
		if ctx.Err() != nil {
			return nil
		}
	}
}
