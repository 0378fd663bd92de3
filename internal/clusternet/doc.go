// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package clusternet is the one TCP port of a node: TLS 1.3, split by ALPN
// (RFC 7301) into the protocols of the cluster and the web, and the dialling
// side of the same.
//
// Guarantees:
//   - A connection of a cluster protocol is delivered only after both sides
//     proved with certificates of the cluster's authority that they are nodes;
//     the dialler also proved that it reached the node it meant.
//   - A web connection may carry a node's certificate, which is then verified,
//     or none.
//   - A client that is slow in its handshake delays nobody else.
//   - Certificate and authorities can be replaced while connections stand. Drop
//     closes at once what a node that was removed has open, of any protocol.
//
// Non-guarantees: what a node may do is decided by the protocols above.
//
// Port.Serve owns one goroutine for accepting and one for each handshake under
// way, at most MaxHandshakes; they end with its context.
package clusternet
