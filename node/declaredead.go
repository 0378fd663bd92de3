// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/placement"
)

// takeOver binds the VMs of a lost node elsewhere, stopped, because an
// administrator said with --force that its host is switched off. That is the one
// ground besides a lapsed lease on which a VM leaves a node without the node's
// word: nobody else can know it of an unprotected VM. Without this neither the
// VM nor the node could ever be deleted.
func takeOver(ctx context.Context, db configdb.DB, log *slog.Logger, r expelRequest, term uint64, owner chooseOwner) error {
	for _, b := range bindingsOf(db.Local(), r.NodeID) {
		_, err := configdb.Transact(ctx, db, r.Actor, 4, func(v *configdb.View, tx *configdb.Txn) error {
			return takeOverOne(v, tx, b.Meta.ID, r.NodeID, term, owner)
		})
		if err != nil {
			return fmt.Errorf("take over vm %s: %w", b.Meta.Name, err)
		}
		log.Warn("vm taken over from a node that was declared dead", "vm", b.Meta.ID, "node", r.NodeID, "actor", r.Actor)
	}
	return nil
}

// chooseOwner says which node a VM is bound to when its node is dead.
type chooseOwner func(v *configdb.View, vm api.VM) (nodeID, node string, err error)

func takeOverOne(v *configdb.View, tx *configdb.Txn, vmID, from string, term uint64, owner chooseOwner) error {
	n, err := configdb.Nodes.Get(v, from)
	if err != nil {
		return err
	}
	if n.Status.Phase != api.NodeLost {
		return api.Errorf(api.CodeRefused, "node %s is %s; only a lost node's VMs are taken over", n.Meta.Name, n.Status.Phase)
	}
	b, err := configdb.Bindings.Get(v, vmID)
	if err != nil || b.Spec.NodeID != from {
		return api.IgnoreNotFound(err) // moved or deleted meanwhile
	}
	vm, err := configdb.VMs.Get(v, vmID)
	if err != nil {
		return err
	}
	nodeID, node, err := owner(v, vm)
	if err != nil {
		return err
	}
	tx.RequireTerm(term)
	tx.RequireRevision(configdb.Nodes.StatusKey(from), n.Meta.StatusRevision) // still lost
	b.Spec.NodeID, b.Spec.Node = nodeID, node
	b.Spec.Epoch++
	vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, false
	vm.Status = api.VMStatus{
		Phase: api.VMStopped, Node: node, Epoch: b.Spec.Epoch, RebootsDone: vm.Status.RebootsDone,
		Message: fmt.Sprintf("taken over from node %s, which was declared dead; start it when its disks are there", n.Meta.Name),
	}
	if _, saved := v.Get(configdb.SavedStates.SpecKey(vmID)); saved {
		// Its memory is on the disks and still good.
		vm.Spec.Power, vm.Status.Phase = api.PowerSuspended, api.VMSuspended
	}
	if err := configdb.Bindings.UpdateSpec(v, tx, &b); err != nil {
		return err
	}
	if err := configdb.VMs.UpdateSpec(v, tx, &vm); err != nil {
		return err
	}
	return configdb.VMs.UpdateStatus(v, tx, &vm)
}

// newOwner prefers a node where the VM fits, and takes any ready one if its
// disks are gone with the host: there it can at least be deleted.
func newOwner(v *configdb.View, vm api.VM) (nodeID, node string, err error) {
	if d, err := placement.Choose(v, placement.Request{VM: vm}); err == nil {
		return d.NodeID, d.Node, nil
	}
	nodes, err := configdb.Nodes.List(v)
	if err != nil {
		return "", "", err
	}
	for i := range nodes {
		if n := &nodes[i]; n.Status.Phase == api.NodeReady && n.Spec.Role != api.RoleWitness && !n.Meta.Deleting() {
			return n.Meta.ID, n.Meta.Name, nil
		}
	}
	return "", "", api.Errorf(api.CodeUnplaceable, "no node is ready to take over vm %q", vm.Meta.Name)
}

func bindingsOf(v *configdb.View, nodeID string) (out []api.Binding) {
	bindings, _ := configdb.Bindings.List(v)
	for i := range bindings {
		if bindings[i].Spec.NodeID == nodeID {
			out = append(out, bindings[i])
		}
	}
	return out
}
