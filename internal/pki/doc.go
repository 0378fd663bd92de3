// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package pki holds the cluster's small certificate authority, the bridge to its
// successor, the join token and the sealing of secrets. DESIGN.md has the life of
// certificates with its failure cases.
//
// Guarantees: node certificates carry the node's ID, so that a peer is known
// by what it is and not by its address; a secret that Seal returned reveals
// nothing without the cluster key, and Open detects any change of it.
//
// Non-guarantees: certificates are not revoked here; a removed node is locked
// out by the list of members. Limits: node certificates live NodeCertLife
// unless the cluster says otherwise; a bundle has at most 16 authorities.
//
// The package owns no goroutine.
package pki
