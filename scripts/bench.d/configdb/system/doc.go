// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package system runs the systems under test as real processes on loopback:
// three servers each, with fsync, their data side by side on one disk. The
// package itself has musterd and rqlited; etcd has a package of its own, whose
// client library would else be needed to check the rest.
//
// Guarantees: every process that was started is ended, by its pid, with what
// it started itself, and also when the bench is killed: the kernel ends the
// servers, and a list on disk lets the next run end what servers started.
//
// Goroutines: one per process, which waits for its end.
package system
