// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package linear records what clients asked of the configuration database and
// what they were told, and decides whether one sequence of steps, each taking
// effect between its call and its return, explains all of it.
//
// It looks at a history twice:
//
//   - Facts that need no search: every value is written by one operation only,
//     so a value that is read and was never asked for, that was refused and is
//     there all the same, that has two revisions, or whose acknowledged write
//     the final state lacks, is a violation by itself. These say at once what
//     went wrong.
//   - A search (porcupine) over each group of keys: reads, transactions with
//     preconditions, and operations whose outcome nobody knows, which may have
//     taken effect at any time after their call, or never.
//
// Guarantees: what it calls a violation is one, if the history is true and
// every value in it unique. Non-guarantees: a group whose search does not end
// in time is reported as undecided, not as right.
//
// The package starts no goroutines that outlive a call. Limits: MaxCells keys
// in a group.
package linear
