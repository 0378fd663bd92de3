// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package storetest holds the conformance suite of configdb.DB and an
// implementation on the bare state machine, without Raft, for tests of the
// modules above. It is imported by tests only.
package storetest

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/fsm"
)

// Mem is a DB of one node in memory. Revision and term behave as with Raft; the
// term is what the test sets.
type Mem struct {
	mu     sync.Mutex
	state  *fsm.State
	index  uint64
	term   uint64
	closed chan struct{}
}

// New returns an empty database that ends with the test.
func New(tb testing.TB) *Mem {
	m := &Mem{state: fsm.New(), term: 1, closed: make(chan struct{})}
	tb.Cleanup(func() { close(m.closed) })
	return m
}

// SetTerm changes the Raft term in which later transactions are committed.
func (m *Mem) SetTerm(term uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.term = term
}

// Local implements configdb.DB.
func (m *Mem) Local() *configdb.View { return m.state.View() }

// View implements configdb.DB.
func (m *Mem) View(ctx context.Context) (*configdb.View, error) { return m.state.View(), ctx.Err() }

// Txn implements configdb.DB.
func (m *Mem) Txn(ctx context.Context, t *configdb.Txn) (uint64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	return configdb.Propose(t, func(ft *fsm.Txn) (fsm.Outcome, error) {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.index++
		cmd := fsm.Command{Time: time.Now().UnixNano(), Txns: []fsm.Txn{*ft}}
		out, err := m.state.Apply(m.index, m.term, cmd.Encode())
		if err != nil {
			return fsm.Outcome{}, err
		}
		return out[0], nil
	})
}

// WaitRevision implements configdb.DB.
func (m *Mem) WaitRevision(ctx context.Context, revision uint64) (*configdb.View, error) {
	for {
		changed := m.state.Changed()
		if v := m.state.View(); v.Revision() >= revision {
			return v, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for revision %d: %w", revision, ctx.Err())
		}
	}
}

// Watch implements configdb.DB.
func (m *Mem) Watch(prefix string, from uint64) *configdb.Watch {
	return configdb.NewWatch(m.state, m.closed, prefix, from)
}

// Staleness implements configdb.DB.
func (m *Mem) Staleness() (time.Duration, bool) { return 0, true }
