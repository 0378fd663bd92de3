// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/raft"
)

// Abstention is what a voter says of itself while nobody leads.
type Abstention struct {
	// Term that it is in; it acknowledges nothing of an earlier one, ever.
	Term uint64
	// Voted is that it has given a vote in that term.
	Voted bool
	// Voters by the newest membership in its log, sorted.
	Voters []string
}

// errHasLeader refuses to leave a term in which there is a leader.
var errHasLeader = errors.New("this node knows a leader")

// noAddress is an address that no server has, so that Raft does not take the request
// for one of the leader's own.
const noAddress = "-"

// Abstain makes sure that this node is at least in a term, unless it knows a leader.
// It does so as any voter does who hears of a higher term: by a request for a vote, of
// a candidate with an empty log, to whom Raft grants none.
func (n *Node) Abstain(ctx context.Context, term uint64) (Abstention, error) {
	if _, last, ok := n.last(); !ok || last == 0 {
		return Abstention{}, errors.New("this node has no log yet")
	}
	if n.knowsLeader() {
		return Abstention{}, errHasLeader
	}
	n.abstains.Lock()
	defer n.abstains.Unlock()
	term = max(term, n.raft.CurrentTerm(), n.told.Answered()+1)
	was, err := n.floor.raise(ctx, term)
	if err != nil {
		return Abstention{}, err
	}
	h := n.header()
	h.Addr = []byte(noAddress)
	if id := n.someVoter(); id != nil {
		h.ID = id
	}
	// Also when the term is this one already: what Raft's loop was about is over then.
	if err := n.tell(ctx, &raft.RequestVoteRequest{RPCHeader: h, Term: term}); err != nil {
		return Abstention{}, err // it may leave its term yet
	}
	if n.raft.CurrentTerm() < term {
		n.floor.lower(was)
		return Abstention{}, errHasLeader
	}
	return n.abstention(term)
}

// abstention reads vote and membership in a term, which it reads last: terms only grow.
func (n *Node) abstention(term uint64) (Abstention, error) {
	a := Abstention{Term: term}
	voted, err := stableNumber(n.disk, lastVoteTerm)
	if err != nil {
		return Abstention{}, err
	}
	f := n.raft.GetConfiguration()
	if err := f.Error(); err != nil {
		return Abstention{}, fmt.Errorf("read membership: %w", err)
	}
	a.Voted = voted >= term
	if !n.told.Abstain(term, n.clock, func() bool { return !n.knowsLeader() && n.raft.CurrentTerm() == term }) {
		return Abstention{}, errHasLeader // or an election goes on, or was won since
	}
	for _, s := range f.Configuration().Servers {
		if s.Suffrage == raft.Voter {
			a.Voters = append(a.Voters, string(s.ID))
		}
	}
	slices.Sort(a.Voters)
	return a, nil
}

func (n *Node) knowsLeader() bool {
	_, _, known := n.Leader()
	return known
}

// noteLeader takes down when the leader is missed. Raft calls it at that moment; of two
// such moments it may tell in the wrong order, so Leaderless looks for itself.
func (n *Node) noteLeader(o *raft.Observation) bool {
	switch l, ok := o.Data.(raft.LeaderObservation); {
	case !ok:
	case l.LeaderID == "":
		n.missed.CompareAndSwap(0, int64(n.clock()))
	default:
		n.missed.Store(0)
	}
	return false // there is no channel to tell it to
}

// Leaderless returns for how long this node has known no leader, at most its own life; 0
// while it knows one.
func (n *Node) Leaderless() time.Duration {
	if n.knowsLeader() {
		n.missed.Store(0)
		return 0
	}
	now := n.clock()
	n.missed.CompareAndSwap(0, int64(now))
	return max(0, now-time.Duration(n.missed.Load()))
}
