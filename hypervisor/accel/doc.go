// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package accel finds out whether QEMU can be used on this host and with which
// accelerator.
//
// KVM is believed only when it is proven: a tiny guest program (probe.asm) is
// run under it with a deadline. It goes through what a kernel does in its first
// second and through enough kernel code that a KVM which emulates guest kernel
// code in software cannot finish in time. That /dev/kvm opens, or that firmware
// runs, proves nothing.
//
// Guarantees:
//   - "auto" answers kvm only after the probe passed in this boot of the host
//     with this QEMU program; in every other case it answers tcg with a reason.
//   - "kvm" and "tcg" are obeyed; the reason says so, and Problem says what is
//     missing for "kvm".
//   - A probe never runs longer than ProbeAttempts × ProbeDeadline; its QEMU is
//     killed with the daemon (PDEATHSIG).
//
// Non-guarantees: a proven KVM may still fail a guest that needs a feature which
// the probe does not touch (nested virtualization, large memory).
//
// The package owns no goroutine; the answer is kept in one file per host, valid
// for one boot.
package accel
