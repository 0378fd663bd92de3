// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package powersim

import (
	"sync"
	"time"
)

// Host is the machine behind a controller.
type Host struct {
	mu       sync.Mutex
	on       bool
	commands []string
	mood     Mood
	cut      func()
	dying    int // readings until it goes off; 0: it stays as it is
}

// Mood is how a controller behaves.
type Mood struct {
	// Deaf: it answers nothing.
	Deaf bool
	// Lies: it takes commands and does nothing.
	Lies bool
	// Refuses: it answers commands with an error.
	Refuses bool
	// Late delays each answer.
	Late time.Duration
	// SeenOnFor is how many readings after the command still find the host on.
	SeenOnFor int
	// ComesBack: the host is on again after it was seen off once, as one with
	// "power restore: always on" or an eager person beside it.
	ComesBack bool
}

// NewHost returns a host that is on. cut is called when it is switched off; it
// may be nil.
func NewHost(cut func()) *Host { return &Host{on: true, cut: cut} }

// Behave sets the mood.
func (h *Host) Behave(m Mood) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.mood = m
}

// Mood returns it.
func (h *Host) Mood() Mood {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.mood
}

// On reports whether the host is on.
func (h *Host) On() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.on
}

// Commands are those that came, "on" and "off", in order.
func (h *Host) Commands() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string(nil), h.commands...)
}

// read is what the controller says of the state.
func (h *Host) read() bool {
	h.mu.Lock()
	on := h.on
	if !on && h.mood.ComesBack {
		h.on = true
	}
	goes := h.dying == 1
	h.dying = max(0, h.dying-1)
	h.mu.Unlock()
	if goes {
		h.Switch(false)
	}
	return on
}

// command carries out "on" or "off" and reports whether the controller takes it.
func (h *Host) command(want string) bool {
	h.mu.Lock()
	m := h.mood
	h.commands = append(h.commands, want)
	h.mu.Unlock()
	switch {
	case m.Refuses:
		return false
	case m.Lies:
		return true
	case want == "on":
		h.Switch(true)
	case m.SeenOnFor > 0:
		h.mu.Lock()
		defer h.mu.Unlock()
		h.dying = m.SeenOnFor
	default:
		h.Switch(false)
	}
	return true
}

// Switch is what the person beside the host does, or its controller.
func (h *Host) Switch(on bool) {
	h.mu.Lock()
	was := h.on
	h.on, h.dying = on, 0
	cut := h.cut
	h.mu.Unlock()
	if was && !on && cut != nil {
		cut()
	}
}
