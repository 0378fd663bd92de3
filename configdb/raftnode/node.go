// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"

	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/internal/clusternet"
)

// Timing of the election. A follower that hears nothing for Heartbeat to
// 2 × Heartbeat stands for election; a leader without a majority for Lease
// steps down.
type Timing struct {
	Heartbeat, Election, Lease, Commit time.Duration
}

// DefaultTiming repairs the loss of a leader in about half a second.
func DefaultTiming() Timing {
	return Timing{Heartbeat: 350 * time.Millisecond, Election: 350 * time.Millisecond, Lease: 300 * time.Millisecond, Commit: 20 * time.Millisecond}
}

// Sizes of the transport and the log.
const (
	maxPool           = 3
	transportTimeout  = 5 * time.Second
	snapshotsKept     = 2
	snapshotEvery     = 16384 // entries
	trailingLogs      = 16384
	snapshotInterval  = 30 * time.Second
	boltOpenTimeout   = 3 * time.Second
	applyTimeout      = 5 * time.Second
	membershipTimeout = 10 * time.Second
	logFile           = "raft.db"
	maxAppendEntries  = 64
	logCache          = 64 // entries, which may have up to 4 MiB each
)

// Config describes a node.
type Config struct {
	Dir      string // holds the log, the votes and the snapshots
	NodeID   string
	Address  string // host:port that peers dial
	Identity *clusternet.Identity
	Listener net.Listener // of clusternet.ProtoRaft
	State    *fsm.State
	Timing   Timing
	OnFatal  func(error)
	Log      *slog.Logger
	Storage  *Storage // of tests, in place of the files in Dir
}

// Node is one member of the Raft group.
type Node struct {
	raft      *raft.Raft
	logs      raft.LogStore
	file      io.Closer // of the stores; nil if they are the test's
	transport *raft.NetworkTransport
	self      raft.ServerAddress
	nodeID    string
	closing   chan struct{}
}

// Open starts a node on its directory. With an empty directory it waits to be
// bootstrapped or to be added by a leader.
func Open(cfg Config) (*Node, error) {
	logger := newLogger(cfg.Log)
	if cfg.Storage != nil {
		return openOn(cfg, logger, nil, cfg.Storage.Log, cfg.Storage.Stable, cfg.Storage.Snapshots)
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("raft directory: %w", err)
	}
	store, err := raftboltdb.New(raftboltdb.Options{
		Path:        filepath.Join(cfg.Dir, logFile),
		BoltOptions: &bbolt.Options{Timeout: boltOpenTimeout, FreelistType: bbolt.FreelistMapType},
	})
	if err != nil {
		return nil, fmt.Errorf("open raft log %s: %w", filepath.Join(cfg.Dir, logFile), err)
	}
	snaps, err := raft.NewFileSnapshotStoreWithLogger(cfg.Dir, snapshotsKept, logger)
	if err != nil {
		_ = store.Close()
		return nil, fmt.Errorf("open snapshots in %s: %w", cfg.Dir, err)
	}
	cache, err := raft.NewLogCache(logCache, store)
	if err != nil {
		_ = store.Close()
		return nil, err
	}
	return openOn(cfg, logger, store, cache, store, snaps)
}

// openOn starts a node on its stores; file is what Close has to close.
func openOn(cfg Config, logger hclog.Logger, file io.Closer, logs raft.LogStore, stable raft.StableStore, snaps raft.SnapshotStore) (*Node, error) {
	n := &Node{logs: logs, file: file, self: ServerAddress(cfg.NodeID, cfg.Address), nodeID: cfg.NodeID, closing: make(chan struct{})}
	layer := &streamLayer{Listener: cfg.Listener, id: cfg.Identity, self: n.self}
	n.transport = raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: layer, MaxPool: maxPool, Timeout: transportTimeout, Logger: logger,
	})
	var err error
	n.raft, err = raft.NewRaft(raftConfig(cfg, logger), &adapter{state: cfg.State, onFatal: cfg.OnFatal, closing: n.closing}, logs, stable, snaps, transport{n.transport})
	if err != nil {
		return nil, n.closeAfter(fmt.Errorf("start raft: %w", err))
	}
	return n, nil
}

func raftConfig(cfg Config, logger hclog.Logger) *raft.Config {
	rc := raft.DefaultConfig()
	rc.LocalID = raft.ServerID(cfg.NodeID)
	t := cfg.Timing
	if t == (Timing{}) {
		t = DefaultTiming()
	}
	rc.HeartbeatTimeout, rc.ElectionTimeout, rc.LeaderLeaseTimeout, rc.CommitTimeout = t.Heartbeat, t.Election, t.Lease, t.Commit
	rc.SnapshotThreshold, rc.TrailingLogs, rc.SnapshotInterval = snapshotEvery, trailingLogs, snapshotInterval
	rc.MaxAppendEntries = maxAppendEntries
	rc.ShutdownOnRemove = false
	rc.Logger = logger
	if cfg.Storage != nil {
		cfg.Storage.configure(rc)
	}
	return rc
}

func (n *Node) closeAfter(err error) error {
	err = errors.Join(err, n.transport.Close())
	if n.file != nil {
		err = errors.Join(err, n.file.Close())
	}
	return err
}

// HasState reports whether the directory already holds a member's state.
func (n *Node) HasState() bool {
	last, err := n.logs.LastIndex()
	return err != nil || last > 0 || n.raft.LastIndex() > 0
}

// Bootstrap makes this node the only member of a new group.
func (n *Node) Bootstrap() error {
	err := n.raft.BootstrapCluster(raft.Configuration{Servers: []raft.Server{{Suffrage: raft.Voter, ID: raft.ServerID(n.nodeID), Address: n.self}}}).Error()
	if err != nil {
		return fmt.Errorf("bootstrap raft: %w", err)
	}
	return nil
}

