// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package nbd is a small client of the Network Block Device protocol (doc/proto.md of
// the NBD project), for a qemu-nbd of this host: one export over one connection that
// somebody else has made, reads, and writes that are safe when they return.
//
// Guarantees: every field that the server sends is checked, what it may make this side
// allocate is bounded, and any breach of the protocol ends the connection. Requests of
// several callers are under way at once; one that the server does not answer holds up
// no other, and its caller returns at the end of its context.
//
// Non-guarantees: a request whose context ended may still be carried out, up to the end
// of the server. There is no TLS, no structured reply, no trim and no resize.
//
// A Conn owns one goroutine, which ends with the connection.
package nbd
