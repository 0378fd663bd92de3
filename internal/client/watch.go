// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package client

import (
	"context"
	"encoding/json"
	"errors"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
)

// The types of events.
const (
	EventPut    = "put"
	EventDelete = "delete"
	EventSynced = "synced"
	EventRelist = "relist"
)

// Event is one line of a watch. Raw is the JSON as the server sent it.
type Event struct {
	Type     string          `json:"type"`
	Kind     api.Kind        `json:"kind,omitempty"`
	ID       string          `json:"id,omitempty"`
	Object   json.RawMessage `json:"object,omitempty"`
	Revision uint64          `json:"revision"`
	Raw      []byte          `json:"-"`
}

// WatchOptions say what to watch.
type WatchOptions struct {
	Kinds []api.Kind // all that the role may see when empty
	Since uint64     // 0: the whole set first
	// MaxOutage is how long no server may answer before the watch fails.
	MaxOutage time.Duration
}

const (
	reconnectFirst = 200 * time.Millisecond
	reconnectMost  = 2 * time.Second
)

// Watch calls deliver for every event until ctx ends, deliver fails or no
// server has answered for MaxOutage. After a lost connection it goes on at
// another node where it left off.
func (c *Client) Watch(ctx context.Context, o WatchOptions, deliver func(Event) error) error {
	p := position{since: o.Since}
	wait := reconnectFirst
	lost := time.Now()
	for {
		connected, err := c.watchOnce(ctx, o, &p, deliver)
		var stop stopError
		switch {
		case errors.As(err, &stop):
			return stop.error
		case ctx.Err() != nil:
			return ctx.Err()
		case connected:
			wait, lost = reconnectFirst, time.Now()
			c.notify("watch: connection lost; reconnecting")
		case !unreachable(err) || time.Since(lost) > o.MaxOutage:
			return err
		}
		if !pause(ctx, wait) {
			return ctx.Err()
		}
		wait = min(2*wait, reconnectMost)
	}
}

// stopError marks the error of deliver, which ends the watch.
type stopError struct{ error }

// unreachable reports whether an error may pass by itself.
func unreachable(err error) bool {
	var p *Problem
	if errors.As(err, &p) {
		return passOver(p)
	}
	return api.CodeOf(err) == CodeUnavailable
}

func (c *Client) watchOnce(ctx context.Context, o WatchOptions, p *position, deliver func(Event) error) (connected bool, err error) {
	q := url.Values{}
	kinds := make([]string, len(o.Kinds))
	for i, k := range o.Kinds {
		kinds[i] = string(k)
	}
	if len(kinds) > 0 {
		q.Set("kinds", strings.Join(kinds, ","))
	}
	if p.since > 0 {
		q.Set("since", strconv.FormatUint(p.since, 10))
	}
	s, err := c.dial(ctx, "/watch", q, watchFrame)
	if err != nil {
		return false, err
	}
	defer s.close()
	if p.restart {
		// The first set was cut off: what was delivered of it is void.
		p.restart = false
		if err := deliver(relistEvent()); err != nil {
			return true, stopError{err}
		}
	}
	for {
		b, err := s.read(ctx)
		if err != nil {
			p.cutOff()
			return true, err
		}
		e := Event{Raw: b}
		if err := json.Unmarshal(b, &e); err != nil {
			return true, stopError{api.Errorf(api.CodeInternal, "decode an event of node %s: %w", s.node, err)}
		}
		if p.seen(&e) {
			continue
		}
		if err := deliver(e); err != nil {
			return true, stopError{err}
		}
		c.sawRevision(e.Revision)
	}
}

func relistEvent() Event {
	return Event{Type: EventRelist, Raw: []byte(`{"type":"relist","revision":0}`)}
}

// position is what a watch has delivered. Events come in order of revision
// once the first set is complete, but several may share one; so a resumed
// watch asks from the revision before the last and passes over what it knows.
type position struct {
	since   uint64 // every event up to here was delivered
	last    uint64 // the revision of the last event
	known   map[string]bool
	began   bool // some event was delivered
	listing bool // inside a set that Synced will end
	restart bool
}

// seen notes an event and reports whether it was delivered before.
func (p *position) seen(e *Event) bool {
	if !p.began {
		p.began, p.listing = true, p.since == 0
	}
	switch e.Type {
	case EventRelist:
		p.since, p.last, p.known, p.listing = 0, 0, nil, true
		return false
	case EventSynced:
		if p.listing {
			p.since, p.last, p.known, p.listing = e.Revision, e.Revision, nil, false
			return false
		}
		return p.last > 0 // after a resume the mark says nothing new
	}
	if p.listing {
		return false
	}
	id := e.ID
	if len(e.Object) > 0 {
		id = MetaOf(e.Object).ID
	}
	key := e.Type + "/" + string(e.Kind) + "/" + id
	if e.Revision == p.last && p.known[key] {
		return true
	}
	if e.Revision > p.last {
		p.since, p.last, p.known = max(p.last, p.since), e.Revision, map[string]bool{}
	}
	if e.Revision == p.last {
		if p.known == nil {
			p.known = map[string]bool{}
		}
		p.known[key] = true
	}
	return false
}

// cutOff is called when the connection is lost.
func (p *position) cutOff() {
	if p.listing && p.began {
		p.since, p.last, p.known, p.began, p.listing, p.restart = 0, 0, nil, false, false, true
	}
}
