// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package rbdname is how the modules of a node call an image in a Ceph pool where they
// would name a file: storage makes the names, the hypervisor opens what they name with
// QEMU's rbd driver.
//
// Guarantees: a name is no path of a file (it begins with Prefix), and has no secret:
// Key is the ID of the secret that QEMU needs. What Parse accepts, String gives back.
package rbdname
