// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package load

import (
	"slices"
	"time"
)

// Result is what one load measured.
type Result struct {
	// Errors is how many calls failed, and First one of them.
	Errors int
	First  error
	// Calls is how many there were in all, those outside the window too.
	Calls int
	// Took is the length of the measured window.
	Took time.Duration
	// sorted has the latency of every call that succeeded within it.
	sorted []time.Duration
	// Gap is the longest time without an acknowledgement.
	Gap time.Duration
}

// newResult takes over the latencies.
func newResult(latencies []time.Duration, took time.Duration) *Result {
	slices.Sort(latencies)
	return &Result{sorted: latencies, Took: took}
}

// Count is how many calls succeeded.
func (r *Result) Count() int { return len(r.sorted) }

// Rate is calls per second.
func (r *Result) Rate() float64 { return float64(len(r.sorted)) / r.Took.Seconds() }

// Percentile returns the latency that a share q (0 to 1) of the calls did not
// exceed: the nearest rank, which is one of the measured values.
func (r *Result) Percentile(q float64) time.Duration {
	n := len(r.sorted)
	if n == 0 {
		return 0
	}
	i := int(q*float64(n)+0.9999999) - 1
	return r.sorted[min(max(i, 0), n-1)]
}

// longestGap returns the longest time between two neighbours of the times,
// which it sorts, from begin to end: both count as neighbours too.
func longestGap(begin time.Time, acks []time.Time, end time.Time) time.Duration {
	slices.SortFunc(acks, time.Time.Compare)
	longest, last := time.Duration(0), begin
	for _, t := range append(acks, end) {
		longest = max(longest, t.Sub(last))
		last = t
	}
	return longest
}
