// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"time"

	"github.com/hashicorp/raft"
)

// Storage replaces a node's files, for tests that lose what was not yet synced
// and that make snapshots often. What is nil or 0 is as usual.
type Storage struct {
	Log       raft.LogStore
	Stable    raft.StableStore
	Snapshots raft.SnapshotStore
	// SnapshotEvery and TrailingLogs are numbers of entries.
	SnapshotEvery, TrailingLogs uint64
	SnapshotInterval            time.Duration
}

func (s *Storage) configure(rc *raft.Config) {
	if s.SnapshotEvery > 0 {
		rc.SnapshotThreshold = s.SnapshotEvery
	}
	if s.TrailingLogs > 0 {
		rc.TrailingLogs = s.TrailingLogs
	}
	if s.SnapshotInterval > 0 {
		rc.SnapshotInterval = s.SnapshotInterval
	}
}
