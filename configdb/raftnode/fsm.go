// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/muster-vm/muster/configdb/fsm"
)

// adapter hands Raft's committed entries to the state machine.
type adapter struct {
	state   *fsm.State
	onFatal func(error)
	closing <-chan struct{} // closed before Raft is shut down
	failed  error           // set once; only Raft's one FSM goroutine uses it
	// applied and took count the entries applied and the nanoseconds that took.
	applied, took atomic.Uint64
	// advanced has a token after an entry was applied.
	advanced chan struct{}
}

func (a *adapter) advance() {
	select {
	case a.advanced <- struct{}{}:
	default:
	}
}

// result is what Apply returns to the proposer.
type result struct {
	outcomes []fsm.Outcome
	err      error
}

// Apply implements raft.FSM. A node that cannot apply an entry must neither
// skip it nor go on: its state would differ from the others' without a word.
func (a *adapter) Apply(l *raft.Log) any {
	if a.failed != nil {
		return result{err: a.failed}
	}
	began := time.Now() // for the metrics; the state machine knows no clock
	out, err := a.state.Apply(l.Index, l.Term, l.Data)
	a.took.Add(uint64(time.Since(began)))
	a.applied.Add(1)
	if err != nil {
		// Nothing may be applied after this entry. Raft waits for this goroutine
		// when it is shut down, so it is let go then.
		a.failed = err
		a.onFatal(err)
		<-a.closing
	}
	a.advance()
	return result{outcomes: out, err: err}
}

// StoreConfiguration implements raft.ConfigurationStore: a change of
// membership is an entry without changes.
func (a *adapter) StoreConfiguration(index uint64, _ raft.Configuration) {
	if a.failed == nil {
		a.state.Skip(index, a.state.View().Term())
		a.advance()
	}
}

// Snapshot implements raft.FSM.
func (a *adapter) Snapshot() (raft.FSMSnapshot, error) {
	if a.failed != nil {
		return nil, a.failed // Raft counts entries that were not applied
	}
	return &snapshot{a.state.Snapshot()}, nil
}

// Restore implements raft.FSM.
func (a *adapter) Restore(r io.ReadCloser) error {
	defer func() { _ = r.Close() }()
	err := a.state.Restore(r)
	if errors.Is(err, fsm.ErrUnknownFormat) {
		a.onFatal(err) // it will never be otherwise, and nothing else would say so
	}
	return err
}

type snapshot struct{ s *fsm.Snapshot }

// Persist implements raft.FSMSnapshot.
func (s *snapshot) Persist(sink raft.SnapshotSink) error {
	if _, err := s.s.WriteTo(sink); err != nil {
		_ = sink.Cancel()
		return fmt.Errorf("write snapshot: %w", err)
	}
	return sink.Close()
}

// Release implements raft.FSMSnapshot.
func (s *snapshot) Release() {}
