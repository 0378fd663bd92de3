// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
	"github.com/muster-vm/muster/internal/freeport"
	"github.com/muster-vm/muster/internal/gossip"
	"github.com/muster-vm/muster/internal/pki"
)

// keeperOf returns a keeper on the leader of three, in a cluster of an earlier
// version, which has no keys of gossip.
func keeperOf(t *testing.T) (*keyKeeper, *storetest.Cluster) {
	t.Helper()
	m, c := leaderOf(t, 3)
	m.info.ClusterID, m.info.clusterKey = api.NewID(), pki.NewSecret(pki.ClusterKeyBytes)
	o := api.Cluster{Meta: api.NewMeta(api.KindCluster, "", "c"), Spec: api.ClusterSpec{Life: 1}}
	o.Meta.ID = m.info.ClusterID
	tx := &configdb.Txn{}
	if err := configdb.Clusters.Create(tx, &o); err != nil {
		t.Fatal(err)
	}
	if _, err := m.store.Txn(t.Context(), tx); err != nil {
		t.Fatal(err)
	}
	return &keyKeeper{m: m, stage: time.Hour}, c
}

// keys steps once, as if the last step were long ago if settled, and returns what
// is in the database then, and its revision.
func (k *keyKeeper) keys(t *testing.T, settled bool) (*api.GossipKeys, uint64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	k.stage = time.Hour
	if settled {
		k.stage = 0
	}
	if err := k.step(ctx, k.m.store.Term()); err != nil {
		t.Fatal(err)
	}
	o, err := configdb.Clusters.Get(k.m.store.Local(), k.m.info.ClusterID)
	if err != nil {
		t.Fatal(err)
	}
	return o.Spec.Gossip, o.Meta.Revision
}

func (k *keyKeeper) remove(t *testing.T, id string, fromGroup bool) {
	t.Helper()
	if err := deleteNode(t.Context(), k.m.store, expelRequest{NodeID: id, Actor: "test"}, k.m.store.Term()); err != nil {
		t.Fatal(err)
	}
	if fromGroup {
		if err := k.m.store.RemoveMember(id); err != nil {
			t.Fatal(err)
		}
	}
}

func TestGossipKeysChangeWhenANodeIsRemoved(t *testing.T) {
	k, c := keeperOf(t)
	first, rev := k.keys(t, false)
	if first == nil || len(first.Primary) == 0 || first.Next != nil || first.Previous != nil || first.Removed != 0 {
		t.Fatalf("an earlier cluster got %+v", first)
	}
	if _, again := k.keys(t, true); again != rev {
		t.Error("written again without a reason")
	}
	others := c.Followers(c.Leader())

	// While the removed node is in the group it would be sent the new key.
	k.remove(t, others[0].ID, false)
	if _, again := k.keys(t, true); again != rev {
		t.Error("a new key was written while the removed node was in the group")
	}
	if err := k.m.store.RemoveMember(others[0].ID); err != nil {
		t.Fatal(err)
	}
	staged, _ := k.keys(t, true)
	if string(staged.Primary) != string(first.Primary) || len(staged.Next) == 0 || staged.Previous != nil || staged.Removed != 1 {
		t.Fatalf("staged: %+v", staged)
	}
	// Nothing moves before its time, not even for another removal.
	k.remove(t, others[1].ID, true)
	if now, _ := k.keys(t, false); !sameGossipKeys(now, staged) {
		t.Errorf("too early: %+v", now)
	}
	switched, _ := k.keys(t, true)
	if string(switched.Primary) != string(staged.Next) || switched.Next != nil || string(switched.Previous) != string(first.Primary) {
		t.Fatalf("switched: %+v", switched)
	}
	if now, _ := k.keys(t, false); !sameGossipKeys(now, switched) {
		t.Errorf("too early: %+v", now)
	}
	done, _ := k.keys(t, true)
	if string(done.Primary) != string(staged.Next) || done.Next != nil || done.Previous != nil {
		t.Fatalf("done: %+v", done)
	}
	// The second removal has its own key after that: the second node knew this one.
	again, _ := k.keys(t, true)
	if len(again.Next) == 0 || again.Removed != 2 {
		t.Fatalf("after the second removal: %+v", again)
	}
	k.keys(t, true)
	last, rev := k.keys(t, true)
	if string(last.Primary) != string(again.Next) || last.Previous != nil || last.Removed != 2 {
		t.Fatalf("at the end: %+v", last)
	}
	if _, now := k.keys(t, true); now != rev {
		t.Error("written again without a reason")
	}
}

