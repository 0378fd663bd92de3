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
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/internal/clusternet"
	"github.com/muster-vm/muster/internal/hostboot"
)

// Timing of the election. A follower that hears nothing for Heartbeat to
// 2 × Heartbeat stands for election; a leader without a majority for Lease
// steps down.
type Timing struct {
	Heartbeat, Election, Lease, Commit time.Duration
}

// DefaultTiming repairs the loss of a leader whose process ended in some tens of
// milliseconds (see suspicion.go), that of a silent one in one to two seconds.
// Shorter times cost an idle cluster more, and elect when nothing but a loaded
// host was slow.
func DefaultTiming() Timing {
	return Timing{Heartbeat: time.Second, Election: time.Second, Lease: 800 * time.Millisecond, Commit: 200 * time.Millisecond}
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
	maxAppendEntries  = 64
	logCache          = 64 // entries, with LogBolt; each may have up to 4 MiB
	// fullPatience is by how much a node whose disk is full waits longer before
	// it stands for election: it could not lead.
	fullPatience = 20
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
	LogStore string // LogSegments (also when empty) or LogBolt
	OnFatal  func(error)
	Log      *slog.Logger
	Storage  *Storage // of tests, in place of the files in Dir
}

// Node is one member of the Raft group.
type Node struct {
	raft      *raft.Raft
	disk      *disk
	committed *committed // nil with the storage of a test
	notices   *notices
	suspicion atomic.Pointer[suspicion]
	identity  *clusternet.Identity
	last      func() (index, term uint64, ok bool)
	timing    Timing
	log       *slog.Logger
	transport *raft.NetworkTransport
	self      raft.ServerAddress
	nodeID    string
	calls     chan raft.RPC // to Raft, behind intake
	closing   chan struct{}
	space     chan struct{} // the disk became full, or is no longer
	wg        sync.WaitGroup
	fsm       *adapter
	abstains  sync.Mutex // one at a time
	floor     floor
	told      *Told
	// missed is since when no leader is known, by the clock, in nanoseconds; 0 while one is.
	missed atomic.Int64
	clock  func() time.Duration // of the boot
}

// Open starts a node on its directory. With an empty directory it waits to be
// bootstrapped or to be added by a leader.
func Open(cfg Config) (*Node, error) {
	logger := newLogger(cfg.Log)
	closing := make(chan struct{})
	d, err := openDisk(cfg, closing, logger)
	if err != nil {
		return nil, err
	}
	n := &Node{
		disk: d, timing: cfg.Timing.orDefault(), log: cfg.Log, self: ServerAddress(cfg.NodeID, cfg.Address), nodeID: cfg.NodeID, identity: cfg.Identity,
		closing: closing, space: make(chan struct{}, 1), clock: hostboot.Clock,
	}
	n.missed.Store(int64(n.clock()))
	term, err := stableNumber(d, currentTermKey)
	if err != nil {
		return nil, n.closeAfter(err)
	}
	n.told = NewTold(term, n.clock())
	d.onSpace = func(bool) {
		select {
		case n.space <- struct{}{}:
		default:
		}
	}
	layer := &streamLayer{Listener: cfg.Listener, id: cfg.Identity, self: n.self, broken: func(peer string) {
		if s := n.suspicion.Load(); s != nil {
			s.brokenBy(peer)
		}
	}}
	n.transport = raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: layer, MaxPool: maxPool, Timeout: transportTimeout, Logger: logger,
	})
	logs, err := d.cached()
	if err != nil {
		return nil, n.closeAfter(err)
	}
	log, err := newSnapLog(logs, d.snapshots, cfg.OnFatal, func(term uint64) { n.told.Mark(term, n.clock) })
	if err != nil {
		return nil, n.closeAfter(err)
	}
	var noted raft.Log
	if cfg.Storage == nil {
		if n.committed, noted.Index, noted.Term, err = openCommitted(cfg.Dir); err != nil {
			n.warnCommitted(err)
		} else {
			d.closers = append(d.closers, n.committed.file)
		}
	}
	n.fsm = &adapter{state: cfg.State, onFatal: cfg.OnFatal, closing: n.closing, advanced: make(chan struct{}, 1)}
	n.calls = make(chan raft.RPC)
	n.raft, err = raft.NewRaft(raftConfig(cfg, logger), n.fsm, log, d, snapStore{d.snapshots, log}, transport{n.transport, n.calls, &n.floor, n.closing})
	if err != nil {
		return nil, n.closeAfter(fmt.Errorf("start raft: %w", err))
	}
	n.raft.RegisterObserver(raft.NewObserver(nil, false, n.noteLeader))
	n.last = n.lastEntry(log)
	s := newSuspicion(n)
	in := &intake{
		snapshot: log.snapshot, applied: n.raft.AppliedIndex, term: n.raft.CurrentTerm, last: n.last, voter: n.someVoter, votes: n.votes, gone: s.gone, header: n.header,
	}
	if n.committed != nil {
		n.wg.Go(func() { n.applyCommitted(noted.Index, noted.Term) })
		n.wg.Go(n.noteCommitted)
	}
	n.wg.Go(func() { in.run(n.transport.Consumer(), n.calls, n.closing) })
	n.suspicion.Store(s)
	n.wg.Go(s.run)
	n.notices = newNotices(n)
	n.wg.Go(n.watchSpace)
	return n, nil
}

