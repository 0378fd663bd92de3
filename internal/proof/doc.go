// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package proof checks the evidence of a failover: that a node was only declared
// lost when its protected VMs had ended for certain, that each of them was moved
// after that and once, and that the node got no lease before the last move.
//
// It is independent of package ha, whose work it checks: it shares no code with
// it, and the times of the safety argument are written here a second time, from
// ha/DESIGN.md. It works on what GET /api/v1/ha/failovers/{id}/proof returns,
// also from a file, long after and far from the cluster.
//
// Guarantees: Check is pure and takes any input. Each rule that the evidence does
// not bear is named, with the numbers.
//
// Non-guarantees: it believes that the records are those that the cluster wrote.
// Their order comes from the revisions of the database, which only a majority can
// give; the silence of a node is a measurement of its leader.
package proof