// Close stops Raft and closes its files. Call it once.
func (n *Node) Close() error {
	close(n.closing)
	return n.closeAfter(n.raft.Shutdown().Error())
}

// Apply proposes an entry and waits for its outcomes. The entry may have been
// committed although an error is returned, unless the error is ErrNotLeader.
func (n *Node) Apply(data []byte) ([]fsm.Outcome, error) {
	f := n.raft.Apply(data, applyTimeout)
	if err := f.Error(); err != nil {
		if errors.Is(err, raft.ErrNotLeader) || errors.Is(err, raft.ErrLeadershipTransferInProgress) || errors.Is(err, raft.ErrEnqueueTimeout) {
			return nil, fmt.Errorf("%w: %w", ErrNotLeader, err)
		}
		return nil, fmt.Errorf("propose: %w", err)
	}
	r := f.Response().(result)
	return r.outcomes, r.err
}

// ErrNotLeader means that this node does not lead, so that nothing was proposed.
var ErrNotLeader = errors.New("this node is not the leader")

// Barrier waits until everything committed before is applied here.
func (n *Node) Barrier(timeout time.Duration) error { return n.raft.Barrier(timeout).Error() }

// Leader returns who leads, as far as this node knows.
func (n *Node) Leader() (nodeID, hostport string, ok bool) {
	addr, id := n.raft.LeaderWithID()
	if id == "" {
		return "", "", false
	}
	_, hostport, err := SplitAddress(addr)
	return string(id), hostport, err == nil
}

// IsLeader is a hint: a leader that was deposed learns it later.
func (n *Node) IsLeader() bool { return n.raft.State() == raft.Leader }

// Term returns the current term.
func (n *Node) Term() uint64 { return n.raft.CurrentTerm() }

// LeaderChanges delivers true when this node becomes leader and false when it
// no longer is; of quick changes only the last is seen.
func (n *Node) LeaderChanges() <-chan bool { return n.raft.LeaderCh() }

// WatchLeader calls f whenever this node learns of another leader, or of none,
// until the returned function is called. f must not block.
func (n *Node) WatchLeader(f func()) (stop func()) {
	ch := make(chan raft.Observation, 1) // one is enough: f looks for itself
	o := raft.NewObserver(ch, false, func(o *raft.Observation) bool {
		_, ok := o.Data.(raft.LeaderObservation)
		return ok
	})
	n.raft.RegisterObserver(o)
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-ch:
				f()
			case <-done:
				return
			}
		}
	}()
	return func() {
		n.raft.DeregisterObserver(o)
		close(done)
		<-ended
	}
}

// LastContact is when this node last heard from a leader.
func (n *Node) LastContact() time.Time { return n.raft.LastContact() }

// Indexes returns the last index in the log, committed and applied.
func (n *Node) Indexes() (last, committed, applied uint64) {
	return n.raft.LastIndex(), n.raft.CommitIndex(), n.raft.AppliedIndex()
}

// Member is one server of the group.
type Member struct {
	NodeID, Address string
	Voter           bool
}

// Members returns the latest configuration that this node knows.
func (n *Node) Members() ([]Member, error) {
	f := n.raft.GetConfiguration()
	if err := f.Error(); err != nil {
		return nil, fmt.Errorf("read membership: %w", err)
	}
	var out []Member
	for _, s := range f.Configuration().Servers {
		_, hostport, err := SplitAddress(s.Address)
		if err != nil {
			return nil, err
		}
		out = append(out, Member{NodeID: string(s.ID), Address: hostport, Voter: s.Suffrage == raft.Voter})
	}
	return out, nil
}

// Add makes a node a voter or a replica. Only the leader can; repeating it is
// harmless.
func (n *Node) Add(nodeID, hostport string, voter bool) error {
	id, addr := raft.ServerID(nodeID), ServerAddress(nodeID, hostport)
	if voter {
		return membershipError("add", nodeID, n.raft.AddVoter(id, addr, 0, membershipTimeout).Error())
	}
	return membershipError("add", nodeID, n.raft.AddNonvoter(id, addr, 0, membershipTimeout).Error())
}

// Remove takes a node out. Only the leader can; repeating it is harmless.
func (n *Node) Remove(nodeID string) error {
	return membershipError("remove", nodeID, n.raft.RemoveServer(raft.ServerID(nodeID), 0, membershipTimeout).Error())
}

func membershipError(verb, nodeID string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, raft.ErrNotLeader) {
		err = errors.Join(ErrNotLeader, err)
	}
	return fmt.Errorf("%s member %s: %w", verb, nodeID, err)
}

// Transfer hands leadership to some other voter.
func (n *Node) Transfer() error { return n.raft.LeadershipTransfer().Error() }

// newLogger passes Raft's log on: what it calls info is debug to us.
func newLogger(log *slog.Logger) hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{
		Name: "raft", Level: hclog.Debug, Output: &slogWriter{log}, DisableTime: true,
	})
}

type slogWriter struct{ log *slog.Logger }

func (w *slogWriter) Write(b []byte) (int, error) {
	level, text := slog.LevelDebug, string(b)
	switch {
	case len(text) > 7 && text[:7] == "[ERROR]":
		level = slog.LevelWarn
	case len(text) > 6 && text[:6] == "[WARN]":
		level = slog.LevelInfo
	}
	for len(text) > 0 && text[len(text)-1] == '\n' {
		text = text[:len(text)-1]
	}
	w.log.Log(context.Background(), level, "raft", "text", text)
	return len(b), nil
}

var _ io.Writer = (*slogWriter)(nil)
