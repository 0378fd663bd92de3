// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

// hint returns what a node heard of another.
func (h *host) hint(name string) *api.GossipHint {
	h.f.t.Helper()
	var s api.ClusterStatus
	h.f.decode(h.run("cluster", "status", "-o", "json"), &s)
	for _, m := range s.Members {
		if m.Node == name {
			return m.Gossip
		}
	}
	return nil
}

// hears waits until a node has heard that another is in a state.
func (h *host) hears(within time.Duration, name string, want ...api.GossipState) time.Duration {
	h.f.t.Helper()
	began := time.Now()
	h.f.eventually(within, fmt.Sprintf("%s has %s as %v", h.name, name, want), func() error {
		got := h.hint(name)
		if got == nil {
			return fmt.Errorf("it has no hint")
		}
		for _, w := range want {
			if got.State == w {
				return nil
			}
		}
		return fmt.Errorf("it is %s", got.State)
	})
	return time.Since(began)
}

// A stopped daemon is suspect and then dead to the others, long before its lease
// ends, and nothing is decided by that.
func TestGossipHintsAtAStoppedDaemon(t *testing.T) {
	f := newFlock(t, 3)
	f.up()
	a, b, c := f.nodes[0], f.nodes[1], f.nodes[2]
	for _, h := range f.nodes {
		for _, o := range f.nodes {
			h.hears(60*time.Second, o.name, api.GossipAlive)
		}
	}
	f.eventually(60*time.Second, "the load of n3 is known at n1", func() error {
		l := a.hint("n3").Load
		if l == nil || l.Version == "" || l.CPUPercent == nil || l.MemoryTotal == 0 || l.MemoryFree == 0 || l.DiskTotal == 0 || l.Revision == 0 || l.FeatureLevel == 0 {
			return fmt.Errorf("it is %+v", l)
		}
		return nil
	})
	if out := a.run("node", "ls", "-o", "wide"); strings.Count(out, "alive") != 3 || !strings.Contains(out, "DISK-FREE") {
		t.Errorf("node ls -o wide:\n%s", out)
	}
	if out := a.run("node", "show", "n3"); !strings.Contains(out, "Gossip, as node n1 has it (a hint)") {
		t.Errorf("node show:\n%s", out)
	}
	if out := a.run("service", "ls", "--node", "n2"); !strings.Contains(out, " gossip ") {
		t.Errorf("service ls:\n%s", out)
	}

	stopped := time.Now()
	c.signal(syscall.SIGSTOP)
	defer c.signal(syscall.SIGCONT)
	suspect := a.hears(60*time.Second, "n3", api.GossipSuspect, api.GossipDead)
	a.hears(60*time.Second, "n3", api.GossipDead)
	t.Logf("suspect after %v, dead after %v", suspect, time.Since(stopped))
	b.hears(60*time.Second, "n3", api.GossipDead)
	p := a.node("n3").Status.Phase
	if since := time.Since(stopped); since < 10*time.Second && p != api.NodeReady { // its lease lasts that long
		t.Errorf("after %v n3 is %s: something was decided by a hint", since, p)
	}
	c.signal(syscall.SIGCONT)
	for _, h := range []*host{a, b} {
		h.hears(60*time.Second, "n3", api.GossipAlive)
	}
	c.hears(60*time.Second, "n1", api.GossipAlive)

	// In good order. Its last word has a second, in which the machine may stand still.
	leaves := func() bool {
		b.stop()
		a.hears(60*time.Second, "n2", api.GossipLeft, api.GossipDead)
		return a.hint("n2").State == api.GossipLeft
	}
	for i := 0; !leaves(); i++ {
		if i == 4 {
			t.Fatal("it does not say that it leaves")
		}
		b.start()
		a.hears(60*time.Second, "n2", api.GossipAlive)
	}
	b.start()
	a.hears(60*time.Second, "n2", api.GossipAlive)
	b.hears(60*time.Second, "n1", api.GossipAlive)
}

// After a removal the remaining nodes go on with a key that the removed one never
// had, and a node that joins later gets it.
func TestGossipAfterARemoval(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 4)
	late := f.nodes[3]
	f.nodes = f.nodes[:3]
	f.up()
	f.nodes = append(f.nodes, late)
	a, b, c := f.nodes[0], f.nodes[1], f.nodes[2]
	a.hears(60*time.Second, "n3", api.GossipAlive)
	a.run("node", "remove", "n3") // n3 itself may be gone before it has answered
	<-c.exited
	for _, h := range []*host{a, b} { // the next key, the switch, and the end of the old one
		f.eventually(90*time.Second, h.name+" changed its keys", func() error {
			if n := strings.Count(h.log(), `msg="gossip keys changed"`); n != 3 || !strings.Contains(h.log(), "keys=1") {
				return fmt.Errorf("%d changes", n)
			}
			return nil
		})
	}
	if h := a.hint("n3"); h != nil {
		t.Errorf("the removed node is still there: %+v", h)
	}
	late.start()
	late.run("cluster", "join", f.joinToken(b), "--data-dir", late.dataDir)
	for _, h := range []*host{a, b} {
		h.hears(60*time.Second, "n4", api.GossipAlive)
		late.hears(60*time.Second, h.name, api.GossipAlive)
	}
	a.hears(60*time.Second, "n2", api.GossipAlive)
}

func TestUDPPortInUse(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 1)
	h := f.nodes[0]
	udp, err := net.ListenPacket("udp", h.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = udp.Close() }()
	h.refuseStart("cannot listen on UDP " + h.addr)
}
