// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/feature"
)

// A backup that was taken between the two steps of a removal has the node marked as
// leaving. The old cluster may have taken the mark back ("it stays") and moved VMs there
// since: nobody has said that its host is off.
func TestAHostThatWasLeavingInTheBackupMayRunVMsToo(t *testing.T) {
	_, s, _, err := raise(t, "fresh", api.RestoreRequest{})
	if err != nil {
		t.Fatal(err)
	}
	// As if the mark had been in the backup: restore keeps it (haunt does not clear it).
	n3 := s.host(t, "n3")
	now := time.Now().UTC()
	n3.Meta.DeletingAt = &now
	commit(t, s.db, func(tx *configdb.Txn) error { return configdb.Nodes.UpdateSpec(s.db.Local(), tx, &n3) })
	a := &afterlife{db: s.db, term: s.db.Term(), actor: restoreActor, log: s.log}
	if _, err := a.haunt(t.Context(), s.host(t, "n3"), "as restore does it"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"n1", "n2"} {
		s.remove(t, name)
	}
	vm, err := configdb.VMs.Find(s.db.Local(), api.DefaultProject, "runs")
	if err != nil {
		t.Fatal(err)
	}
	if vm.Status.Phase != api.VMUnknown || vm.Status.Node != "n3" {
		t.Errorf("nobody said that n3 is off, and the VM may be started on %s: %s", vm.Status.Node, vm.Status.Phase)
	}
}

// The heir of a VM may be removed in order at the same moment: it has no VM yet, so
// nothing stops that, and the VM would be bound to a node that is no more, for ever.
func TestTheHeirIsStillThere(t *testing.T) {
	_, s, _, err := raise(t, "fresh", api.RestoreRequest{SwitchedOff: []string{"n1"}})
	if err != nil {
		t.Fatal(err)
	}
	other := api.Node{Meta: api.NewMeta(api.KindNode, "", "other"), Spec: api.NodeSpec{Address: "10.7.7.7:7600"}, Status: api.NodeStatus{Phase: api.NodeReady}}
	commit(t, s.db, func(tx *configdb.Txn) error {
		if err := other.Prepare(); err != nil {
			return err
		}
		return configdb.Nodes.Create(tx, &other)
	})
	n2 := s.host(t, "n2")
	removed := false
	choose := func(v *configdb.View, vm api.VM) (heir, error) {
		if _, err := configdb.Nodes.Get(v, other.Meta.ID); err != nil {
			fresh, err := configdb.Nodes.Find(v, "", "fresh")
			return heir{nodeID: fresh.Meta.ID, node: "fresh"}, err
		}
		h := heir{nodeID: other.Meta.ID, node: "other"}
		if !removed { // chosen, and removed before the transaction lands
			removed = true
			if err := deleteNode(context.Background(), s.db, expelRequest{NodeID: other.Meta.ID, Actor: "x"}, s.db.Term()); err != nil {
				t.Fatal(err)
			}
		}
		return h, nil
	}
	r := expelRequest{NodeID: n2.Meta.ID, Actor: "test", Force: true}
	if err := takeOver(t.Context(), s.db, s.log, r, s.db.Term(), choose); err != nil {
		t.Fatal(err)
	}
	bs, _ := configdb.Bindings.List(s.db.Local())
	for _, b := range bs {
		if _, err := configdb.Nodes.Get(s.db.Local(), b.Spec.NodeID); err != nil {
			t.Errorf("vm %s is bound to node %s: %v", b.Meta.ID, b.Spec.Node, err)
		}
	}
}

