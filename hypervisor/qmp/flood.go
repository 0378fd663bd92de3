// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package qmp

import "time"

// What a QEMU says unasked, events above all, costs something per message and for each
// KiB. A QEMU, or a guest that has found out how to make it speak, is heard so much at
// once and so often in a second; what is more waits in QEMU, with the replies behind it.
const (
	FloodBurst  = 5000
	FloodPerSec = 1000
	floodUnit   = time.Second / FloodPerSec
)

// flood is what one QEMU has said unasked.
type flood struct {
	spent time.Duration // less each moment
	at    time.Time
}

// unasked returns when the next message may be read.
func (f *flood) unasked(bytes int, done <-chan struct{}) {
	now := time.Now()
	f.spent = max(f.spent-now.Sub(f.at), 0) + time.Duration(1+bytes>>10)*floodUnit
	f.at = now
	over := f.spent - FloodBurst*floodUnit
	if over <= 0 {
		return
	}
	t := time.NewTimer(over)
	defer t.Stop()
	select {
	case <-t.C:
	case <-done:
	}
}
