// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package agent

import (
	"context"
	"time"
)

// MinMissed is how many questions must have found no answer before silence means
// anything: one alone may have met a busy host.
const MinMissed = 2

// hear takes note of what became of a question. One that was broken off from here
// says nothing about the agent.
func (a *Agent) hear(brokenOff, answered bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.cfg.Now()
	a.asked = now
	switch {
	case !a.open || brokenOff:
	case answered:
		a.heard, a.missed = now, 0
	default:
		a.missed++
	}
}

// Silence returns when the agent was heard last, and how many questions found no
// answer since. The time is zero before its first answer on an open channel: a
// guest that boots, or has ended its agent, is not silent.
func (a *Agent) Silence() (since time.Time, missed int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.heard, a.missed
}

// Rest lets the silence count from now on, because the guest stood still.
func (a *Agent) Rest() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.missed = 0; !a.heard.IsZero() {
		a.heard = a.cfg.Now()
	}
}

// BeatDue reports whether the agent, which answered before, has not been asked
// anything for so long.
func (a *Agent) BeatDue(every time.Duration) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.open && !a.closed && !a.heard.IsZero() && a.cfg.Now().Sub(a.asked) >= every
}

// Beat asks the agent whether it is there, and nothing else (guest-sync-delimited).
func (a *Agent) Beat(ctx context.Context) error {
	return a.session(ctx, func(context.Context, *conn) error { return nil })
}
