// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// This file is about the nodes that a database still has although they are
// gone: after a restore and after a recovery. It works on a database that
// nobody else uses yet, in the term in which the new life begins.

// afterlife is such a database, and the one node that goes on with it.
type afterlife struct {
	db    *configdb.Offline
	self  api.Node
	term  uint64
	actor string
	log   *slog.Logger
}

// setLost gives a node that is no more the phase in which its VMs may be taken
// over, with why.
func (a *afterlife) setLost(ctx context.Context, nodeID, why string) error {
	_, err := configdb.Transact(ctx, a.db, a.actor, 1, func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Get(v, nodeID)
		if err != nil {
			return err
		}
		now := time.Now().UTC()
		n.Status.Phase, n.Status.LostAt, n.Status.LostTerm, n.Status.Message = api.NodeLost, &now, a.term, why
		if n.Meta.Deleting() { // that was another time, and it may have stayed
			n.Meta.DeletingAt = nil
			if err := configdb.Nodes.UpdateSpec(v, tx, &n); err != nil {
				return err
			}
		}
		return configdb.Nodes.UpdateStatus(v, tx, &n)
	})
	return err
}

// bury carries out an administrator's word that the host of a node is switched
// off for good: its VMs are bound to the heir, stopped, and the node goes. It
// returns the names of the VMs.
func (a *afterlife) bury(ctx context.Context, n api.Node, to heir) ([]string, error) {
	if err := a.setLost(ctx, n.Meta.ID, "its host is switched off, says "+a.actor); err != nil {
		return nil, err
	}
	vms := boundTo(a.db.Local(), n.Meta.ID)
	r := expelRequest{NodeID: n.Meta.ID, Actor: a.actor, Force: true}
	err := takeOver(ctx, a.db, a.log, r, a.term, func(*configdb.View, api.VM) (heir, error) { return to, nil })
	if err == nil {
		err = deleteNode(ctx, a.db, r, a.term)
	}
	if err != nil {
		return nil, fmt.Errorf("remove node %s: %w", n.Meta.Name, err)
	}
	return vms, nil
}

func (a *afterlife) itself() heir { return heir{nodeID: a.self.Meta.ID, node: a.self.Meta.Name} }

// haunt keeps a node, of which nobody said that it is off, as lost. Whatever the
// database says of its VMs is old: nobody knows whether they run, so none of
// them may move by itself or be started. It returns how many there are.
func (a *afterlife) haunt(ctx context.Context, n api.Node, why string) (int, error) {
	if err := a.setLost(ctx, n.Meta.ID, why); err != nil {
		return 0, err
	}
	bound := bindingsOf(a.db.Local(), n.Meta.ID)
	for _, b := range bound {
		_, err := configdb.Transact(ctx, a.db, a.actor, 1, func(v *configdb.View, tx *configdb.Txn) error {
			return disown(v, tx, b, why)
		})
		if err != nil {
			return 0, fmt.Errorf("vm %s of node %s: %w", b.Meta.Name, n.Meta.Name, err)
		}
	}
	return len(bound), a.dropPoolStates(ctx, n.Meta.ID)
}

// disown makes one VM of such a node unknown and unprotected.
func disown(v *configdb.View, tx *configdb.Txn, b api.Binding, why string) error {
	b.Spec.Protected, b.Spec.StorageGuard = false, nil
	if err := configdb.Bindings.UpdateSpec(v, tx, &b); err != nil {
		return err
	}
	vm, err := configdb.VMs.Get(v, b.Meta.ID)
	if err != nil {
		return api.IgnoreNotFound(err)
	}
	vm.Status = api.VMStatus{
		ObservedGeneration: vm.Status.ObservedGeneration, RebootsDone: vm.Status.RebootsDone,
		Phase: api.VMUnknown, Node: b.Spec.Node, Epoch: b.Spec.Epoch, Message: why,
	}
	return configdb.VMs.UpdateStatus(v, tx, &vm)
}

// dropPoolStates forgets what a node said of its pools: the directories have to
// prove themselves anew, and it cannot.
func (a *afterlife) dropPoolStates(ctx context.Context, nodeID string) error {
	_, err := configdb.Transact(ctx, a.db, a.actor, 1, func(v *configdb.View, tx *configdb.Txn) error {
		states, err := configdb.PoolStates.List(v)
		for i := range states {
			if states[i].Spec.NodeID == nodeID {
				configdb.PoolStates.DeleteUnnamed(tx, &states[i])
			}
		}
		return err
	})
	return err
}

// dropTokens deletes the tokens that match.
func (a *afterlife) dropTokens(ctx context.Context, match func(*api.Token) bool) error {
	tokens, err := configdb.Tokens.List(a.db.Local())
	if err != nil {
		return err
	}
	for i := range tokens {
		if !match(&tokens[i]) {
			continue
		}
		tx := &configdb.Txn{Actor: a.actor}
		configdb.Tokens.Delete(tx, &tokens[i])
		if _, err := a.db.Txn(ctx, tx); err != nil {
			return fmt.Errorf("delete token %s: %w", tokens[i].Meta.Name, err)
		}
	}
	return nil
}

func isJoinToken(t *api.Token) bool { return t.Spec.Use == api.TokenJoin }

// tell writes an event about the cluster.
func (a *afterlife) tell(tx *configdb.Txn, typ string, cluster api.Meta, message string) error {
	e := api.NewEvent(typ, api.SeverityWarning, api.KindCluster, cluster, message, time.Now())
	e.Spec.Node, e.Spec.Actor = a.self.Meta.Name, a.actor
	return configdb.Events.CreateUnnamed(tx, &e)
}
