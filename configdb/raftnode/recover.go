// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/hashicorp/raft"

	"github.com/muster-vm/muster/configdb/fsm"
)

// Files names the directory of a node that does not run, and who it is.
type Files struct {
	Dir, NodeID, Address string
	LogStore             string // as in Config
	Log                  *slog.Logger
}

// open opens the files. What fails is an error of the caller: nothing runs that
// would have to be ended.
func (f Files) open() (*disk, error) {
	return openDisk(Config{Dir: f.Dir, LogStore: f.LogStore}, nil, newLogger(f.Log))
}

// ErrNoState is returned for a directory without a log or a snapshot.
var ErrNoState = errors.New("there is no replica of the configuration database")

// Recover makes the node the only member of its group. It applies the whole
// log, lets edit change the state in a term that no node has seen, and keeps the
// result as a snapshot in place of the log. What edit writes must get revisions
// above those of the state.
//
// It may be repeated after a crash at any point; edit then sees its own work.
// Until the new snapshot is whole on disk, nothing of the old is touched.
func Recover(ctx context.Context, f Files, edit func(state *fsm.State, term uint64) error) error {
	if _, err := os.Stat(f.Dir); err != nil {
		return fmt.Errorf("recover: %w: %w", ErrNoState, err)
	}
	d, err := f.open()
	if err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	err = recoverStores(ctx, f, d.log, d.stable, d.snapshots, edit)
	if err = errors.Join(err, d.close()); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	return nil
}

// Install makes an empty directory that of the only member of a new group that
// begins with a state. Raft's log goes on after the revision of the state.
func Install(f Files, state *fsm.State) error {
	if err := os.MkdirAll(f.Dir, 0o700); err != nil {
		return fmt.Errorf("raft directory: %w", err)
	}
	d, err := f.open()
	if err != nil {
		return err
	}
	used, err := raft.HasExistingState(d.log, d.stable, d.snapshots)
	switch {
	case err != nil:
	case used:
		err = fmt.Errorf("%s holds a replica already", f.Dir)
	default:
		err = f.install(d.stable, d.snapshots, state, max(1, state.View().Term()))
	}
	if err = errors.Join(err, d.close()); err != nil {
		return fmt.Errorf("install state: %w", err)
	}
	return nil
}

// install writes the state as a snapshot with this node as the only member.
func (f Files) install(stable raft.StableStore, snaps raft.SnapshotStore, state *fsm.State, term uint64) error {
	s := state.Snapshot()
	index := s.View().Revision()
	if index == 0 {
		return errors.New("the state is empty")
	}
	// It only encodes addresses for older versions of Raft.
	_, transport := raft.NewInmemTransport(raft.ServerAddress(f.NodeID))
	defer func() { _ = transport.Close() }()
	alone := raft.Configuration{Servers: []raft.Server{{Suffrage: raft.Voter, ID: raft.ServerID(f.NodeID), Address: ServerAddress(f.NodeID, f.Address)}}}
	sink, err := snaps.Create(raft.SnapshotVersionMax, index, term, alone, index, transport)
	if err != nil {
		return fmt.Errorf("create snapshot: %w", err)
	}
	if err := (&snapshot{s}).Persist(sink); err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	if err := stable.SetUint64(currentTermKey, term); err != nil {
		return fmt.Errorf("write term: %w", err)
	}
	return nil
}

func recoverStores(ctx context.Context, f Files, logs raft.LogStore, stable raft.StableStore, snaps raft.SnapshotStore, edit func(*fsm.State, uint64) error) error {
	state, term, err := wholeLog(ctx, logs, snaps)
	if err != nil {
		return err
	}
	if state.View().Revision() == 0 {
		return fmt.Errorf("%w in %s", ErrNoState, f.Dir)
	}
	seen, err := stableNumber(stable, currentTermKey)
	if err != nil {
		return err
	}
	term = max(term, seen) + 1
	if err := edit(state, term); err != nil {
		return err
	}
	if err := f.install(stable, snaps, state, term); err != nil {
		return err
	}
	// Entries that change the membership must not come after the snapshot.
	first, err := logs.FirstIndex()
	if err != nil {
		return fmt.Errorf("read log: %w", err)
	}
	last, err := logs.LastIndex()
	if err != nil || last == 0 {
		return err
	}
	if err := logs.DeleteRange(first, last); err != nil {
		return fmt.Errorf("clear log: %w", err)
	}
	return nil
}

