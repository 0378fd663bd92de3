// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/raft"

	"github.com/muster-vm/muster/internal/clusternet"
)

// A leader that is gone. Raft misses it by its silence alone: each voter waits
// for a random time, and refuses the others' pre-votes until its own is over, so
// that the first who asks mostly asks in vain and waits once more.
//
// A voter knows better in two cases. The leader's process ended: its connections
// break, and its port refuses new ones. And it has been silent for Heartbeat:
// that is as much as Raft wants, if nobody was lucky to wait for longer. In both
// a voter grants pre-votes and votes to others, by the rules of Raft but the one
// that it has a leader; and in the first it stands itself, without waiting, once
// a majority has granted it a pre-vote. So one node that is mistaken, or whose
// way to the leader alone is broken, changes nothing: neither terms nor leader.
//
// That a vote is given while a leader lives harms nothing here: no read and no
// lease rests on the leader's own belief that it leads, see configdb.Confirm.

const (
	// probes are tried, probePause apart, until one is refused: the port of a
	// process that ends may be closed after its connections.
	probes       = 6
	probePause   = 8 * time.Millisecond
	probeTimeout = 250 * time.Millisecond
	// suspected is how long a refusal counts.
	suspected = time.Second
	// standPause lies between the voters that stand, so that they do not take
	// each other's votes.
	standPause = 60 * time.Millisecond
	// standTries pre-votes are asked for: the others may learn of it later.
	standTries = 10
	standAgain = 15 * time.Millisecond
	standWait  = 150 * time.Millisecond // for the answers
)

// suspicion looks after the leader that this node follows.
type suspicion struct {
	n      *Node
	broken chan string // IDs of nodes whose connection broke

	mu     sync.Mutex
	leader raft.ServerID // whose port refused a connection
	at     time.Time
}

func newSuspicion(n *Node) *suspicion {
	return &suspicion{n: n, broken: make(chan string, 1)}
}

// gone reports whether the leader that Raft follows is gone.
func (s *suspicion) gone() bool {
	_, id := s.n.raft.LeaderWithID()
	if id == "" || s.n.raft.State() != raft.Follower {
		return false
	}
	heard := s.n.raft.LastContact()
	s.mu.Lock()
	refused := s.leader == id && time.Since(s.at) < suspected && s.at.After(heard)
	s.mu.Unlock()
	return refused || time.Since(heard) > s.n.timing.Heartbeat
}

// run looks whenever a connection broke, until the node closes.
func (s *suspicion) run() {
	var asked sync.WaitGroup
	defer asked.Wait()
	for {
		select {
		case peer := <-s.broken:
			if s.refuses(peer) {
				s.stand(raft.ServerID(peer), &asked)
			}
		case <-s.n.closing:
			return
		}
	}
}

// brokenBy is called when a connection of a node broke.
func (s *suspicion) brokenBy(peer string) {
	if _, id := s.n.raft.LeaderWithID(); string(id) != peer {
		return
	}
	select {
	case s.broken <- peer:
	default: // it is looked at already
	}
}

// refuses reports whether the port of the leader refuses connections.
func (s *suspicion) refuses(peer string) bool {
	for range probes {
		addr, id := s.n.raft.LeaderWithID()
		_, hostport, err := SplitAddress(addr)
		if string(id) != peer || err != nil {
			return false
		}
		ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
		err = s.n.identity.Probe(ctx, hostport)
		cancel()
		if errors.Is(err, syscall.ECONNREFUSED) {
			s.mu.Lock()
			s.leader, s.at = id, time.Now()
			s.mu.Unlock()
			return true
		}
		if err != nil || !s.pause(probePause) {
			return false // the host is silent: so is the leader, or is it
		}
	}
	return false
}

// stand lets this node become a candidate when a majority grants it a pre-vote.
func (s *suspicion) stand(leader raft.ServerID, asked *sync.WaitGroup) {
	term := s.n.raft.CurrentTerm()
	voters, rank := s.voters(leader)
	if rank < 0 || !s.pause(time.Duration(rank)*standPause) {
		return
	}
	follows := func() bool {
		_, id := s.n.raft.LeaderWithID()
		return id == leader && s.n.raft.State() == raft.Follower && s.n.raft.CurrentTerm() == term
	}
	for range standTries {
		if full, _ := s.n.disk.Full(); full != nil || !follows() {
			return
		}
		if s.gone() {
			// The one that is gone counts as a voter, too.
			if s.granted(voters, term+1, asked)+1 > (len(voters)+1)/2 {
				if !follows() {
					return // it has voted for another one while it asked
				}
				s.n.log.Info("the leader is gone: standing for election", "leader", leader, "term", term+1)
				_ = s.n.tell(context.Background(), &raft.TimeoutNowRequest{RPCHeader: s.n.header()}) // fails only when the node closes
				return
			}
		} else if !s.refuses(string(leader)) {
			return // it is heard again; what it sent before it ended, and is stored only now, counts so, too
		}
		if !s.pause(standAgain) {
			return
		}
	}
}

// voters returns all but the leader, and which of them this node is; -1 for none.
func (s *suspicion) voters(leader raft.ServerID) (voters []raft.Server, rank int) {
	for _, v := range s.n.servers() {
		if v.Suffrage == raft.Voter && v.ID != leader {
			voters = append(voters, v)
		}
	}
	slices.SortFunc(voters, func(a, b raft.Server) int {
		if a.ID < b.ID {
			return -1
		}
		return 1
	})
	return voters, slices.IndexFunc(voters, func(v raft.Server) bool { return string(v.ID) == s.n.nodeID })
}

// granted asks the other voters for a pre-vote and counts those who grant it.
func (s *suspicion) granted(voters []raft.Server, term uint64, asked *sync.WaitGroup) (n int) {
	index, lastTerm, ok := s.n.last()
	if !ok {
		return 0
	}
	req := &raft.RequestPreVoteRequest{RPCHeader: s.n.header(), Term: term, LastLogIndex: index, LastLogTerm: lastTerm}
	answers := make(chan bool, len(voters))
	for _, v := range voters {
		if string(v.ID) == s.n.nodeID {
			continue
		}
		asked.Go(func() {
			var resp raft.RequestPreVoteResponse
			err := s.n.transport.RequestPreVote(v.ID, v.Address, req, &resp)
			answers <- err == nil && resp.Granted
		})
	}
	deadline := time.After(standWait)
	for range len(voters) - 1 {
		select {
		case yes := <-answers:
			if yes {
				n++
			}
		case <-deadline:
			return n
		case <-s.n.closing:
			return 0
		}
	}
	return n
}

func (s *suspicion) pause(d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-s.n.closing:
		return false
	}
}

// header is what this node puts before what it says to others.
func (n *Node) header() raft.RPCHeader {
	return raft.RPCHeader{
		ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(n.nodeID), Addr: n.transport.EncodePeer(raft.ServerID(n.nodeID), n.self),
	}
}

// Accept implements net.Listener: it tells of connections that break.
func (l *streamLayer) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	if t, ok := c.(interface{ ConnectionState() tls.ConnectionState }); ok {
		cs := t.ConnectionState()
		if peer, ok := clusternet.PeerNode(&cs); ok {
			return &watchedConn{Conn: c, broken: func() { l.broken(peer) }}, nil
		}
	}
	return c, nil
}

// watchedConn tells once that it broke.
type watchedConn struct {
	net.Conn
	told   atomic.Bool
	broken func()
}

// Read implements net.Conn.
func (c *watchedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) && !c.told.Swap(true) {
		c.broken()
	}
	return n, err
}
