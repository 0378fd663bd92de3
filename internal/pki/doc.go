// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package pki holds the cluster's small certificate authority, the join token
// and the sealing of secrets.
//
// Guarantees: node certificates carry the node's ID, so that a peer is known
// by what it is and not by its address; a secret that Seal returned reveals
// nothing without the cluster key, and Open detects any change of it.
//
// Non-guarantees: certificates are not revoked here; a removed node is locked
// out by the list of members. Limits: node certificates live NodeCertLife.
//
// The package owns no goroutine.
package pki
