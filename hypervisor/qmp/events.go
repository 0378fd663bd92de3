// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package qmp

import (
	"context"
	"sync"

	goqmp "github.com/digitalocean/go-qemu/qmp"
)

// MaxQueuedEvents bounds what one subscriber may leave unread.
const MaxQueuedEvents = 256

// EventsLost is the name of the event that the channel of Events carries in
// place of events that were dropped; its data has their number as "count".
const EventsLost = "MUSTER_EVENTS_LOST"

// Subscription is one reader's bounded queue of events.
type Subscription struct {
	conn *Conn

	mu    sync.Mutex
	queue []goqmp.Event
	lost  uint64 // since the last Next
	total uint64
	wake  chan struct{} // holds one token while there is something to read
}

// Subscribe returns a queue of the events from now on. Close it after use.
func (c *Conn) Subscribe() *Subscription {
	s := &Subscription{conn: c, wake: make(chan struct{}, 1)}
	c.mu.Lock()
	c.subs[s] = struct{}{}
	c.mu.Unlock()
	return s
}

// Close ends the subscription. It must not be called while Next runs with a
// context that never ends: that Next would wait for the connection's end.
func (s *Subscription) Close() {
	s.conn.mu.Lock()
	delete(s.conn.subs, s)
	s.conn.mu.Unlock()
}

// Next returns the oldest unread event. lost is how many events before it were
// dropped; if it is not zero the state of QEMU must be asked for. After the end
// of the connection what is queued is still delivered, then the error is the
// connection's.
func (s *Subscription) Next(ctx context.Context) (e goqmp.Event, lost uint64, err error) {
	for {
		if e, lost, ok := s.pop(); ok {
			return e, lost, nil
		}
		select {
		case <-s.wake:
		case <-ctx.Done():
			return e, 0, context.Cause(ctx)
		case <-s.conn.done:
			// The reader pushes before it closes done, so one more look is final.
			if e, lost, ok := s.pop(); ok {
				return e, lost, nil
			}
			return e, 0, s.conn.Err()
		}
	}
}

// Dropped returns how many events this subscriber lost in all.
func (s *Subscription) Dropped() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.total
}

func (s *Subscription) pop() (e goqmp.Event, lost uint64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == 0 {
		return e, 0, false
	}
	e, lost = s.queue[0], s.lost
	s.queue = s.queue[1:]
	s.lost = 0
	return e, lost, true
}

func (s *Subscription) push(e goqmp.Event) {
	s.mu.Lock()
	if len(s.queue) >= MaxQueuedEvents {
		s.queue = s.queue[1:]
		s.lost++
		s.total++
	}
	s.queue = append(s.queue, e)
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Events implements go-qemu's Monitor: a channel of events that is closed when
// the context or the connection ends. An event named EventsLost stands for
// those that were dropped because the channel was not read.
func (c *Conn) Events(ctx context.Context) (<-chan goqmp.Event, error) {
	s := c.Subscribe()
	out := make(chan goqmp.Event)
	go func() {
		defer close(out)
		defer s.Close()
		for {
			e, lost, err := s.Next(ctx)
			if err != nil {
				return
			}
			if lost > 0 {
				mark := goqmp.Event{Event: EventsLost, Data: map[string]any{"count": lost}}
				mark.Timestamp = e.Timestamp
				if !send(ctx, out, mark) {
					return
				}
			}
			if !send(ctx, out, e) {
				return
			}
		}
	}()
	return out, nil
}

func send(ctx context.Context, out chan<- goqmp.Event, e goqmp.Event) bool {
	select {
	case out <- e:
		return true
	case <-ctx.Done():
		return false
	}
}

// Event is go-qemu's event, under a name that other packages may use.
type Event = goqmp.Event
