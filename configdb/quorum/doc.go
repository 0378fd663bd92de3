// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package quorum decides who votes: a pure function from what the leader knows
// of the members to the next change of the membership.
//
// Guarantees: one change at a time; never more than MaxVoters; an odd number
// of voters where there are three or more to choose from; no change leaves
// fewer voters alive than its own majority; a lost voter is replaced when
// somebody can take its place, and dropped when that lets the rest survive one
// failure more.
//
// Non-guarantees: liveness is judged by the caller. The order of changes under
// flapping members is bounded only by the stabilisation times.
//
// The package has no goroutines and no state.
package quorum
