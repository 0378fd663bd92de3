// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package qmptest

import (
	"net"
	"strings"
)

// Way is how a trap ends a command that QEMU has read.
type Way string

// The ways. Half answers with half of a line before the connection ends.
const (
	Cut  Way = "the connection ends without an answer"
	Half Way = "the connection ends within the answer"
	Die  Way = "QEMU dies without an answer"
	Late Way = "QEMU carries it out, and the connection ends without an answer"
)

type trap struct {
	command string
	way     Way
}

// Trap makes the next such command end in that way, once.
func (q *QEMU) Trap(command string, way Way) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.trap = trap{command, way}
}

// Trapped reports whether a trap is still waiting.
func (q *QEMU) Trapped() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.trap.command != ""
}

// sprung springs the trap under mu, if it is for this command; the connection is
// over then.
func (q *QEMU) sprung(command string, c net.Conn) bool {
	if q.trap.command != command {
		return false
	}
	way := q.trap.way
	q.trap = trap{}
	switch way {
	case Half:
		_, _ = c.Write([]byte(`{"return": {"status": "run`))
	case Late:
		if _, after := q.execute(command); after != nil {
			defer after()
		}
	case Die:
		go q.Exit(-1, 9)
	}
	delete(q.qmp, c)
	_ = c.Close()
	return true
}

// Flood sends so many events to every client, in one go.
func (q *QEMU) Flood(event string, n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	line := `{"timestamp": {"seconds": 1, "microseconds": 0}, "event": "` + event + `", "data": {}}` + "\r\n"
	for c := range q.qmp {
		_, _ = c.Write([]byte(strings.Repeat(line, n)))
	}
}
