// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package hostboot tells one boot of this host from another, and the time since it began.
//
// Guarantees: the ID is the same as long as the host runs, and another one after its
// next boot (boot_id of Linux, random(4)). The package owns no goroutine.
package hostboot
