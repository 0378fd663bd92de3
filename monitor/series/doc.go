// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package series measures this host and keeps what it measured for an hour.
//
// A Store holds one ring of 360 places, 10 s each, per series; a Runner runs
// collectors, each with its own period and deadline, and puts what they report
// into the store. WriteText renders the newest values for Prometheus, Query
// answers what happened in the last hour.
//
// Guarantees:
//   - A collector that hangs delays no other and occupies one goroutine, no
//     more; it is shown as late, and what it reports after its deadline is
//     thrown away.
//   - Memory is bounded: at most MaxSeries series, 360 values each. What does
//     not fit is counted, not stored.
//   - Nothing here is written to the database: an idle cluster stays idle.
//
// Non-guarantees: values are lost with the process; of several samples within
// one step of 10 s the last is kept.
//
// Goroutines: Runner.Run owns one per collector and waits for all but those
// that hang in the kernel, which cannot be ended from here.
package series
