// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/muster-vm/muster/configdb/feature"
	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/configdb/raftnode"
	"github.com/muster-vm/muster/internal/clusternet"
)

// Deadlines and pauses of requests.
const (
	// DefaultDeadline bounds a request whose context has no deadline.
	DefaultDeadline = 10 * time.Second
	// attemptTimeout bounds one try, so that a dead leader's successor is
	// asked in time.
	attemptTimeout = 2 * time.Second
	// retryPause is the wait between two tries while there is no leader.
	retryPause = 25 * time.Millisecond
)

// Timing of the election, as raftnode has it.
type Timing = raftnode.Timing

// The log stores; see ADR 6.
const (
	LogSegments = raftnode.LogSegments
	LogBolt     = raftnode.LogBolt
)

// StoreConfig describes this node's replica.
type StoreConfig struct {
	Dir      string // of the replica's files
	NodeID   string
	NodeName string // for the history of what this node proposes
	Address  string // host:port that peers dial
	Identity *clusternet.Identity
	Listener net.Listener          // of clusternet.ProtoRaft
	Server   *clusternet.RPCServer // gets the methods of this package
	Client   *clusternet.RPCClient
	Timing   Timing      // zero: the default
	LogStore string      // LogSegments (also when empty) or LogBolt
	OnFatal  func(error) // the replica cannot go on: end the process
	Log      *slog.Logger
	Storage  *raftnode.Storage // of tests, in place of the files in Dir
}

