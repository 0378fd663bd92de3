// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"fmt"
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

// What Raft keeps in the stable store under these names.
var (
	currentTermKey = []byte("CurrentTerm")
	lastVoteTerm   = []byte("LastVoteTerm")
)

// stableNumber reads such a number, 0 if there is none yet.
func stableNumber(s raft.StableStore, key []byte) (uint64, error) {
	v, err := s.GetUint64(key)
	if err != nil && err.Error() != "not found" { // the text is part of Raft's interface
		return 0, fmt.Errorf("read %s: %w", key, err)
	}
	return v, nil
}