// wholeLog returns the state after every entry, committed or not: with the
// others gone, nobody can tell. Its revision is that of the last entry.
func wholeLog(ctx context.Context, logs raft.LogStore, snaps raft.SnapshotStore) (state *fsm.State, term uint64, err error) {
	list, err := snaps.List() // the newest first
	if err != nil {
		return nil, 0, fmt.Errorf("list snapshots: %w", err)
	}
	state = fsm.New()
	term, bad := restoreNewest(snaps, list, state)
	if term, err = replay(ctx, logs, state, term); err == nil && len(list) > 0 && state.View().Revision() < list[0].Index {
		err = fmt.Errorf("the newest snapshot ends with entry %d and cannot be read, what is left ends with %d", list[0].Index, state.View().Revision())
	}
	if err != nil {
		return nil, 0, errors.Join(err, bad)
	}
	return state, term, nil
}

// restoreNewest takes the newest snapshot that is whole, if there is one. It
// returns the term of the last entry in it, and why newer ones were passed over.
func restoreNewest(snaps raft.SnapshotStore, list []*raft.SnapshotMeta, state *fsm.State) (term uint64, bad error) {
	for _, meta := range list {
		_, in, err := snaps.Open(meta.ID)
		if err == nil {
			err = errors.Join(state.Restore(in), in.Close())
		}
		if err == nil {
			state.Skip(meta.Index, meta.Term)
			return meta.Term, bad
		}
		bad = errors.Join(bad, fmt.Errorf("snapshot %s: %w", meta.ID, err))
	}
	return 0, bad
}

// replay applies the log after the state. Afterwards the state's revision is the
// last index.
func replay(ctx context.Context, logs raft.LogStore, state *fsm.State, term uint64) (uint64, error) {
	first, err := logs.FirstIndex()
	if err != nil {
		return 0, fmt.Errorf("read log: %w", err)
	}
	last, err := logs.LastIndex()
	if err != nil {
		return 0, fmt.Errorf("read log: %w", err)
	}
	from := state.View().Revision() + 1
	if last >= from && first > from {
		return 0, fmt.Errorf("the log begins with entry %d, but the snapshot ends with %d: a file of the replica was lost or put back", first, from-1)
	}
	for i := from; i <= last; i++ {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		var l raft.Log
		if err := logs.GetLog(i, &l); err != nil {
			return 0, fmt.Errorf("read entry %d of the log: %w", i, err)
		}
		term = l.Term
		if l.Type == raft.LogCommand {
			if _, err := state.Apply(l.Index, l.Term, l.Data); err != nil {
				return 0, err
			}
			continue
		}
		state.Skip(l.Index, l.Term)
	}
	return term, nil
}

// WholeLog returns the state after every entry of this node's log, committed or
// not, as Recover would find it. The node may run.
func (n *Node) WholeLog(ctx context.Context) (*fsm.State, error) {
	state, _, err := wholeLog(ctx, n.disk.log, n.disk.snapshots)
	if err != nil {
		return nil, fmt.Errorf("read the whole log: %w", err)
	}
	return state, nil
}

// LastLog returns the index and term of the last entry in this node's log or
// snapshot, by which Raft decides who is more up to date: first the term, then
// the index. Zeros if that cannot be told now.
func (n *Node) LastLog() (index, term uint64) {
	index, term, _ = n.last()
	return index, term
}