// Store is the replica of this node. It implements DB.
type Store struct {
	cfg      StoreConfig
	log      *slog.Logger
	state    *fsm.State
	node     *raftnode.Node
	batch    *batcher
	verify   rounds[struct{}] // confirmations by a majority, on the leader
	index    rounds[uint64]   // revisions of the leader, for reads
	forward  *forwarder
	notify   func(nodeID string) // lets a follower know what was committed
	leading  *leaderTracker
	levels   feature.Reader
	sessions *sessions
	opened   time.Time

	behind      lag
	leaderMu    sync.Mutex
	leaderKnown context.Context // ends when another leader, or none, is known
	leaderMoved context.CancelFunc

	closed chan struct{}
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

var _ DB = (*Store)(nil)

// Open starts the replica. A new one must then be bootstrapped, or waits until
// the leader adds it.
func Open(cfg StoreConfig) (*Store, error) {
	s := &Store{
		cfg: cfg, log: cfg.Log, state: fsm.New(), leading: newLeaderTracker(),
		sessions: newSessions(), opened: time.Now(), closed: make(chan struct{}),
	}
	s.leaderKnown, s.leaderMoved = context.WithCancel(context.Background())
	node, err := raftnode.Open(raftnode.Config{
		Dir: cfg.Dir, NodeID: cfg.NodeID, Address: cfg.Address, Identity: cfg.Identity,
		Listener: cfg.Listener, State: s.state, Timing: cfg.Timing, LogStore: cfg.LogStore, OnFatal: cfg.OnFatal, Log: cfg.Log, Storage: cfg.Storage,
	})
	if err != nil {
		return nil, fmt.Errorf("open configuration database: %w", err)
	}
	s.node, s.notify = node, node.Notify
	s.verify.ask = func(ctx context.Context) (struct{}, error) { return struct{}{}, s.askVoters(ctx) }
	s.index.ask = s.leaderIndex
	s.forward = newForwarder(s.closed, s.callTxns)
	s.batch = newBatcher(node.Apply)
	s.batch.level = func() int { return s.levels.Level(s.state.View()) }
	s.register(cfg.Server)
	ctx, cancel := context.WithCancel(context.Background())
	stopWatching := node.WatchLeader(s.noteLeader)
	s.cancel = func() {
		cancel()
		stopWatching()
	}
	s.wg.Go(func() { s.batch.run(ctx) })
	s.wg.Go(func() { s.forward.run(ctx) })
	s.wg.Go(func() { s.track(ctx) })
	return s, nil
}

// Bootstrap founds a cluster with this node as its only member.
func (s *Store) Bootstrap() error { return s.node.Bootstrap() }

// Close stops the replica. Watches end with ErrClosed.
func (s *Store) Close() error {
	close(s.closed)
	s.cancel()
	s.wg.Wait()
	return s.node.Close()
}

// Local implements DB.
func (s *Store) Local() *View { return s.state.View() }

// Watch implements DB.
func (s *Store) Watch(prefix string, from uint64) *Watch {
	return NewWatch(s.state, s.closed, prefix, from)
}

// Heard notes an answer of the leader, which a majority confirmed after it was
// asked: what was acknowledged anywhere before asked is in the revision.
func (s *Store) Heard(revision uint64, asked time.Time) { s.behind.heard(revision, asked) }

// Staleness implements DB. The age counts from the last question to the leader,
// of View or of whoever calls Heard, whose answer this node has reached. That
// goes for the leader itself too, which may have been deposed.
func (s *Store) Staleness() (time.Duration, bool) {
	if asked, ok := s.behind.since(s.state.View().Revision()); ok {
		return time.Since(asked), true
	}
	return time.Since(s.opened), false
}

// WaitRevision implements DB.
func (s *Store) WaitRevision(ctx context.Context, revision uint64) (*View, error) {
	for {
		changed := s.state.Changed()
		if v := s.state.View(); v.Revision() >= revision {
			return v, nil
		}
		full, filled := s.node.DiskFull()
		if full != nil {
			return nil, fmt.Errorf("%w (%w)", ErrDiskFull, full)
		}
		select {
		case <-changed:
		case <-filled:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for revision %d, this node has %d: %w", revision, s.state.View().Revision(), ctx.Err())
		case <-s.closed:
			return nil, ErrClosed
		}
	}
}

// View implements DB: the leader names a revision that contains everything
// acknowledged so far and is confirmed to lead afterwards; this node then
// waits until it has applied that revision.
func (s *Store) View(ctx context.Context) (*View, error) {
	ctx, cancel := withDefaultDeadline(ctx)
	defer cancel()
	asked := time.Now()
	var rev uint64
	err := s.onLeader(ctx, func(actx context.Context, _ target) (err error) {
		rev, err = s.index.do(actx)
		return err
	})
	if err != nil {
		return nil, err
	}
	s.Heard(rev, asked)
	return s.WaitRevision(ctx, rev)
}

// leaderIndex asks whoever leads.
func (s *Store) leaderIndex(ctx context.Context) (uint64, error) {
	moved := s.leaderChange()
	id, addr, ok := s.node.Leader()
	switch {
	case !ok:
		return 0, errNotLeader
	case id == s.cfg.NodeID:
		return s.readIndex(ctx)
	}
	ctx, cancel := attempt(ctx, moved)
	defer cancel()
	return s.callReadIndex(ctx, target{nodeID: id, address: addr})
}

// readIndex answers for the leader.
func (s *Store) readIndex(ctx context.Context) (uint64, error) {
	l, ok := s.Leadership()
	if !ok {
		return 0, errNotLeader
	}
	rev := s.state.View().Revision()
	if err := s.Confirm(ctx, l.Term); err != nil {
		return 0, errNotLeader
	}
	return rev, nil
}

// Txn implements DB.
func (s *Store) Txn(ctx context.Context, t *Txn) (uint64, error) {
	if err := s.DiskFull(); err != nil {
		return 0, err // it could not see its own write
	}
	ctx, cancel := withDefaultDeadline(ctx)
	defer cancel()
	t.node = s.cfg.NodeName
	t.within(&s.levels, s.state.View())
	if t.Source == "" {
		t.Source = SourceOf(ctx)
	}
	rev, err := Propose(t, func(ft *fsm.Txn) (fsm.Outcome, error) { return s.decide(ctx, ft) })
	if err != nil {
		return 0, err
	}
	if _, err := s.WaitRevision(ctx, rev); err != nil {
		// Committed, though this node lags: the writer must not take it for lost.
		// Nor may it look like an error after which nothing was changed.
		return rev, fmt.Errorf("%w: written at revision %d, which this node does not have yet: %v", ErrUncertain, rev, err) //nolint:errorlint // see above
	}
	return rev, nil
}

// DiskFull returns ErrDiskFull, with the reason, while this node's disk takes no
// entries.
func (s *Store) DiskFull() error {
	if full, _ := s.node.DiskFull(); full != nil {
		return fmt.Errorf("%w (%w)", ErrDiskFull, full)
	}
	return nil
}

// decide proposes a transaction until it has an outcome, on whoever leads.
func (s *Store) decide(ctx context.Context, ft *fsm.Txn) (fsm.Outcome, error) {
	ft.Request = s.sessions.begin()
	handedOn := false // an earlier try may still take effect
	answered := false
	defer func() { s.sessions.end(ft.Request, answered) }()
	var out fsm.Outcome
	err := s.onLeader(ctx, func(actx context.Context, leader target) (err error) {
		if leader.self {
			if l, _ := s.leading.get(); l == nil {
				return errNotLeader
			}
			out, err = s.batch.propose(actx, ft)
		} else {
			out, err = s.forward.do(actx, leader, ft)
		}
		if err != nil {
			handedOn = handedOn || !wasNotProposed(err)
			return err
		}
		switch out.Status {
		case fsm.Overlap:
			return errNotLeader // was not decided: propose it again
		case fsm.SessionUnknown:
			if !handedOn {
				s.sessions.forgotten(ft.Request)
				ft.Request = s.sessions.begin()
				return errNotLeader
			}
		}
		return nil
	})
	answered = err == nil
	if err != nil && handedOn {
		return out, fmt.Errorf("%w (%w)", ErrUncertain, err)
	}
	return out, err
}

func wasNotProposed(err error) bool {
	return errors.Is(err, errNotLeader) || errors.Is(err, raftnode.ErrNotLeader)
}

// target is the leader to ask.
type target struct {
	self            bool
	nodeID, address string
}

// onLeader calls f with the current leader, again while it fails and the
// deadline allows.
func (s *Store) onLeader(ctx context.Context, f func(context.Context, target) error) error {
	var last error
	for {
		moved := s.leaderChange() // before the look, so that no change is missed
		if id, addr, ok := s.node.Leader(); ok {
			actx, cancel := attempt(ctx, moved)
			err := f(actx, target{self: id == s.cfg.NodeID, nodeID: id, address: addr})
			cancel()
			if err == nil || errors.Is(err, ErrTooLarge) {
				return err
			}
			last = err
		}
		select {
		case <-time.After(retryPause):
		case <-ctx.Done():
			if last == nil || wasNotProposed(last) {
				return ErrNoQuorum
			}
			return fmt.Errorf("%w: %w", ErrNoQuorum, last)
		case <-s.closed:
			return ErrClosed
		}
	}
}

// noteLeader ends what waits for a leader that is no longer the leader.
func (s *Store) noteLeader() {
	s.leaderMu.Lock()
	defer s.leaderMu.Unlock()
	s.leaderMoved()
	s.leaderKnown, s.leaderMoved = context.WithCancel(context.Background())
}

func (s *Store) leaderChange() context.Context {
	s.leaderMu.Lock()
	defer s.leaderMu.Unlock()
	return s.leaderKnown
}

// attempt returns the context of one try, which ends early when this node
// learns of another leader: a dead one never answers.
func attempt(ctx, moved context.Context) (context.Context, context.CancelFunc) {
	actx, cancel := context.WithTimeout(ctx, attemptTimeout)
	stop := context.AfterFunc(moved, cancel)
	return actx, func() {
		stop()
		cancel()
	}
}

func withDefaultDeadline(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, DefaultDeadline)
}
