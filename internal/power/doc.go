// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package power speaks to the devices that switch hosts on and off: baseboard
// management controllers, over IPMI v2.0 (RMCP+) and Redfish.
//
// Guarantees:
//   - Every call ends with its context or with the device's own time-out,
//     whatever the device does.
//   - Off reports a host as off only after a device answered "off" twice, with a
//     pause, after the command; not because a device took the command.
//   - An answer counts only if it is proved to be the device's: over Redfish by
//     TLS with a known authority or fingerprint, over IPMI by the session's key
//     (wire.go; the library below does not look at it). Ciphers without
//     authentication or encryption are not spoken.
//   - No password is in an error, a step or a log.
//
// Non-guarantees: a device that lies about the state, and one that is another
// host's, cannot be told from a good one; Check compares identities where both
// sides have one. What a device does after it answered is not followed.
//
// The package owns no goroutines beyond its calls. The IPMI library has one for
// each datagram and one for each session; they end when the device is closed.
package power
