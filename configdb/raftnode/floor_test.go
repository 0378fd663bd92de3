// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"context"
	"io"
	"log/slog"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/muster-vm/muster/configdb/fsm"
)

// slowVotes is a store that holds up the writing of one term.
type slowVotes struct {
	*raft.InmemStore
	hold     uint64
	held, on chan struct{}
}

// SetUint64 implements raft.StableStore.
func (s *slowVotes) SetUint64(key []byte, v uint64) error {
	if string(key) == "CurrentTerm" && v == s.hold {
		close(s.held)
		<-s.on
	}
	return s.InmemStore.SetUint64(key, v)
}

const peerNode, otherNode = "peer", "other"

// alone starts one of three voters, in term 1, that hears nobody and stands for nothing,
// and what speaks to it as another one.
func alone(t *testing.T, votes *slowVotes) (*Node, *raft.NetworkTransport) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{
		Dir: t.TempDir(), NodeID: "self", Address: l.Addr().String(), Listener: l, State: fsm.New(), OnFatal: func(err error) { t.Error(err) },
		Timing: Timing{Heartbeat: time.Hour, Election: time.Hour, Lease: time.Hour, Commit: time.Hour}, Log: slog.New(slog.DiscardHandler),
		Storage: &Storage{Log: votes, Stable: votes, Snapshots: raft.NewInmemSnapshotStore()},
	}
	var three raft.Configuration
	for _, id := range []string{cfg.NodeID, peerNode, otherNode} {
		three.Servers = append(three.Servers, raft.Server{ID: raft.ServerID(id), Address: ServerAddress(id, cfg.Address)})
	}
	peer, err := raft.NewTCPTransport("127.0.0.1:0", nil, 1, time.Minute, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if err := raft.BootstrapCluster(raftConfig(cfg, newLogger(cfg.Log)), votes, votes, cfg.Storage.Snapshots, peer, three); err != nil {
		t.Fatal(err)
	}
	n, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := peer.Close(); err != nil {
			t.Error(err)
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n, peer
}

// beat sends a heartbeat of a leader of a term.
func beat(n *Node, peer *raft.NetworkTransport, term uint64) (*raft.AppendEntriesResponse, error) {
	h := raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(peerNode), Addr: []byte(ServerAddress(peerNode, "127.0.0.1:1"))}
	var resp raft.AppendEntriesResponse
	_, hostport, err := SplitAddress(n.self)
	if err != nil {
		return nil, err
	}
	return &resp, peer.AppendEntries(peerNode, raft.ServerAddress(hostport), &raft.AppendEntriesRequest{RPCHeader: h, Term: term}, &resp)
}

// beingBeaten is a node that handles a heartbeat of term 2, until votes.on is closed.
func beingBeaten(t *testing.T) (n *Node, votes *slowVotes, beaten <-chan error) {
	t.Helper()
	votes = &slowVotes{InmemStore: raft.NewInmemStore(), hold: 2, held: make(chan struct{}), on: make(chan struct{})}
	n, peer := alone(t, votes)
	ended := make(chan error, 1)
	go func() {
		_, err := beat(n, peer, 2)
		ended <- err
	}()
	<-votes.held
	return n, votes, ended
}

// A heartbeat of an earlier term that is being handled when a voter leaves for a later
// one does not pull it back.
func TestAVoterIsNotPulledBackByAHeartbeat(t *testing.T) {
	n, votes, beaten := beingBeaten(t)
	type answer struct {
		Abstention
		err error
	}
	answers := make(chan answer, 1)
	go func() {
		a, err := n.Abstain(context.Background(), 5)
		answers <- answer{a, err}
	}()
	var a answer
	early := false
	select {
	case a = <-answers:
		early = true
	case <-time.After(200 * time.Millisecond): // right however long that is
	}
	close(votes.on)
	if err := <-beaten; err != nil {
		t.Fatal(err)
	}
	if !early {
		a = <-answers
	}
	if term := n.Term(); a.err == nil && term < a.Term {
		t.Errorf("it left for term %d and is in term %d", a.Term, term)
	}
	if f := n.floor.term.Load(); f != 0 && a.err != nil {
		t.Errorf("it has not left its term, and the floor is %d: its leader's heartbeats wait for the disk", f)
	}
}

func TestHeartbeatsBelowTheFloorAreRefused(t *testing.T) {
	n, peer := alone(t, &slowVotes{InmemStore: raft.NewInmemStore()})
	a, err := n.Abstain(t.Context(), 5)
	if err != nil || a.Term != 5 || a.Voted || len(a.Voters) != 3 {
		t.Fatalf("%+v, %v", a, err)
	}
	for _, c := range []struct {
		term uint64
		want bool
	}{{1, false}, {4, false}, {5, true}, {4, false}, {7, true}, {6, false}} {
		was := n.Term()
		resp, err := beat(n, peer, c.term)
		if err != nil || resp.Success != c.want || resp.Term != max(was, c.term) || n.Term() != max(was, c.term) {
			t.Errorf("term %d in term %d: %+v, %v; it is in term %d now", c.term, was, resp, err, n.Term())
		}
	}
	if _, err := n.Abstain(t.Context(), 9); err == nil {
		t.Error("it left the term of its leader")
	}
	if f := n.floor.term.Load(); f != 5 {
		t.Errorf("the floor is %d", f)
	}
}

// A heartbeat that waits for a full disk does not hold up who asks for longer than he
// wants to wait.
func TestAbstainReturnsWhileAHeartbeatHangs(t *testing.T) {
	n, votes, beaten := beingBeaten(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if a, err := n.Abstain(ctx, 5); err == nil {
		t.Errorf("%+v", a)
	}
	close(votes.on)
	if err := <-beaten; err != nil {
		t.Error(err)
	}
}

// For how long a node has known no leader is counted from when it lost it, however
// seldom it is asked, and by a clock that nobody can set.
func TestLeaderlessCountsFromTheLossOfTheLeader(t *testing.T) {
	n, peer := alone(t, &slowVotes{InmemStore: raft.NewInmemStore()})
	if d := n.Leaderless(); d > time.Hour {
		t.Errorf("a node that has just begun is without a leader for %v", d)
	}
	var now atomic.Int64
	now.Store(int64(n.clock()))
	n.clock = func() time.Duration { return time.Duration(now.Load()) }
	now.Add(int64(5 * time.Second))
	if d := n.Leaderless(); d < 5*time.Second || d > time.Hour {
		t.Errorf("it has never known a leader, for %v", d)
	}
	if _, err := beat(n, peer, 2); err != nil {
		t.Fatal(err)
	}
	now.Add(int64(time.Hour))
	h := raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(peerNode), Addr: []byte(noAddress)}
	_, hostport, err := SplitAddress(n.self)
	if err != nil {
		t.Fatal(err)
	}
	var resp raft.RequestVoteResponse
	vote := &raft.RequestVoteRequest{RPCHeader: h, Term: 3, LeadershipTransfer: true}
	if err := peer.RequestVote(peerNode, raft.ServerAddress(hostport), vote, &resp); err != nil || n.Term() != 3 {
		t.Fatalf("%+v, %v", resp, err)
	}
	now.Add(int64(3 * time.Second))
	if d := n.Leaderless(); d != 3*time.Second {
		t.Errorf("it lost its leader 3 s ago and says %v", d)
	}
	if _, err := beat(n, peer, 3); err != nil || n.Leaderless() != 0 {
		t.Errorf("with a leader: %v, %v", n.Leaderless(), err)
	}
}
