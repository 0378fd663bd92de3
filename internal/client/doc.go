// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package client speaks the REST interface of a cluster: any node of a list
// takes the call, and the next one is tried when a node does not.
//
// Guarantees:
//   - A request whose repetition is harmless is tried on every server: reads,
//     unconditional PUT, PATCH and DELETE, and every POST, which carries an
//     Idempotency-Key that stays the same for all attempts. The server that
//     answered is asked first from then on.
//   - A dead server at the head of the list costs 300 ms once: before the first
//     request the servers are connected to one beside the other, and the first
//     that connects is the one that is used.
//   - A request whose outcome is not known (a conditional write that was cut
//     off, an upload from a pipe) is never repeated; the error says so.
//   - Every request carries the highest Muster-Revision seen, so that a caller
//     reads its own writes through any node.
//   - Problem documents become *Problem, which wraps *api.Error with the code.
//   - Watch loses no change over a reconnect to another node and delivers none
//     twice, save after an event of type "relist".
//   - The TLS certificate of every server is verified; nothing turns this off.
//
// Non-guarantees: the order in which servers are tried after a failure is the
// order of the list, not their load. HTTP proxies of the environment are not
// used: nodes are addressed directly.
//
// A Client may be used from any goroutine. It owns no goroutine of its own:
// connects that have lost the race are cancelled with its end. Console and
// Watch own one each for keep-alive pings, ended by Close and by the return of
// Watch.
package client
