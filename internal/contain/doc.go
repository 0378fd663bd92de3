// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package contain keeps a panic from ending more than what it belongs to.
//
// A panic in any goroutine ends the whole program, and the supervisor of the
// services only catches those of the goroutine that it started itself. So
// whatever a service starts goes through this package: a Group makes a panic
// the end of its service, with an error, and the supervisor starts that again;
// Call makes it the error of one piece of work.
//
// Guarantees:
//   - After a panic in a Group, its context is cancelled, and Wait returns the
//     first panic, with its stack, when all its goroutines have ended.
//   - An error of this package is a *Panic, so that it can be told from others.
//
// Non-guarantees: what the runtime calls fatal (concurrent writes to a map, no
// memory) ends the program all the same. The goroutines of libraries are their
// own. The replica of the configuration database is not contained on purpose:
// a replica that met a bug must not go on.
//
// A Group owns the goroutines that Go started.
package contain
