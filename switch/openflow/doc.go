// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package openflow is the small part of OpenFlow 1.3 (ONF TS-006) that the
// virtual switch needs: a session with a bridge's management socket, flows that
// a few fields match, with the two outcomes "switch it normally" and "drop it", and
// meters that drop what is more than a rate.
//
// Guarantees:
//   - Replace returns nil once the switch has confirmed all flows.
//   - Done is closed when the switch, ovs-vswitchd, ends or goes away: it is
//     also how its end is noticed.
//   - Messages are at most MaxMessage bytes; a switch that sends nonsense ends
//     the session, nothing else.
//
// Non-guarantees: between the removal of old flows and the last new one frames
// may pass by neither.
//
// A Session owns one goroutine, ended by Close.
package openflow
