// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package memory

import (
	"time"

	"github.com/muster-vm/muster/api"
)

// Limits of pressure: what the kernel says of processes that wait for memory (PSI,
// Documentation/accounting/psi.rst), as the share of the last ten seconds in percent.
const (
	// StallHigh begins a squeeze, below StallLow memory is given back again; in
	// between nothing moves.
	StallHigh = 10.0
	StallLow  = 1.0
	// StallWindow is what the figure is about: a squeeze shows in it only after so
	// long, so there is no other one before.
	StallWindow = 10 * time.Second
	// stallMargins is up to how many margins of available memory a stall is the
	// host's own: one with more to give has a process that is limited by itself.
	stallMargins = 4
	// FloorFor is how long it is remembered at how much available memory the host
	// stalled last.
	FloorFor = time.Hour
)

// Pressure is what is remembered of the host from look to look. The zero value
// knows nothing.
type Pressure struct {
	floor api.Size  // the most available memory at which the host was short
	seen  time.Time // when it was last
	acted time.Time // when that began a squeeze last
}

// Note completes what is known of a node with what its kernel says now. known is
// false if it says nothing of stalls; then only available memory counts.
func (p *Pressure) Note(n *Node, stall float64, known bool, now time.Time) {
	if n.Total == 0 {
		return
	}
	margin := n.margin()
	stalls := known && n.Available < stallMargins*margin
	switch {
	case stalls && stall >= StallHigh:
		p.floor, p.seen = max(p.floor, n.Available), now
		n.Stalled = now.Sub(p.acted) >= StallWindow
		if n.Stalled {
			p.acted = now
		}
		n.Rest = !n.Stalled
	case n.Available < margin:
		p.floor, p.seen = max(p.floor, n.Available), now
	case stalls && stall >= StallLow:
		n.Rest = true
	case now.Sub(p.seen) > FloorFor:
		p.floor = 0
	}
	n.Floor = p.floor
}
