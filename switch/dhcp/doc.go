// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package dhcp answers the DHCP (RFC 2131, 2132) messages of one guest's
// network card with the one address that is reserved for it.
//
// There is no lease database: who asks is known by the tap that the frame came
// through, and what to answer is looked up anew for every message. Any node
// gives the same answers, so a guest keeps its address when it moves, and it
// does not matter that nobody remembers having answered before.
//
// Guarantees:
//   - Only the card's own MAC address is answered, in the frame and in the
//     message; relayed messages and broken frames are ignored.
//   - DISCOVER, REQUEST (selecting, init-reboot, renewing, rebinding) and INFORM
//     are answered; a REQUEST for another address gets a NAK, one that chose
//     another server nothing. DECLINE and RELEASE change nothing.
//   - A guest that floods costs at most MaxPerSecond answers and lines in the log
//     a second; a bug that one message meets ends only that message.
//
// Non-guarantees: the server identifier is the gateway, or ServerID without
// one; a unicast RENEW to an identifier that nobody answers ARP for does not
// leave the guest, which then rebinds by broadcast as RFC 2131 4.4.5 says.
//
// Serve runs in the caller's goroutine until the socket is closed.
package dhcp
