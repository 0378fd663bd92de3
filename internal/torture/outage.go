// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package torture

import (
	"slices"
	"time"
)

// Span is a time in which something held.
type Span struct{ From, To time.Duration }

// Outage returns the longest time without an acknowledgement within a span, and
// when it began. The ends of the span bound it.
func Outage(acks []Ack, s Span) (longest, began time.Duration) {
	var at []time.Duration
	for _, a := range acks {
		if a.Return > s.From && a.Return < s.To {
			at = append(at, a.Return)
		}
	}
	slices.Sort(at)
	last := s.From
	for _, t := range append(at, s.To) {
		if t-last > longest {
			longest, began = t-last, last
		}
		last = t
	}
	return longest, began
}
