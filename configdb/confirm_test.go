// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb_test

import (
	"errors"
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

// askedUntil is LastConfirmed when enough of the voters have come to the term.
func askedUntil(t *testing.T, c *storetest.Cluster, n *storetest.Node, term uint64) (got configdb.Confirmed, took time.Duration) {
	t.Helper()
	c.Eventually("the voters answer", func() (err error) {
		began := time.Now()
		got, err = n.LastConfirmed(t.Context(), term)
		took = time.Since(began)
		return err
	})
	return got, took
}

// A new leader learns when the one before it was confirmed for the last time: neither
// later than it was, nor much earlier, and not of its own confirmations.
func TestANewLeaderLearnsWhenTheFormerOneWasConfirmed(t *testing.T) {
	c := storetest.NewCluster(t, 3)
	former := c.Leader()
	l, ok := former.Leadership()
	if !ok {
		t.Fatal("the leader changed by itself")
	}
	for _, n := range c.Followers(former) { // it has the list of voters
		set(t, n, "k", "1")
	}
	before := time.Now()
	if err := former.Confirm(t.Context(), l.Term); err != nil {
		t.Fatal(err)
	}
	c.Isolate(former)
	if err := former.Confirm(t.Context(), l.Term); err == nil {
		t.Fatal("a leader without a majority was confirmed")
	}
	next, term := nextLeader(t, c, former)
	const pause = 300 * time.Millisecond
	time.Sleep(pause) // what it is asked itself must not count
	if err := next.Confirm(t.Context(), term); err != nil {
		t.Fatal(err)
	}
	got, took := askedUntil(t, c, next, term)
	if by := former.ID; got.By != by {
		t.Errorf("%q was confirmed, it was %q", got.By, by)
	}
	if since := time.Since(before); got.Ago < pause || got.Ago > since || got.Ago < since-took-time.Second {
		t.Errorf("the former leader was confirmed %v ago, they say; it was %v", got.Ago, since)
	}
	if _, err := former.LastConfirmed(t.Context(), term); err == nil {
		t.Error("a node that does not lead was answered")
	}
}

func TestAMinorityDoesNotKnowWhoWasConfirmed(t *testing.T) {
	c := storetest.NewCluster(t, 3)
	leader := c.Leader()
	l, _ := leader.Leadership()
	c.Isolate(leader)
	if got, err := leader.LastConfirmed(t.Context(), l.Term); err == nil {
		t.Errorf("it alone says %+v", got)
	}
}

// What a voter forgets counts as having been a moment ago.
func TestAVoterThatWasStartedAnewForgets(t *testing.T) {
	c := storetest.NewCluster(t, 3)
	former := c.Leader()
	rest := c.Followers(former)
	rest[0].Stop()
	rest[0].Start()
	began := time.Now()
	c.Eventually("it follows", func() error {
		_, err := rest[0].View(t.Context())
		return err
	})
	c.Isolate(former)
	next, term := nextLeader(t, c, former)
	if got, _ := askedUntil(t, c, next, term); got.Ago > time.Since(began) {
		t.Errorf("%v ago, and one of two was started %v ago", got.Ago, time.Since(began))
	}
}

// By a new list of voters it cannot be told whom the voters of an earlier one confirmed.
func TestAChangeOfTheVotersIsNotLookedPast(t *testing.T) {
	c := storetest.NewCluster(t, 3)
	first := c.Leader()
	if err := first.TransferLeadership(); err != nil { // it made the list of voters
		t.Fatal(err)
	}
	leader, term := nextLeader(t, c, first)
	askedUntil(t, c, leader, term)
	gone := c.Followers(leader)[0]
	if err := leader.DemoteMember(gone.ID); err != nil {
		t.Fatal(err)
	}
	if got, err := leader.LastConfirmed(t.Context(), term); err == nil {
		t.Errorf("of voters that did not elect it it knows %+v", got)
	}
	changed := time.Now()
	if err := leader.AddMember(gone.ID, gone.Address, true); err != nil {
		t.Fatal(err)
	}
	if err := leader.TransferLeadership(); err != nil {
		t.Fatal(err)
	}
	next, term := nextLeader(t, c, leader)
	if got, _ := askedUntil(t, c, next, term); got.Ago > time.Since(changed) {
		t.Errorf("%v ago, but the voters were changed %v ago", got.Ago, time.Since(changed))
	}
}
