// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package node builds, wires and supervises everything in one daemon: it is
// the only package that knows all modules, and it supplies to each the
// interfaces that the module declared.
//
// Guarantees: a data directory is used by one daemon at a time; a module that
// fails or panics, in whatever goroutine of its own, is started again without
// harming the others (internal/contain); one that hangs harms only who waits for
// it, and delays the end of the daemon by at most shutdownGrace; ending the
// daemon never ends a VM.
//
// Non-guarantees: a bug of the replica of the configuration database ends the
// daemon, as it should.
//
// A Daemon owns the goroutines of its supervisor's services, which end with
// the context of Run.
package node
