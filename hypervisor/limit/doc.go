// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package limit puts the limits of a VM (api.VMLimits) into force with control
// groups.
//
// With cgroup v2 these are set on the group that the guard made for the VM, whose
// controllers it enables on the way down; the guard goes on to use it for killing.
// With cgroup v1, where the guard has no group with controllers, the process gets a
// group of its own in each hierarchy that a limit needs, below /muster. Where a host
// has both (hybrid), each limit is set where the kernel has its controller.
//
// Guarantees:
//   - Apply is idempotent, works on a running process with all its threads, and
//     returns every limit that is not in force, with the reason. Nothing is dropped
//     silently.
//   - A limit that was taken back is no longer in force.
//   - Release removes the groups that this package made.
//
// Non-guarantees: it does not keep others from moving the process. Between fork and
// Apply, some tens of milliseconds, QEMU runs without limits.
//
// It has no goroutines. Calls write to kernel files, which do not block.
package limit
