// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package sshkey says which public keys may log in to the console shell. It is
// the one place for the rule: the REST interface applies it when a key is
// stored, and the shell once more when the key is used, so that a rule that
// became stricter also holds for keys that were stored before.
//
// The package has no state and no goroutines. A line is at most as long as its
// caller allows; see api.MaxSSHKeyLength.
package sshkey
