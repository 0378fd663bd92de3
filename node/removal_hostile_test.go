// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
)

// leaderOf returns the leader of a group of n as a member, every replica of
// which has its node object. It alone votes: however long the machine stands still, it goes
// on to lead, in the same term.
func leaderOf(t *testing.T, n int) (*member, *storetest.Cluster) {
	t.Helper()
	c := storetest.NewCluster(t, n)
	var l *storetest.Node
	c.Eventually("one alone votes", func() error {
		l = c.Leader()
		for _, o := range c.Followers(l) {
			if err := l.DemoteMember(o.ID); err != nil {
				return err
			}
		}
		return nil
	})
	tx := &configdb.Txn{}
	for i, r := range c.Nodes {
		o := api.Node{Meta: api.NewMeta(api.KindNode, "", []string{"m1", "m2", "m3"}[i])}
		o.Meta.ID, o.Spec.Address, o.Status.Phase = r.ID, r.Address, api.NodeReady
		if err := configdb.Nodes.Create(tx, &o); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.Txn(context.Background(), tx); err != nil {
		t.Fatal(err)
	}
	return &member{store: l.Store, log: slog.New(slog.DiscardHandler), info: &membership{NodeID: l.ID, Cluster: "c"}}, c
}

func members(t *testing.T, m *member) int {
	t.Helper()
	all, err := m.store.Members()
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// A removal that was interrupted between the object and the membership left a
// member that nobody could take out, because nobody could name it.
func TestInterruptedRemovalIsFinished(t *testing.T) {
	m, c := leaderOf(t, 3)
	gone := c.Followers(c.Leader())[0]
	if err := m.dropGhosts(); err != nil || members(t, m) != 3 {
		t.Fatalf("members with their objects: %d, %v", members(t, m), err)
	}
	r := expelRequest{NodeID: gone.ID, Actor: "test"}
	if err := deleteNode(context.Background(), m.store, r, m.store.Term()); err != nil {
		t.Fatal(err)
	}
	if members(t, m) != 3 {
		t.Fatal("the interruption did not happen")
	}
	if err := m.dropGhosts(); err != nil || members(t, m) != 2 {
		t.Errorf("after the next look: %d members, %v", members(t, m), err)
	}
	if err := m.trusted(gone.ID); err == nil {
		t.Error("calls of a removed node are still answered")
	}
	if err := m.trusted(m.info.NodeID); err != nil {
		t.Error(err)
	}
}

// The leader may take longer with the rest of a removal than the removed node's daemon
// lives from when it learns of it.
func TestWhoRemovesItselfDoesNotWaitForTheLeadersAnswer(t *testing.T) {
	self := api.Meta{ID: "n1", Name: "m1"}
	m := &member{log: slog.New(slog.DiscardHandler), info: &membership{NodeID: self.ID, Cluster: "c"}}
	m.left, m.setLeft = context.WithCancel(t.Context())
	hangs := func(ctx context.Context) error {
		m.setLeft() // the state without this node is here
		<-ctx.Done()
		return ctx.Err()
	}
	began := time.Now()
	if err := m.expel(t.Context(), self, hangs); err != nil || time.Since(began) > expelTimeout/2 {
		t.Errorf("after %s: %v", time.Since(began), err)
	}
	refuses := func(context.Context) error { return errors.New("node m2 still has VMs") }
	if err := m.expel(t.Context(), api.Meta{ID: "n2", Name: "m2"}, refuses); err == nil {
		t.Error("the removal of another node is taken for done")
	}
}

// An older leader takes a node out and writes no event.
func TestTheRemovalByAnOlderLeaderIsAuditedByWhoAsked(t *testing.T) {
	for answer, want := range map[string]int{"": 1, `{}`: 1, `{"audited":true}`: 0} {
		db := storetest.New(t)
		audit := api.NewEvent("node.delete", api.SeverityInfo, api.KindNode, api.Meta{ID: "n2", Name: "m2"}, "node m2 removed", time.Now())
		audit.Spec.Actor = "ann"
		for range 2 { // asked again, it is the same event
			if err := auditRemoval(t.Context(), db, []byte(answer), &audit); err != nil {
				t.Fatal(err)
			}
		}
		if all, err := configdb.Events.List(db.Local()); err != nil || len(all) != want {
			t.Errorf("%q: %d events, want %d (%v)", answer, len(all), want, err)
		}
	}
}

// A VM that is only created, not started, reserves no memory; it must not be
// placed on a node that leaves at the same moment.
func TestNodeWithAVMPlacedMeanwhileStays(t *testing.T) {
	m, c := leaderOf(t, 3)
	leaving := c.Followers(c.Leader())[0]
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	before := m.store.Local()
	place := func(v *configdb.View) error { // what rest and ha do
		at, _ := v.Get(configdb.Nodes.SpecKey(leaving.ID))
		tx := &configdb.Txn{}
		tx.RequireRevision(configdb.Nodes.SpecKey(leaving.ID), at.Revision)
		b := api.Binding{Meta: api.NewMeta(api.KindBinding, "", "v"), Spec: api.BindingSpec{NodeID: leaving.ID, Epoch: 1}}
		if err := configdb.Bindings.CreateUnnamed(tx, &b); err != nil {
			return err
		}
		_, err := m.store.Txn(ctx, tx)
		return err
	}
	request, _ := json.Marshal(expelRequest{NodeID: leaving.ID, Actor: "test"})
	if err := place(before); err != nil {
		t.Fatal(err)
	}
	if _, err := m.serveExpel(ctx, request); api.CodeOf(err) != api.CodeRefused {
		t.Fatalf("a node with a VM: %v", err)
	}
	b, _ := configdb.Bindings.List(m.store.Local())
	tx := &configdb.Txn{}
	configdb.Bindings.DeleteUnnamed(tx, &b[0])
	if _, err := m.store.Txn(ctx, tx); err != nil {
		t.Fatal(err)
	}
	if _, err := m.serveExpel(ctx, request); err != nil {
		t.Fatal(err)
	}
	if err := place(before); err == nil {
		t.Error("a VM was placed, on an old view, on a node that has left")
	}
	if members(t, m) != 2 {
		t.Errorf("%d members", members(t, m))
	}
}
