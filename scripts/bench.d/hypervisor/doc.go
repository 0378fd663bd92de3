// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Command hypervisor is the bench of the hypervisor: one musterd, as users have it,
// beside QEMUs that this program starts by itself with the same arguments, and
// beside libvirt. All three take their turns in every round. For migrations there are
// two more daemons, and two QEMUs whose monitors this program talks to.
//
// What must be true before a figure counts is checked: QEMU says "running", the log
// of the serial port grows, the VM has its clone.
package main
