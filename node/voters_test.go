// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb/quorum"
)

// Four hosts: three vote, the fourth stands by and takes the place of one that
// is lost. Leadership goes where it is sent, and away from a leader that rests
// or ends.
func TestTheRightNodesVote(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 4)
	f.up()
	n1, n2, n4 := f.nodes[0], f.nodes[1], f.nodes[3]
	if s := n1.members(); votes(s, "n4") {
		t.Fatalf("the fourth node votes: %+v", s.Members)
	}
	n1.refuse(4, "has no vote", "cluster", "transfer", "n4")
	n1.refuse(3, "does not exist", "cluster", "transfer", "nobody")
	n1.run("cluster", "transfer", "n2")
	f.leads(60*time.Second, n4, func(leader string) bool { return leader == "n2" })
	n1.refuse(2, "role", "node", "set", "n4", "--role", "boss")

	// A leader in maintenance hands over by itself.
	n1.run("node", "maintenance", "on", "n2")
	f.leads(60*time.Second, n4, func(leader string) bool { return leader != "n2" && leader != "" })
	n1.refuse(4, "maintenance", "cluster", "transfer", "n2")
	n1.run("node", "maintenance", "off", "n2")

	// So does one that ends, before anybody misses it.
	leader := f.leader(n4)
	began := time.Now()
	leader.stop()
	f.leads(60*time.Second, n4, func(name string) bool { return name != leader.name && name != "" })
	t.Logf("a new leader %s after the old one was asked to end", time.Since(began))

	// It does not come back: the replica votes in its place.
	f.eventually(quorum.LostAfter+30*time.Second, "n4 votes instead", func() error {
		s := n4.members()
		if !votes(s, "n4") || votes(s, leader.name) {
			return fmt.Errorf("%+v", s.Members)
		}
		return nil
	})
	leader.start()
	f.eventually(60*time.Second, "it is back", func() error {
		if p := n4.node(leader.name).Status.Phase; p != api.NodeReady {
			return fmt.Errorf("it is %s", p)
		}
		return nil
	})
	// A node that shall not vote gives its vote to the one that came back.
	var other *host
	now := f.leader(n4)
	for _, h := range []*host{n1, n2, f.nodes[2]} {
		if h != leader && h != now {
			other = h
		}
	}
	n4.run("node", "set", other.name, "--role", "replica")
	f.eventually(60*time.Second, leader.name+" votes instead of "+other.name, func() error {
		s := n4.members()
		if votes(s, other.name) || !votes(s, leader.name) {
			return fmt.Errorf("%+v", s.Members)
		}
		return nil
	})
}

// leads waits until the leader, as a host sees it, is as wanted.
func (f *flock) leads(within time.Duration, at *host, ok func(leader string) bool) {
	f.t.Helper()
	f.eventually(within, "the leader changes", func() error {
		if s := at.members(); !ok(s.Leader) {
			return fmt.Errorf("%q leads", s.Leader)
		}
		return nil
	})
}
