// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package rest is the HTTP interface of every node: typed objects, actions,
// raw keys, watches and consoles below /api/v1, and /healthz, /readyz and
// /metrics beside it. Any node takes any call.
//
// Guarantees:
//   - A change is one configdb transaction whose preconditions name everything
//     that the decision was based on. After a conflict it is decided again on
//     fresh state.
//   - No request raises the epoch of a binding, or moves a VM, unless the
//     owner's own status says that the VM is stopped, at the very epoch and
//     generation that the transaction requires. Together with the owner's
//     checks this keeps "no two nodes run the same VM".
//   - A change answered with 2xx is committed; with Idempotency-Key its record
//     is part of the same transaction, so that a repeated request on any node
//     finds it.
//   - Secrets (token hashes, the sealed key of the cluster's authority) are in
//     no reply, watch event or raw read.
//   - Errors are problem documents (RFC 9457) with a stable code and, where
//     there is one, the offending field.
//   - A request from another node is honoured only with that node's verified
//     certificate, and is never sent on a second time.
//
// Non-guarantees: a typed read falls back to the node's own replica when there
// is no quorum and says so in its headers; so does the look-up of a token,
// which means that a revoked token opens reads on a cut-off node until it is
// back. Idempotency-Key is not kept for /cluster/…, whose answers are secrets.
// A replayed answer shows its objects as they are now.
//
// Goroutines: only those of a request: one more for each open console, watch
// or proxied connection, ended with the request. Limits are in limits.go.
package rest
