// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"context"

	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/configdb/raftnode"
)

// Files names the replica of a node that does not run.
type Files = raftnode.Files

// ErrNoState: there is no replica in the directory.
var ErrNoState = raftnode.ErrNoState

// Recover makes a node that does not run the only member of its group, with
// everything that is in its log, and lets edit change the state before anybody
// sees it. It may be repeated after a crash; edit then sees what it did.
func Recover(ctx context.Context, f Files, edit func(db *Offline) error) error {
	return raftnode.Recover(ctx, f, func(state *fsm.State, term uint64) error {
		db := NewOffline(state, term)
		defer db.Close()
		return edit(db)
	})
}

// Install makes the empty directory of a node that does not run that of the only
// member of a new group, which begins with a database.
func Install(f Files, db *Offline) error { return raftnode.Install(f, db.state) }

// Snapshot returns the whole state, with everything that was acknowledged before
// the call.
func (s *Store) Snapshot(ctx context.Context) (*fsm.Snapshot, error) {
	if _, err := s.View(ctx); err != nil {
		return nil, err
	}
	return s.state.Snapshot(), nil
}

// LocalSnapshot returns the whole state as this node has it.
func (s *Store) LocalSnapshot() *fsm.Snapshot { return s.state.Snapshot() }

// Newest returns everything that this node has. While a leader is known that is
// its state; without one it is its whole log, of which the end may never have
// been acknowledged: a node that was started without a quorum cannot tell how
// far its log was committed, and its state is that of its last snapshot.
func (s *Store) Newest(ctx context.Context) (*fsm.Snapshot, error) {
	if _, _, ok := s.node.Leader(); ok {
		return s.state.Snapshot(), nil
	}
	whole, err := s.node.WholeLog(ctx)
	if err != nil {
		return nil, err
	}
	return whole.Snapshot(), nil
}

// LastLog returns the index and term of the last entry of this node's log,
// committed or not. Of two nodes the one with the higher term, or with the same
// term and the higher index, has everything that the other has acknowledged.
func (s *Store) LastLog() (index, term uint64) { return s.node.LastLog() }
