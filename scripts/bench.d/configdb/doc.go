// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Command configdb compares Muster's configuration database with etcd and
// rqlite. scripts/bench builds and calls it; docs/benchmarks.md says how to
// read what it prints.
//
// Guarantees: the systems take turns within every round, each begins it with
// an empty folder, and only one has processes at a time. Every acknowledged
// value that is looked at again must be there, or the bench fails. All
// processes are ended, also after a failure or a signal.
package main
