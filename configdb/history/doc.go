// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package history reads the records that configdb writes with every change of
// a spec, and keeps them within the limits that the cluster's settings state.
//
// Guarantees:
//   - At answers what every object was at a revision, from the horizon on.
//     Before the horizon it is refused, never guessed.
//   - The newest record at or below the horizon of an object that is still
//     there is never removed.
//   - Compare never shows the value of a secret field.
//
// There is a history from feature level 2 of the cluster on (configdb/feature):
// a node that supports no more would change objects without a record.
//
// Non-guarantees: the time of a record is the clock of the node that proposed
// the change; the order of changes is that of their revisions. A change that a
// node of an older version made is noticed by the leader within an hour, as it
// then is: of several such changes only the last is seen.
//
// Reading costs a pass over the records of the kind, or over all. Service runs
// on the leader, on the goroutine of Run; an idle cluster writes nothing.
package history
