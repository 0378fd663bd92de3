// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package uefi finds the UEFI firmware of a host by the descriptors that its
// packages install (QEMU's docs/interop/firmware.json).
//
// Guarantees: of several firmwares the one whose descriptor sorts first by file
// name is taken, as that page asks for; an administrator's descriptor in /etc
// hides one of the same name.
//
// Non-guarantees: a descriptor that cannot be understood is passed over.
//
// It owns no goroutine. A descriptor may have MaxDescriptor bytes, and a
// directory MaxDescriptors of them.
package uefi
