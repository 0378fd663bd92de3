// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/muster-vm/muster/internal/hostboot"
)

// voter is a memory with the term and the clock that it asks for.
type voter struct {
	*Told
	term uint64
	now  time.Duration
}

func newVoter(term uint64, now time.Duration) *voter {
	return &voter{NewTold(term, now), term, now}
}

func (v *voter) current() uint64      { return v.term }
func (v *voter) clock() time.Duration { return v.now }

func (v *voter) at(term uint64, now time.Duration) *voter {
	v.term, v.now = term, now
	return v
}

func (v *voter) want(t *testing.T, leads uint64, at time.Duration, by string) {
	t.Helper()
	got, err := v.Before(leads, v.current)
	if err != nil || got != (Telling{at, by}) {
		t.Errorf("before term %d: %+v, %v; want %v to %q", leads, got, err, at, by)
	}
}

func TestAVoterRemembersWhomItTold(t *testing.T) {
	v := newVoter(3, 100)
	v.at(4, 110).Tell(4, "a", v.current, v.clock)
	v.at(4, 120).Tell(4, "a", v.current, v.clock)
	v.at(5, 130).want(t, 5, 120, "a")
	v.at(5, 140).Tell(5, "b", v.current, v.clock)
	v.want(t, 5, 120, "a") // what it told in that term itself does not count
	v.at(7, 150).want(t, 7, 140, "b")
	v.at(7, 160).Tell(5, "b", v.current, v.clock) // which leads no more
	v.at(8, 170).want(t, 8, 160, "")
	v.at(7, 170)
	if _, err := v.Before(6, v.current); err == nil {
		t.Error("the leader of an earlier term was answered")
	}
	if _, err := v.Before(8, v.current); err == nil {
		t.Error("the leader of a term in which this node is not was answered")
	}
}

func TestAVoterThatBeganAnewRemembersNothing(t *testing.T) {
	v := newVoter(3, 100)
	v.at(4, 110).want(t, 4, 100, "")
	if v.Answered() != 4 || newVoter(3, 0).Answered() != 3 {
		t.Error("it may have answered the leader of the term in which it began")
	}
}

func TestAVoterRemembersThatItSaidThatNobodyLeads(t *testing.T) {
	yes := func() bool { return true }
	v := newVoter(3, 100)
	if v.at(3, 110).Abstain(3, v.clock, yes) {
		t.Error("in a term whose leader it may have answered")
	}
	if v.Abstain(4, v.clock, func() bool { return false }) {
		t.Error("when it may not")
	}
	v.at(4, 120).want(t, 4, 100, "")
	v = newVoter(3, 100)
	if !v.at(5, 120).Abstain(5, v.clock, yes) {
		t.Fatal("it may")
	}
	v.want(t, 5, 120, "") // others elected a leader of this term after that
	if v.at(5, 130).Abstain(5, v.clock, yes) {
		t.Error("after it answered the leader of that term")
	}
	if !v.at(6, 140).Abstain(6, v.clock, yes) {
		t.Error("of a higher term it may")
	}
}

func TestANewMembershipCountsAsTold(t *testing.T) {
	v := newVoter(3, 100)
	v.at(4, 110).Tell(4, "a", v.current, v.clock)
	v.at(4, 120).Mark(6, v.clock)
	v.at(5, 130).want(t, 5, 120, "")
	if v.Answered() != 6 {
		t.Error("an earlier life of it may have answered the leader who made it a voter")
	}
}

// A node that is opened on what an earlier life left has forgotten what that one told.
func TestANodeThatIsOpenedMayHaveToldItsTermUntilThen(t *testing.T) {
	votes := &slowVotes{InmemStore: raft.NewInmemStore()}
	before := hostboot.Clock()
	n, _ := alone(t, votes)
	if n.Term() != 1 {
		t.Fatalf("term %d", n.Term())
	}
	ago, by, err := n.ToldBefore(1)
	if most := hostboot.Clock() - before; err != nil || by != "" || ago > most {
		t.Errorf("%v ago to %q, %v; it was opened within the last %v", ago, by, err, most)
	}
	if n.told.Answered() != 1 {
		t.Errorf("it says of term %d that nobody leads, whose leader it may have answered", n.told.Answered()+1)
	}
}
