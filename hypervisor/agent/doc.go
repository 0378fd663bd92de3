// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package agent speaks with the QEMU guest agent inside a VM, over the socket of
// its virtio-serial port (QEMU's qga/qapi-schema.json).
//
// The guest is not trusted. It may be silent, slow, flood, answer half or
// nonsense, answer what was asked of somebody else, or lie.
//
// Guarantees:
//   - One command at a time, each under a deadline. Before each, what is left of
//     earlier ones is thrown away (guest-sync-delimited), so that a late answer
//     is never taken for that of another command.
//   - Nothing but the sync is sent to an agent that has not answered one: what a
//     guest without an agent leaves unread is never carried out later.
//   - An answer has at most MaxReply bytes and MaxDepth levels; at most MaxReply
//     bytes are read in search of one. Between commands nothing is read, so that
//     a flood fills the socket's buffer and then stops.
//   - Strings are valid UTF-8 without control and format characters and have at
//     most MaxString bytes; lists have their own bounds; addresses are addresses.
//   - File systems that were frozen through here are thawed after the time that
//     was given, when the Agent is closed, and when a new Agent finds them frozen.
//   - A password is in no error and no log.
//
// Non-guarantees: what the guest says need not be true. A command that runs in
// the guest when its deadline comes goes on there.
//
// Goroutines: one for the duration of a thaw that is due. Close waits for it.
package agent
