// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
)

// nextLeader waits for a leader other than this one, which is cut off.
func nextLeader(t *testing.T, c *storetest.Cluster, former *storetest.Node) (*storetest.Node, uint64) {
	t.Helper()
	var next *storetest.Node
	var term uint64
	c.Eventually("another node leads", func() error {
		for _, n := range c.Nodes {
			if l, ok := n.Leadership(); ok && n != former {
				next, term = n, l.Term
				return nil
			}
		}
		return errors.New("none does")
	})
	return next, term
}

// handOver has a leader hand over to another node.
func handOver(t *testing.T, c *storetest.Cluster, leader *storetest.Node) (next *storetest.Node, term uint64) {
	t.Helper()
	c.Eventually("it hands over", func() error {
		if _, ok := leader.Leadership(); !ok {
			return nil
		}
		return leader.TransferLeadership()
	})
	return nextLeader(t, c, leader)
}

// askedUntil is LastConfirmed when enough of the voters have come to the term; it fails
// when the node leads in it no more.
func askedUntil(t *testing.T, c *storetest.Cluster, n *storetest.Node, term uint64) (got configdb.Confirmed, asked time.Time, err error) {
	t.Helper()
	c.Eventually("the voters answer", func() error {
		asked = time.Now()
		if got, err = n.LastConfirmed(t.Context(), term); err == nil {
			return nil
		}
		if l, ok := n.Leadership(); !ok || l.Term != term {
			return nil
		}
		return err
	})
	return got, asked, err
}

// A new leader learns when the one before it was confirmed for the last time: neither
// later than it was, nor much earlier, and not of its own confirmations.
func TestANewLeaderLearnsWhenTheFormerOneWasConfirmed(t *testing.T) {
	c := storetest.NewCluster(t, 3)
	c.Eventually("one leader follows the other, and nobody else", func() error {
		c.Heal()
		// Not by Cluster.Leader, which asks both followers and waits for one.
		former, term := nextLeader(t, c, nil)
		for _, n := range c.Followers(former) { // it has the list of voters
			set(t, n, "k", "1")
		}
		// One alone can confirm it: what the other is asked may come to it later than the answer.
		c.Refuse(former, c.Followers(former)[0])
		before := time.Now()
		if err := former.Confirm(t.Context(), term); err != nil {
			return err
		}
		c.Isolate(former)
		after := time.Now()
		if err := former.Confirm(t.Context(), term); err == nil {
			t.Fatal("a leader without a majority was confirmed")
		}
		next, term := nextLeader(t, c, former)
		const pause = 300 * time.Millisecond
		time.Sleep(pause) // what it is asked itself must not count
		if err := next.Confirm(t.Context(), term); err != nil {
			return err
		}
		got, asked, err := askedUntil(t, c, next, term)
		if err != nil {
			return err
		}
		if by := former.ID; got.By != by {
			t.Errorf("%q was confirmed, it was %q", got.By, by)
		}
		if least, most := asked.Sub(after), time.Since(before); got.Ago < pause || got.Ago > most || got.Ago < least {
			t.Errorf("the former leader was confirmed %v ago, they say; it was between %v and %v", got.Ago, least, most)
		}
		if _, err := former.LastConfirmed(t.Context(), term); err == nil {
			t.Error("a node that does not lead was answered")
		}
		return nil
	})
}

func TestAMinorityDoesNotKnowWhoWasConfirmed(t *testing.T) {
	c := storetest.NewCluster(t, 3)
	c.Eventually("it asks before it is deposed", func() error {
		c.Heal()
		leader := c.Leader()
		l, _ := leader.Leadership()
		c.Isolate(leader)
		got, err := leader.LastConfirmed(t.Context(), l.Term)
		if err == nil {
			t.Fatalf("it alone says %+v", got)
		}
		if !strings.Contains(err.Error(), "1 of 3 voters") {
			return err
		}
		return nil
	})
}

// By a new list of voters it cannot be told whom the voters of an earlier one confirmed,
// so that they were changed counts, whoever did it.
func TestAChangeOfTheVotersIsNotLookedPast(t *testing.T) {
	c := storetest.NewCluster(t, 3)
	c.Eventually("the voters are changed, and nobody is deposed", func() error {
		first := c.Leader()
		for _, n := range c.Nodes { // when it is tried again
			if err := first.AddMember(n.ID, n.Address, true); err != nil {
				return err
			}
		}
		leader, term := handOver(t, c, first) // the first made the list of voters
		gone := c.Followers(leader)[0]
		changed := time.Now()
		if err := leader.DemoteMember(gone.ID); err != nil {
			return err
		}
		got, _, err := askedUntil(t, c, leader, term)
		if err != nil {
			return err
		}
		if got.Ago > time.Since(changed) || got.By != "" {
			t.Errorf("of voters that did not elect it it knows %+v", got)
		}
		changed = time.Now()
		if err := leader.AddMember(gone.ID, gone.Address, true); err != nil {
			return err
		}
		next, term := handOver(t, c, leader)
		if got, _, err = askedUntil(t, c, next, term); err != nil {
			return err
		}
		if got.Ago > time.Since(changed) {
			t.Errorf("%v ago, but the voters were changed %v ago", got.Ago, time.Since(changed))
		}
		return nil
	})
}
