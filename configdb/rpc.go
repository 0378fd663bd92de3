// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/configdb/raftnode"
	"github.com/muster-vm/muster/internal/clusternet"
)

// The methods between replicas.
const (
	methodReadIndex = "configdb.readindex"
)

// codeNotLeader marks a refusal after which nothing was proposed.
const codeNotLeader = "not_leader"

type notLeaderError struct{ error }

// RPCCode implements the coded error of clusternet.
func (notLeaderError) RPCCode() string { return codeNotLeader }

func (s *Store) register(srv *clusternet.RPCServer) {
	srv.Handle(methodTxns, s.serveTxns)
	srv.Handle(methodTerm, s.serveTerm)
	srv.Handle(methodTold, s.serveTold)
	srv.Handle(methodReadIndex, func(ctx context.Context, _ []byte) ([]byte, error) {
		rev, err := s.readIndex(ctx)
		if err != nil {
			return nil, codedLeader(err)
		}
		s.notify(clusternet.CallerOf(ctx)) // it waits until it has applied that
		return binary.AppendUvarint(nil, rev), nil
	})
}

func codedLeader(err error) error {
	if wasNotProposed(err) {
		return notLeaderError{err}
	}
	return err
}

// callTxns makes one call to the leader with several transactions.
func (s *Store) callTxns(leader target, body []byte) ([]byte, error) {
	ctx, cancel := attempt(context.Background(), s.leaderChange())
	defer cancel()
	reply, err := s.cfg.Client.Call(ctx, leader.nodeID, leader.address, methodTxns, body)
	return reply, remoteLeader(err)
}

func (s *Store) callReadIndex(ctx context.Context, leader target) (uint64, error) {
	b, err := s.cfg.Client.Call(ctx, leader.nodeID, leader.address, methodReadIndex, nil)
	if err != nil {
		return 0, remoteLeader(err)
	}
	return decodeNumber(methodReadIndex, b)
}

// decodeNumber reads an answer that is one number.
func decodeNumber(method string, b []byte) (uint64, error) {
	v, n := binary.Uvarint(b)
	if n <= 0 || n < len(b) {
		return 0, fmt.Errorf("%s: malformed answer", method)
	}
	return v, nil
}

func remoteLeader(err error) error {
	var re *clusternet.RemoteError
	if errors.As(err, &re) && re.Code == codeNotLeader {
		return errNotLeader
	}
	return err
}

func appendOutcome(b []byte, o fsm.Outcome) []byte {
	b = binary.AppendUvarint(b, o.Revision)
	b = append(b, byte(o.Status))
	b = binary.AppendUvarint(b, uint64(o.Failed))
	return binary.AppendUvarint(b, o.Actual)
}

// decodeOutcome reads an outcome and returns what follows it.
func decodeOutcome(b []byte) (o fsm.Outcome, rest []byte, err error) {
	malformed := fmt.Errorf("%s: malformed answer", methodTxns)
	var v [3]uint64
	for i := range v {
		n := 0
		if v[i], n = binary.Uvarint(b); n <= 0 {
			return o, nil, malformed
		}
		b = b[n:]
		if i == 0 {
			if len(b) == 0 {
				return o, nil, malformed
			}
			o.Status, b = fsm.OutcomeStatus(b[0]), b[1:]
		}
	}
	if v[1] > fsm.MaxTxnOps {
		return o, nil, malformed
	}
	o.Revision, o.Failed, o.Actual = v[0], int(v[1]), v[2] //nolint:gosec // bounded above
	return o, b, nil
}

// The leader's view of membership and leadership, for node/ and ha/.

// Leadership returns the current leadership of this node, if it leads.
func (s *Store) Leadership() (Leadership, bool) {
	l, _ := s.leading.get()
	if l == nil {
		return Leadership{}, false
	}
	return *l, true
}

// Confirm returns nil when a majority confirmed, in a round trip that began
// after the call, that this node leads in the given term.
func (s *Store) Confirm(ctx context.Context, term uint64) error {
	if l, ok := s.Leadership(); !ok || l.Term != term {
		return errNotLeader
	}
	if _, err := s.verify.do(ctx); err != nil {
		return err
	}
	// Raft's own term, not the tracker's: this node may have lost and won
	// again meanwhile, which the tracker learns later. Terms only rise, so an
	// equal term now means that the round was in that term.
	if s.node.Term() != term {
		return errNotLeader
	}
	return nil
}

// Indexes returns the last Raft index in this node's log, committed and applied.
func (s *Store) Indexes() (last, committed, applied uint64) { return s.node.Indexes() }

// ApplyTime returns how many log entries this process has applied and how long
// that took in all.
func (s *Store) ApplyTime() (entries uint64, took time.Duration) { return s.node.ApplyTime() }

// Leader returns who leads, as far as this node knows.
func (s *Store) Leader() (nodeID, address string, ok bool) { return s.node.Leader() }

// Term returns the current Raft term.
func (s *Store) Term() uint64 { return s.node.Term() }

// Abstention is what a voter says of itself while nobody leads.
type Abstention = raftnode.Abstention

// Abstain leaves all terms before the given one for good, unless this node knows a
// leader, and says where that leaves it.
func (s *Store) Abstain(ctx context.Context, term uint64) (Abstention, error) {
	return s.node.Abstain(ctx, term)
}

// Leaderless returns for how long this node has known no leader; 0 while it knows one.
func (s *Store) Leaderless() time.Duration { return s.node.Leaderless() }

// Member is one member of the Raft group.
type Member = raftnode.Member

// Members returns the membership as far as this node knows.
func (s *Store) Members() ([]Member, error) { return s.node.Members() }

// AddMember makes a node a voter or a replica; only on the leader.
func (s *Store) AddMember(nodeID, address string, voter bool) error {
	return s.node.Add(nodeID, address, voter)
}

// RemoveMember takes a node out; only on the leader.
func (s *Store) RemoveMember(nodeID string) error { return s.node.Remove(nodeID) }

// DemoteMember takes a voter's vote and leaves it as a replica; only on the leader.
func (s *Store) DemoteMember(nodeID string) error { return s.node.Demote(nodeID) }

// TransferLeadership hands leadership to another voter; only on the leader.
func (s *Store) TransferLeadership() error { return s.node.Transfer() }

// TransferLeadershipTo hands leadership to a certain voter; only on the leader.
func (s *Store) TransferLeadershipTo(nodeID, address string) error {
	return s.node.TransferTo(nodeID, address)
}
