// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package plan says what becomes of every VM when nodes are lost.
//
// Make is pure: the same state, fleet and options give the same plan on every
// node. The recovery carries out what it says, the what-if shows it, and the
// promise to survive failures is made of it: there is no other place where that
// is decided. Where a VM fits is the fleet's word, which package placement gives.
//
// Guarantees:
//   - Only a VM whose binding is protected gets another node.
//   - Each choice counts those before it.
//   - If the nodes that are left are no majority of the voters, nothing restarts.
//
// Non-guarantees: it knows the state of one view. What a pool on a host that
// dies served to others is not known to it.
//
// The package owns no goroutine.
package plan
