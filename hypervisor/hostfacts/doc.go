// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package hostfacts finds out what a host can give its VMs: from the kernel's
// /proc and /sys below a root of choice, and from a QEMU that is asked once and
// runs nothing.
//
// Guarantees: the same host gives the same answer, in the same order, so that
// what is compared is written only when something changed. What the kernel does
// not say is left out.
//
// Non-guarantees: what VMs use at the moment is not counted.
//
// Ask has a goroutine that waits for the end of its QEMU, and waits for it; else the
// package owns none. Files have MaxFile bytes, lists MaxDevices entries.
package hostfacts