// Every node makes the same keys of what is in the database, and another cluster
// with the same secrets makes others.
func TestGossipKeysAreOpened(t *testing.T) {
	k, _ := keeperOf(t)
	m := k.m
	seal := func() []byte {
		b, err := newGossipKey(m.info.clusterKey)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	spec := &api.ClusterSpec{Life: 1, Gossip: &api.GossipKeys{Primary: seal(), Next: seal(), Previous: seal()}}
	one, err := m.gossipKeys(spec)
	if err != nil || len(one.Primary) != gossip.KeyBytes || len(one.Others) != 2 {
		t.Fatalf("%d others, %v", len(one.Others), err)
	}
	recovered := *spec
	recovered.Life = 2
	two, err := m.gossipKeys(&recovered)
	if err != nil || string(two.Primary) == string(one.Primary) {
		t.Errorf("the next life has the same key: %v", err)
	}
	// Keys that are sealed with another cluster key are replaced.
	if first, _ := k.keys(t, false); first == nil {
		t.Fatal("no keys")
	}
	m.info.clusterKey = pki.NewSecret(pki.ClusterKeyBytes)
	if now, _ := k.keys(t, false); now == nil {
		t.Fatal("no keys")
	}
	o, err := configdb.Clusters.Get(m.store.Local(), m.info.ClusterID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.gossipKeys(&o.Spec); err != nil {
		t.Errorf("after the change of the cluster key: %v", err)
	}
}

// A deposed leader's step does not land.
func TestGossipKeysNeedTheTerm(t *testing.T) {
	k, _ := keeperOf(t)
	if err := k.step(t.Context(), k.m.store.Term()+1); err == nil {
		t.Error("a step of another term was written")
	}
	if o, err := configdb.Clusters.Get(k.m.store.Local(), k.m.info.ClusterID); err != nil || o.Spec.Gossip != nil {
		t.Errorf("%+v, %v", o.Spec.Gossip, err)
	}
}

// What gossip is told follows the database.
func TestGossipIsToldWhoIsAMember(t *testing.T) {
	k, c := keeperOf(t)
	m := k.m
	m.gossip = gossip.New(gossip.Config{NodeID: m.info.NodeID, Log: slog.New(slog.DiscardHandler)})
	k.keys(t, false)
	before := m.gossipMark(m.store.Local())
	if err := m.setGossip(m.store.Local()); err != nil {
		t.Fatal(err)
	}
	if got := m.gossipMembers(); got["unknown"] != 2 || got["alive"] != 1 || len(m.gossip.Peers()) != 3 {
		t.Errorf("%v of %v", got, m.gossip.Peers())
	}
	gone := c.Followers(c.Leader())[0].ID
	k.remove(t, gone, true)
	if m.gossipMark(m.store.Local()) == before {
		t.Error("the mark does not show the removal")
	}
	if err := m.setGossip(m.store.Local()); err != nil {
		t.Fatal(err)
	}
	hints := m.hints()
	if len(hints) != 2 || hints[gone] != nil || hints[m.info.NodeID].State != api.GossipAlive {
		t.Errorf("hints %v", hints)
	}
}

func TestLoadOfABrokenNodeIsCut(t *testing.T) {
	const most = 1<<64 - 1
	l := loadOf(gossip.Summary{CPUPercent: -1, MemoryFree: most, MemoryTotal: most, DiskFree: most, DiskTotal: most, VMs: most, Revision: most, FeatureLevel: most})
	if l.CPUPercent != nil || l.MemoryFree < 0 || l.DiskTotal < 0 || l.VMs < 0 || l.FeatureLevel < 0 || l.Revision != most {
		t.Errorf("%+v", l)
	}
}

func TestPortIsTakenForTCPAndUDP(t *testing.T) {
	addr := freeport.Loopback(t)
	udp, err := net.ListenPacket("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = udp.Close() }()
	if _, _, err := listenPort(addr); err == nil || !strings.Contains(err.Error(), "UDP "+addr) || !strings.Contains(err.Error(), "--listen") {
		t.Errorf("a taken UDP port: %v", err)
	}
	// The TCP port was given free again.
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	_ = ln.Close()
}
