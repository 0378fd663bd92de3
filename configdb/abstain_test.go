// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/muster-vm/muster/configdb/storetest"
)

// A voter that says that nobody leads acknowledges nothing of an earlier term any more,
// and of the term that it is in it says whether it has voted.
func TestVotersLeaveTheirTermsWhileNobodyLeads(t *testing.T) {
	c := storetest.NewCluster(t, 3)
	leader := c.Leader()
	for _, n := range c.Nodes { // it has the list of voters
		set(t, n, "k", "1")
	}
	rest := c.Followers(leader)
	was := leader.Term()
	c.Eventually("a follower knows its leader", func() error {
		if d := rest[0].Leaderless(); d != 0 {
			return fmt.Errorf("leaderless for %v", d)
		}
		return nil
	})
	if a, err := rest[0].Abstain(t.Context(), was+5); err == nil {
		t.Errorf("with a leader: %+v", a)
	}
	for _, n := range c.Nodes {
		c.Isolate(n)
	}
	c.Eventually("nobody knows a leader", func() error {
		for _, n := range c.Nodes {
			if d := n.Leaderless(); d < 200*time.Millisecond {
				return fmt.Errorf("leaderless for %v", d)
			}
		}
		return nil
	})
	leave := was + 10
	for _, n := range c.Nodes[:2] {
		a, err := n.Abstain(t.Context(), leave)
		if err != nil || a.Term != leave || a.Voted || len(a.Voters) != 3 {
			t.Errorf("%+v, %v", a, err)
		}
	}
	again, err := c.Nodes[0].Abstain(t.Context(), was) // of what it has left already
	if err != nil || again.Term < leave {
		t.Errorf("%+v, %v", again, err)
	}
	c.Nodes[0].Stop()
	c.Nodes[0].Start()
	c.Isolate(c.Nodes[0])
	if term := c.Nodes[0].Term(); term < leave {
		t.Errorf("after a restart it is in term %d; it left what is before %d", term, leave)
	}
	c.Heal()
	set(t, c.Nodes[2], "k", "2")
	if term := c.Leader().Term(); term <= leave {
		t.Errorf("a leader of term %d, that two of three have left or not voted in", term)
	}
	set(t, c.Nodes[0], "k", "3")
}

// Who stood for election and was not elected has voted for itself.
func TestAbstentionSaysThatItHasVoted(t *testing.T) {
	c := storetest.NewCluster(t, 1)
	n := c.Leader()
	if _, err := n.Abstain(t.Context(), n.Term()+1); err == nil {
		t.Error("a leader left its term")
	}
	three := storetest.NewCluster(t, 3)
	leader := three.Leader()
	for _, f := range three.Followers(leader) {
		set(t, f, "k", "1")
	}
	handOver(t, three, leader) // the first leader was elected by nobody else
	set(t, leader, "k", "2")
	leader = three.Leader()
	voters := 0
	for _, f := range three.Followers(leader) {
		three.Isolate(f)
	}
	three.Eventually("the followers miss the leader", func() error {
		for _, f := range three.Followers(leader) {
			if f.Leaderless() == 0 {
				return errors.New("not yet")
			}
		}
		return nil
	})
	for _, f := range three.Followers(leader) {
		a, err := f.Abstain(t.Context(), 0)
		if err != nil || a.Term != leader.Term() {
			t.Fatalf("%+v, %v", a, err)
		}
		if a.Voted {
			voters++
		}
	}
	if voters == 0 {
		t.Error("nobody has voted for the leader")
	}
}
