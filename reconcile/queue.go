// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package reconcile

import (
	"context"
	"sync"
	"time"
)

// queue holds each id at most once and hands it to one worker at a time.
type queue struct {
	// pause is the least time between a failed call and the next: what failed may
	// itself have made the change that asks for another look.
	pause time.Duration
	mu    sync.Mutex
	ready []string
	state map[string]*slot
	wake  chan struct{} // holds one token while ready is not empty
}

type slot struct {
	queued, running, again bool
	failures               int
	timer                  *time.Timer
	due                    time.Time // of timer
}

func newQueue(pause time.Duration) *queue {
	return &queue{pause: pause, state: map[string]*slot{}, wake: make(chan struct{}, 1)}
}

func (q *queue) slot(id string) *slot {
	s := q.state[id]
	if s == nil {
		s = &slot{}
		q.state[id] = s
	}
	return s
}

// add asks for a look now.
func (q *queue) add(id string) { q.put(id, false) }

// changed asks for a look after a change of the database: now, or after the
// pause if the last call failed.
func (q *queue) changed(id string) { q.put(id, true) }

func (q *queue) put(id string, patient bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	s := q.slot(id)
	if patient && s.failures > 0 && s.timer != nil {
		if time.Until(s.due) > q.pause {
			q.later(id, s, q.pause)
		}
		return
	}
	if s.timer != nil {
		s.timer.Stop()
		s.timer = nil
	}
	switch {
	case s.running:
		s.again = true
	case !s.queued:
		s.queued = true
		q.ready = append(q.ready, id)
		q.signal()
	}
}

func (q *queue) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// take returns the next id, or false when the context ended.
func (q *queue) take(ctx context.Context) (string, bool) {
	for {
		if id, ok := q.tryTake(); ok {
			return id, true
		}
		select {
		case <-q.wake:
		case <-ctx.Done():
			return "", false
		}
	}
}

func (q *queue) tryTake() (string, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.ready) == 0 {
		return "", false
	}
	id := q.ready[0]
	q.ready = q.ready[1:]
	if len(q.ready) > 0 {
		q.signal()
	}
	s := q.state[id]
	s.queued, s.running, s.again = false, true, false
	return id, true
}

// finish ends a call; after > 0 asks for another one later.
func (q *queue) finish(id string, after time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	s := q.state[id]
	s.running = false
	switch {
	case s.again && s.failures > 0 && after > 0:
		q.later(id, s, min(after, q.pause))
	case s.again:
		s.queued = true
		q.ready = append(q.ready, id)
		q.signal()
	case after > 0:
		q.later(id, s, after)
	case s.failures == 0:
		delete(q.state, id)
	}
}

// later is called with the lock held.
func (q *queue) later(id string, s *slot, after time.Duration) {
	if s.timer != nil {
		s.timer.Stop()
	}
	s.due = time.Now().Add(after)
	s.timer = time.AfterFunc(after, func() { q.add(id) })
}

// failed counts one more failure and returns how many there were before.
func (q *queue) failed(id string) int {
	q.mu.Lock()
	defer q.mu.Unlock()
	s := q.state[id]
	s.failures++
	return s.failures - 1
}

func (q *queue) succeeded(id string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.state[id].failures = 0
}

// rest is called when no worker runs: what waited for a later look is due at
// the beginning of the next run.
func (q *queue) rest() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for id, s := range q.state {
		if s.timer != nil {
			s.timer.Stop()
			s.timer = nil
		}
		s.failures, s.again, s.running = 0, false, false
		if !s.queued {
			s.queued = true
			q.ready = append(q.ready, id)
		}
	}
	if len(q.ready) > 0 {
		q.signal()
	}
}
