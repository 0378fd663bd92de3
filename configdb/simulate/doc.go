// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Simulate runs a whole cluster's configuration database in one process, at a
// size for which nobody has the hosts: scripts/simulate configdb. It forms the
// group, creates VMs, lets every node report on its VMs, and says how long it
// took until all replicas have the same state, how much memory a node needs and
// how much its leader sends.
//
// What is real: the replicas (configdb, raftnode and hashicorp/raft as in the
// daemon), the objects and their encoding, the calls that carry transactions to
// the leader, TLS between the nodes, and time. What is not: connections are
// buffers in memory, so there is no latency and no loss; the log, the votes and
// snapshots are in memory, so there is no disk to wait for, and the entries of
// the log, which all nodes have alike, are kept once for all of them; all nodes
// share the processors of one machine.
//
// Guarantees: every byte that a node hands to a connection is counted. The run
// fails unless every replica has the leader's revision and, key by key, its
// state; and unless every node got the same entry at the same index and term.
//
// Limits: the sizes are flags; --timeout bounds the run.
package main
