// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package backup puts the state of the configuration database into a backup and
// takes it out again. The form of the file is that of internal/backupfile, the
// content that of the state machine's snapshot.
//
// Guarantees: what Read returns is one revision of one cluster, whole, as Write
// saw it; its header says the truth about it.
//
// Non-guarantees: Read trusts whoever had the cluster key. It does not look into
// the objects, but for that of the cluster.
//
// The package owns no goroutine. Limits: those of the state machine; a state is
// in memory as a whole, as it is on every node.
package backup
