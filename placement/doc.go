// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package placement chooses the node for a VM. It is pure: the same view and
// request give the same answer on every node.
//
// Guarantees:
//   - Choose never names a node that is not ready, is in maintenance, is a
//     witness, cannot run QEMU, lacks a pool that the VM's disks need or a
//     network that its cards need, or has not enough free memory.
//   - It refuses only if no node fits, with one reason per node.
//   - Two transactions that both call Reserve for one node, computed on the
//     same state, cannot both commit: the second is computed again and sees
//     the first one's VM.
//
// Memory: a VM counts with its spec.memory plus OverheadPerVM from the moment
// that it is bound to a node with a power state other than stopped, and until
// its status says that it has stopped. One that is being migrated counts at both
// ends. The host keeps spec.reservedMemory.
// Memory that QEMU takes beyond that (many vCPUs, TCG's translation cache) is
// the reserve's business.
//
// Non-guarantees: CPUs are not limited; the free space of pools is not counted.
//
// The package owns no goroutine.
package placement
