// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package node builds, wires and supervises everything in one daemon: it is
// the only package that knows all modules, and it supplies to each the
// interfaces that the module declared.
//
// Guarantees: a data directory is used by one daemon at a time; a module that
// fails or panics is started again without harming the others; ending the
// daemon never ends a VM.
//
// A Daemon owns the goroutines of its supervisor's services, which end with
// the context of Run.
package node
