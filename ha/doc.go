// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package ha keeps the promise that no two nodes run the same VM, and restarts
// the protected VMs of a lost node elsewhere.
//
// Guarantees (DESIGN.md has the argument and the failure cases):
//   - A node holds its lease only for LeaseDuration from the moment it sent a
//     request that the leader answered after a majority confirmed it; the
//     node's guard kills the protected VMs when that time is over.
//   - The leader declares a node lost only when every lease it or an earlier
//     leader granted has run out and the guard had KillTime to do its work, or
//     when a power device read it back as off, twice, after this leader had
//     barred it from leases and commanded off.
//   - A lost node gets no lease until it was readmitted by a transaction, and
//     a VM is moved away from it only by a transaction that requires that it
//     was not.
//
// Non-guarantees: VMs without protection stay with their node, whose state is
// then unknown. A guard that is itself frozen is a matter for the watchdog.
//
// Keeper.Run owns one goroutine; Service.Run owns those of its reconcile loop,
// one for detection, and one for each node that is being switched off. All end with their context.
package ha
