// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package configdb is the replicated configuration database: the single source
// of truth that every node embeds.
//
// Guarantees:
//   - A transaction that Txn acknowledged is on the disks of a majority of
//     voters and survives the loss of any minority.
//   - Txn takes effect once, on any node, whoever leads and however often the
//     leader changes meanwhile; it returns when this node has applied it, so
//     that the writer reads its own write here at once.
//   - View is linearizable on any node: it contains every transaction that was
//     acknowledged anywhere before the call. Local is stale by the age that
//     Staleness states.
//   - A Watch delivers the initial set, then a Synced mark, then every later
//     state of each key, coalesced, in order of revision.
//
// Non-guarantees: without a majority Txn and View fail with ErrNoQuorum within
// their deadline; Local and Watch go on with what this node has. The outcome
// of a transaction that ended with ErrUncertain is not known.
//
// The package owns the goroutines of Raft, of the group commit on the leader
// and of the leadership tracker, all ended by Close. DESIGN.md has the reasons
// and the failure cases.
package configdb
