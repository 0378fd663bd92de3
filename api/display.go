// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import "time"

// Display says whether a VM has a screen.
type Display string

// The displays. An empty one means DisplayVNC.
const (
	DisplayVNC  Display = "vnc"
	DisplayNone Display = "none"
)

// Shown reports whether there is a screen to look at.
func (d Display) Shown() bool { return d != DisplayNone }

func (d Display) validate() error {
	switch d {
	case "", DisplayVNC, DisplayNone:
		return nil
	}
	return Invalid("spec.display", "is %q; give vnc or none", clip(string(d)))
}

// ConsoleKind is what a console ticket opens.
type ConsoleKind string

// The kinds.
const (
	ConsoleVNC    ConsoleKind = "vnc"
	ConsoleSerial ConsoleKind = "serial"
)

// ConsoleTicket lets whoever shows it open one console of one VM, once.
type ConsoleTicket struct {
	// Ticket is the secret, for the query of Path.
	Ticket string      `json:"ticket"`
	Kind   ConsoleKind `json:"kind" enum:"vnc,serial"`
	VM     string      `json:"vm" doc:"name of the VM"`
	// Path of the WebSocket on any node, without the query.
	Path      string    `json:"path"`
	ExpiresAt time.Time `json:"expiresAt"`
}
