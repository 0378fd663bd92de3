// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/muster-vm/muster/configdb"
)

// Who leads, and for how long nobody does, by the clock of a bubble, which no stall of
// the machine moves.

// inBubble runs a test on three voters.
func inBubble(t *testing.T, f func(t *testing.T, b *Bubble)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b := NewBubble(t, BubbleConfig{Nodes: 3, Seed: 1, SnapshotEvery: 1000, TrailingLogs: 1000})
		defer b.Close()
		f(t, b)
	})
}

// leads waits for a leader and returns it with its term, and the other nodes.
func (b *Bubble) leads() (leader *BubbleNode, term uint64, rest []*BubbleNode) {
	b.tb.Helper()
	s := b.Leader()
	for _, n := range b.nodes {
		if n.current() == s {
			leader = n
		} else {
			rest = append(rest, n)
		}
	}
	l, _ := s.Leadership()
	return leader, l.Term, rest
}

// apart has some nodes hear each other, and the rest too, but nobody of the others.
func (b *Bubble) apart(nodes ...*BubbleNode) {
	for _, x := range b.nodes {
		for _, y := range b.nodes {
			b.net.setSilent(x.index, y.index, slices.Contains(nodes, x) != slices.Contains(nodes, y))
		}
	}
}

func (n *BubbleNode) set(key, value string) {
	n.b.tb.Helper()
	tx := &configdb.Txn{}
	tx.Put(key, []byte(value))
	if _, err := n.current().Txn(context.Background(), tx); err != nil {
		n.b.tb.Fatalf("set %s: %v", key, err)
	}
}

// A voter that loses the leader, and is told that nobody listens there, must not
// take the lead from it while the others hear it.
func TestOneVotersMistakeDeposesNobody(t *testing.T) {
	inBubble(t, func(t *testing.T, b *Bubble) {
		leader, term, rest := b.leads()
		leader.set("k", "before")
		b.net.refuse(rest[0].index, leader.index)
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			leader.set("k", "after")
		}
		if now, ok := leader.current().Leadership(); !ok || now.Term != term {
			t.Errorf("it led in term %d; now it leads: %t, in term %d", term, ok, now.Term)
		}
	})
}

// A crash of the leader is seen at once, also by who has just got something from it. The
// bound is far below the time that Raft alone would need.
func TestALeaderThatCrashedIsReplacedAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, b *Bubble) {
		var took []time.Duration
		for range 5 {
			old, _, rest := b.leads()
			rest[0].set("k", "before")
			old.hold(true)
			began := time.Now()
			old.crash()
			rest[0].set("k", "after")
			took = append(took, time.Since(began))
			old.hold(false)
			b.Eventually("it is back", func(ctx context.Context) error {
				s := old.current()
				if s == nil {
					return errors.New("it is down")
				}
				_, err := s.View(ctx)
				return err
			})
		}
		slices.Sort(took)
		t.Logf("without a leader for %v", took)
		if median := took[len(took)/2]; median > 500*time.Millisecond {
			t.Errorf("the median is %s", median)
		}
	})
}

// The leader makes a replica a voter with the replica's help alone, and falls silent. The
// other voter has never heard of that; the two together are a majority.
func TestAVoterThatTheOthersDoNotKnowYetIsElected(t *testing.T) {
	inBubble(t, func(t *testing.T, b *Bubble) {
		leader, _, rest := b.leads()
		behind, fresh := rest[0], rest[1]
		leader.set("x", "1")
		if err := leader.current().DemoteMember(fresh.id); err != nil {
			t.Fatal(err)
		}
		b.Eventually("all know it", func(context.Context) error {
			for _, n := range b.nodes {
				members, err := n.current().Members()
				if err != nil || slices.ContainsFunc(members, func(m configdb.Member) bool { return m.NodeID == fresh.id && m.Voter }) {
					return fmt.Errorf("not yet: %v, %v", members, err)
				}
			}
			return nil
		})
		b.apart(behind)
		if err := leader.current().AddMember(fresh.id, memAddress(fresh.index).String(), true); err != nil {
			t.Fatal(err)
		}
		b.apart(leader)
		behind.set("x", "2")
		fresh.set("x", "3")
	})
}
