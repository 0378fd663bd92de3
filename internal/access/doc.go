// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package access gives files of this host to the unprivileged users that VMs run
// as, and finds out what such a user could open.
//
// Guarantees:
//   - What is given is what was looked at: a file is opened without following a
//     symbolic link, checked, and changed through that descriptor. A regular file
//     with a second name is refused, since the other name may be anybody's.
//   - [OpenWay] adds the right to search a directory (x) for one group and nothing
//     else; it never makes a directory readable, and never takes a right away.
//   - All functions may be repeated; what is as it should be is not written.
//
// Non-guarantees: calls block as long as the file system does, so that callers
// put those into pools behind a deadline. Rights are not taken back: the file of a
// stopped VM still belongs to its user, who then has no process.
//
// It has no goroutines but one short-lived for each [CanOpen].
package access
