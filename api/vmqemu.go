// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import "time"

// VMQEMU is what a node says of the QEMU of a VM that runs there.
type VMQEMU struct {
	// Node is its name, PID the process.
	Node string `json:"node"`
	PID  int    `json:"pid"`
	// Argv is what the process was started with, without secrets.
	Argv []string `json:"argv"`
	// Log are the last messages between the daemon and QEMU, the oldest first.
	// It begins anew with the daemon.
	Log []QEMULogEntry `json:"log,omitempty"`
}

// QEMULogEntry is one message between a daemon and a QEMU.
type QEMULogEntry struct {
	Time time.Time `json:"time"`
	// Kind is command, reply, error or event; a reply names its command.
	Kind string `json:"kind"`
	Name string `json:"name"`
	// Text is the JSON that was said, without secrets; Cut is how many bytes of
	// it were left out.
	Text string `json:"text,omitempty"`
	Cut  int    `json:"cut,omitempty"`
}

// MaxQEMULog is how many messages a node keeps of each QEMU.
const MaxQEMULog = 256
