// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package raftnode runs hashicorp/raft for the configuration database: log and
// votes in bbolt (raft-boltdb), snapshots in files, transport over the node's
// one TLS port.
//
// Guarantees: an entry is handed to the state machine after a majority of
// voters has it on disk (fsync); a state machine that cannot apply an entry
// stops this node (Config.OnFatal) and skips nothing.
//
// Non-guarantees: who is leader is a hint everywhere; configdb asks the voters.
//
// Raft's own goroutines end with Close.
package raftnode
