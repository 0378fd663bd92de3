// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/muster-vm/muster/configdb/feature"
	"github.com/muster-vm/muster/configdb/fsm"
)

// Offline is a DB over a state machine that no Raft group shares, such as a
// backup or the replica of a node that does not run: what is decided on it is
// decided by nobody else. Each transaction gets the next revision.
type Offline struct {
	mu     sync.Mutex // one transaction at a time
	state  *fsm.State
	term   uint64
	closed chan struct{}
	levels feature.Reader
}

var _ DB = (*Offline)(nil)

// NewOffline returns a database over a state, in which transactions commit in
// the given term. The state must not be used otherwise.
func NewOffline(state *fsm.State, term uint64) *Offline {
	return &Offline{state: state, term: term, closed: make(chan struct{})}
}

// SetTerm changes the term in which later transactions are committed.
func (o *Offline) SetTerm(term uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.term = term
}

// Term in which transactions are committed.
func (o *Offline) Term() uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.term
}

// Snapshot returns the whole state.
func (o *Offline) Snapshot() *fsm.Snapshot { return o.state.Snapshot() }

// Close ends all watches.
func (o *Offline) Close() { close(o.closed) }

// Local implements DB.
func (o *Offline) Local() *View { return o.state.View() }

// View implements DB.
func (o *Offline) View(ctx context.Context) (*View, error) { return o.state.View(), ctx.Err() }

// Txn implements DB.
func (o *Offline) Txn(ctx context.Context, t *Txn) (uint64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	t.within(&o.levels, o.state.View())
	return Propose(t, func(ft *fsm.Txn) (fsm.Outcome, error) {
		o.mu.Lock()
		defer o.mu.Unlock()
		cmd := fsm.Command{Time: time.Now().UnixNano(), Level: o.levels.Level(o.state.View()), Txns: []fsm.Txn{*ft}}
		out, err := o.state.Apply(o.state.View().Revision()+1, o.term, cmd.Encode())
		if err != nil {
			return fsm.Outcome{}, err
		}
		return out[0], nil
	})
}

// WaitRevision implements DB.
func (o *Offline) WaitRevision(ctx context.Context, revision uint64) (*View, error) {
	for {
		changed := o.state.Changed()
		if v := o.state.View(); v.Revision() >= revision {
			return v, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for revision %d: %w", revision, ctx.Err())
		}
	}
}

// Watch implements DB.
func (o *Offline) Watch(prefix string, from uint64) *Watch {
	return NewWatch(o.state, o.closed, prefix, from)
}

// Staleness implements DB.
func (o *Offline) Staleness() (time.Duration, bool) { return 0, true }
