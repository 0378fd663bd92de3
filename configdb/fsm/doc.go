// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package fsm is the replicated state machine of the configuration database.
// It knows bytes, keys, revisions and preconditions, never VMs: every business
// rule runs before Raft, so that nodes of different versions apply identical
// bytes identically.
//
// Guarantees:
//   - Apply is deterministic: no clock, no randomness, no map order, no I/O.
//     The only time it knows is the leader's, carried in the command.
//   - A transaction is all or nothing, and one request (session, sequence)
//     takes effect once, however often it is proposed.
//   - A View is immutable and costs one pointer; readers never block Apply and
//     Apply never blocks readers.
//   - An unknown format stops the node (ErrUnknownFormat); it is never skipped.
//
// Non-guarantees: a change feed older than the last HistoryLength changes is
// gone (ErrCompacted); the reader lists again.
//
// The package owns no goroutine.
package fsm