func (t Timing) orDefault() Timing {
	if t == (Timing{}) {
		return DefaultTiming()
	}
	return t
}

// DiskFull returns why this node takes no entries, or nil, and a channel that
// is closed when, or because, it takes none.
func (n *Node) DiskFull() (error, <-chan struct{}) { return n.disk.Full() } //nolint:staticcheck // the error is the value here

// watchSpace keeps a node that cannot store entries from standing for election,
// and looks when it can again.
func (n *Node) watchSpace() {
	tick := time.NewTicker(spaceCheck)
	tick.Stop()
	defer tick.Stop()
	patient := false
	for {
		select {
		case <-n.space:
		case <-tick.C:
			if free, err := n.disk.free(); err == nil && free >= spaceNeeded {
				n.disk.note(nil)
			}
		case <-n.closing:
			return
		}
		full, _ := n.disk.Full()
		if (full != nil) == patient {
			continue
		}
		patient = full != nil
		factor := time.Duration(1)
		if patient {
			factor = fullPatience
			tick.Reset(spaceCheck)
			n.log.Error("the disk is full: this node takes no changes until there is space", "err", full)
		} else {
			tick.Stop()
			n.log.Info("there is space again: this node takes changes")
		}
		rc := n.raft.ReloadableConfig()
		rc.HeartbeatTimeout, rc.ElectionTimeout = factor*n.timing.Heartbeat, factor*n.timing.Election
		if err := n.raft.ReloadConfig(rc); err != nil {
			n.log.Warn("election timing not changed", "err", err)
		}
	}
}

func raftConfig(cfg Config, logger hclog.Logger) *raft.Config {
	rc := raft.DefaultConfig()
	rc.LocalID = raft.ServerID(cfg.NodeID)
	t := cfg.Timing.orDefault()
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
	return errors.Join(err, n.transport.Close(), n.disk.close())
}

// HasState reports whether the directory already holds a member's state.
func (n *Node) HasState() bool {
	last, err := n.disk.LastIndex()
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
	n.notices.close()
	err := n.raft.Shutdown().Error()
	n.wg.Wait()
	if n.committed != nil {
		n.noteApplied()
	}
	return errors.Join(err, n.transport.Close(), n.disk.close())
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
	n.notices.committed()
	return r.outcomes, r.err
}

// ErrNotLeader means that this node does not lead, so that nothing was proposed.
var ErrNotLeader = errors.New("this node is not the leader")

// Barrier waits until everything committed before is applied here.
func (n *Node) Barrier(timeout time.Duration) error { return n.raft.Barrier(timeout).Error() }

// tell gives Raft's own loop a command as if it had come from another node, and waits
// until it is carried out. What Raft answers is of no use here.
func (n *Node) tell(ctx context.Context, command any) error {
	answer := make(chan raft.RPCResponse, 1)
	select {
	case n.calls <- raft.RPC{RespChan: answer, Command: command}:
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-n.closing:
		return raft.ErrRaftShutdown
	}
	select {
	case <-answer:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-n.closing:
		return raft.ErrRaftShutdown
	}
}

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

// Indexes returns the last index in the log, committed and applied.
func (n *Node) Indexes() (last, committed, applied uint64) {
	return n.raft.LastIndex(), n.raft.CommitIndex(), n.raft.AppliedIndex()
}

// ApplyTime returns how many entries this process has applied and how long that
// took in all.
func (n *Node) ApplyTime() (entries uint64, took time.Duration) {
	return n.fsm.applied.Load(), time.Duration(n.fsm.took.Load()) //nolint:gosec // 292 years
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

// Demote makes a voter a replica. Only the leader can; repeating it is harmless.
func (n *Node) Demote(nodeID string) error {
	return membershipError("demote", nodeID, n.raft.DemoteVoter(raft.ServerID(nodeID), 0, membershipTimeout).Error())
}

// TransferTo hands leadership to a certain voter.
func (n *Node) TransferTo(nodeID, hostport string) error {
	return membershipError("hand leadership to", nodeID, n.raft.LeadershipTransferToServer(raft.ServerID(nodeID), ServerAddress(nodeID, hostport)).Error())
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

// lastEntry returns what tells where a log ends; not ok if that cannot be told now.
func (n *Node) lastEntry(log raft.LogStore) func() (index, term uint64, ok bool) {
	return func() (index, term uint64, ok bool) {
		index = n.raft.LastIndex()
		var e raft.Log
		if index == 0 || log.GetLog(index, &e) == nil {
			return index, e.Term, true
		}
		return 0, 0, false
	}
}

// servers are the group by the newest membership that this node knows.
func (n *Node) servers() []raft.Server { return n.raft.GetConfiguration().Configuration().Servers }

// votes reports whether a server may vote by the newest membership.
func (n *Node) votes(id []byte) bool {
	return slices.ContainsFunc(n.servers(), func(s raft.Server) bool {
		return s.Suffrage == raft.Voter && string(s.ID) == string(id)
	})
}

// someVoter returns the ID of a server that may vote.
func (n *Node) someVoter() []byte {
	for _, s := range n.servers() {
		if s.Suffrage == raft.Voter {
			return []byte(s.ID)
		}
	}
	return nil
}
