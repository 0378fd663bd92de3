// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package hostnet is the part of the virtual switch that the kernel does: tap
// devices for guests, VXLAN devices (RFC 7348) for networks that span nodes,
// and packet sockets on taps.
//
// Guarantees:
//   - What it makes carries an alias that the caller chose; Remove takes away a
//     device only if its alias begins with what the caller names.
//   - All calls are idempotent: what is right already is left alone.
//
// Non-guarantees: nothing survives a reboot of the host.
//
// The package owns one goroutine per Follow, which ends with its context.
// A Host works in the network namespace that it was opened for, by default the
// process's own.
package hostnet