// The restored cluster has lost its quorum for good; the old one may be alive. Who
// recovers the new one has nothing to say about the old hosts, and must not be made to:
// with that word all their VMs could be started here.
func TestARecoveryOfARestoredClusterAsksForNoWordAboutTheOldHosts(t *testing.T) {
	d := newDaemon(t)
	if _, err := d.Init(t.Context(), api.InitRequest{Name: "prod"}); err != nil {
		t.Fatal(err)
	}
	m := d.current()
	w := newOldWorld(t, adminless{m.store})
	v := m.store.Local()
	c, err := configdb.Clusters.Get(v, m.info.ClusterID)
	if err != nil {
		t.Fatal(err)
	}
	c.Spec.RestoredFrom = &api.Origin{ClusterID: "old"}
	commit(t, m.store, func(tx *configdb.Txn) error { return configdb.Clusters.UpdateSpec(v, tx, &c) })
	for name, n := range w.nodes {
		n, err := configdb.Nodes.Get(m.store.Local(), n.Meta.ID)
		if err != nil {
			t.Fatal(err)
		}
		n.Status.Phase = api.NodeLost
		if name == "n3" { // the one that had joined the restored cluster
			commit(t, m.store, func(tx *configdb.Txn) error { tx.Put(certificateKey(n.Meta.ID), []byte("{}")); return nil })
		}
		commit(t, m.store, func(tx *configdb.Txn) error { return configdb.Nodes.UpdateStatus(m.store.Local(), tx, &n) })
	}
	others, err := m.others(m.store.Local())
	if err != nil {
		t.Fatal(err)
	}
	p := api.RecoveryPlan{Cluster: "prod", Others: others}
	if err := agrees(&p, &api.RecoveryRequest{Cluster: "prod", SwitchedOff: []string{"n3"}}); err != nil {
		t.Errorf("it wants a false word: %v", err)
	}
}

// Who was picked for the VM before is taken again only while it will do: it may be removed
// meanwhile.
func TestTheHeirOfTheVMBeforeIsTakenOnlyWhileItWillDo(t *testing.T) {
	_, s, _, err := raise(t, "fresh", api.RestoreRequest{})
	if err != nil {
		t.Fatal(err)
	}
	vm, err := configdb.VMs.Find(s.db.Local(), api.DefaultProject, "runs")
	if err != nil {
		t.Fatal(err)
	}
	choose := heirOf(s.host(t, "n1").Meta.ID)
	at := func() heir {
		t.Helper()
		h, err := choose(s.db.Local(), vm)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	first := at()
	if !first.ghost || first.node == "n1" || at() != first {
		t.Fatalf("%+v, then %+v", first, at())
	}
	s.remove(t, first.node)
	if h := at(); !h.ghost || h.node == "n1" || h == first {
		t.Errorf("after the removal of %s: %+v", first.node, h)
	}
}

// An older leader would free the VMs of one host, though another may run them.
func TestAnOlderLeaderIsNotToldThatAHostOfTheOldClusterIsOff(t *testing.T) {
	_, s, _, err := raise(t, "fresh", api.RestoreRequest{})
	if err != nil {
		t.Fatal(err)
	}
	leader := api.Node{Meta: api.NewMeta(api.KindNode, "", "older"), Spec: api.NodeSpec{Address: "10.7.7.7:7600"}, Status: api.NodeStatus{Phase: api.NodeReady, Version: "0.0.9"}}
	leader.Meta.ID = "leader"
	commit(t, s.db, func(tx *configdb.Txn) error { return configdb.Nodes.Create(tx, &leader) })
	check := func(gone string) error {
		t.Helper()
		n := s.host(t, gone)
		return oldHostsKnown(s.db.Local(), leader.Meta.ID, &n)
	}
	if err := check("n1"); api.CodeOf(err) != api.CodeRefused || !strings.Contains(err.Error(), "node older leads with older software (version 0.0.9)") {
		t.Errorf("an older leader: %v", err)
	}
	if err := check("fresh"); err != nil {
		t.Errorf("no host of the old cluster: %v", err)
	}
	now := api.FeatureLevels{Min: 1, Max: feature.OldHosts.Level()}
	commit(t, s.db, func(tx *configdb.Txn) error {
		l, err := configdb.Nodes.Get(s.db.Local(), leader.Meta.ID)
		if err != nil {
			return err
		}
		l.Status.FeatureLevels = &now
		return configdb.Nodes.UpdateStatus(s.db.Local(), tx, &l)
	})
	if err := check("n1"); err != nil {
		t.Errorf("a leader of today: %v", err)
	}
}
