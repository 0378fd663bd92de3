// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
)

// fencedNodes are n1 to n4: n2 is locked out of the pool, n3 cannot use it.
func fencedNodes(t *testing.T) (*configdb.View, map[string]string) {
	t.Helper()
	db, tx, ids := storetest.New(t), &configdb.Txn{}, map[string]string{}
	for _, name := range []string{"n1", "n2", "n3", "n4"} {
		n := api.Node{Meta: api.NewMeta(api.KindNode, "", name), Status: api.NodeStatus{Phase: api.NodeReady}}
		if name == "n2" {
			n.Status.StorageFences = []api.StorageFence{{ID: "f", PoolID: "p", Pool: "ceph", Addresses: []string{"10.0.0.2"}}}
		}
		st := api.PoolState{Meta: api.NewMeta(api.KindPoolState, "", "x"), Status: api.PoolStateStatus{Ready: name != "n3"}}
		st.Meta.ID = "p." + n.Meta.ID
		ids[name] = n.Meta.ID
		if err := configdb.Nodes.Create(tx, &n); err != nil {
			t.Fatal(err)
		}
		if err := configdb.PoolStates.CreateUnnamed(tx, &st); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := db.Txn(t.Context(), tx); err != nil {
		t.Fatal(err)
	}
	return db.Local(), ids
}

func TestAnAddressThatLocksOutAnotherNodeStaysOnTheList(t *testing.T) {
	v, ids := fencedNodes(t)
	err := lockOthers(v, ids["n1"], "p", []string{"10.0.0.1", "10.0.0.2"})
	if api.CodeOf(err) != api.CodeRefused || !strings.Contains(err.Error(), "node n2 is locked out of pool ceph by the address 10.0.0.2") {
		t.Errorf("n1 takes n2 off the list: %v", err)
	}
	for node, pool := range map[string]string{"n2": "p", "n1": "other"} {
		if err := lockOthers(v, ids[node], pool, []string{"10.0.0.2"}); err != nil {
			t.Errorf("%s: %v", node, err)
		}
	}
}

func TestALeaderWithoutThePoolAsksANodeThatHasIt(t *testing.T) {
	v, ids := fencedNodes(t)
	f := &api.StorageFence{ID: "f", PoolID: "p"}
	for self, want := range map[string]string{"n1": "n4", "n3": "n1 n4"} {
		var names []string
		for _, n := range deputies(v, ids[self], f) {
			names = append(names, n.Meta.Name)
		}
		if got := strings.Join(names, " "); got != want {
			t.Errorf("%s asks %q, want %q", self, got, want)
		}
	}
	if canUse(v, ids["n3"], "p") || !canUse(v, ids["n1"], "p") {
		t.Error("who can use the pool")
	}
	if _, ok := fenceToCome(v, "p", "another"); ok {
		t.Error("a fence that nobody marked is carried out")
	}
	if _, ok := fenceToCome(v, "p", "f"); !ok {
		t.Error("a fence that is marked is not carried out")
	}
	// A request that was held up is read when the fence has long been in force.
	n, err := configdb.Nodes.Get(v, ids["n2"])
	if err != nil {
		t.Fatal(err)
	}
	db, tx, now := storetest.New(t), &configdb.Txn{}, time.Now()
	n.Status.StorageFences[0].InForceAt = &now
	if err := configdb.Nodes.Create(tx, &n); err != nil {
		t.Fatal(err)
	}
	if _, err := db.Txn(t.Context(), tx); err != nil {
		t.Fatal(err)
	}
	if _, ok := fenceToCome(db.Local(), "p", "f"); ok {
		t.Error("a fence in force is carried out once more")
	}
}
