// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package task is the leader's service that says how far each task is. Nobody
// executes a task: its wish is in the spec of its target, the target's owner
// carries that out, and this service compares the two.
//
// Guarantees:
//   - A final task never changes again.
//   - Every write carries the Raft term that the service began in and the
//     revision of the status that it was decided on; a deposed leader's late
//     decision cannot land.
//   - Status is written on change only; with no task open nothing is written.
//   - Final tasks go when they are older than Retention or beyond the newest
//     MaxFinal.
//
// Non-guarantees: progress is coarse; a target that passes through a state
// between two looks may not be seen in it. "failed" of a start says that it
// did not work up to now: the node goes on trying as long as the wish stands.
//
// Goroutines: Run owns one reconcile loop and one for retention, and waits for
// both.
package task
