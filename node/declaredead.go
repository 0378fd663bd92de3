// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"fmt"
	"log/slog"
	"slices"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/placement"
)

// takeOver binds the VMs of a lost node elsewhere, stopped, because an
// administrator said with --force that its host is switched off. That is the one
// ground besides a lapsed lease on which a VM leaves a node without the node's
// word: nobody else can know it of an unprotected VM. Without this neither the
// VM nor the node could ever be deleted.
func takeOver(ctx context.Context, db configdb.DB, log *slog.Logger, r expelRequest, term uint64, choose chooseHeir) error {
	for _, b := range bindingsOf(db.Local(), r.NodeID) {
		_, err := configdb.Transact(ctx, db, r.Actor, 4, func(v *configdb.View, tx *configdb.Txn) error {
			return takeOverOne(v, tx, b.Meta.ID, r.NodeID, term, choose)
		})
		if err != nil {
			return fmt.Errorf("take over vm %s: %w", b.Meta.Name, err)
		}
		log.Warn("vm taken over from a node that was declared dead", "vm", b.Meta.ID, "node", r.NodeID, "actor", r.Actor)
	}
	return nil
}

// heir is the node that a VM is bound to when its node is dead.
type heir struct {
	nodeID, node string
	// ghost: the node is one of an old cluster that may run the VM, which waits for the
	// word about that host, too.
	ghost bool
}

type chooseHeir func(v *configdb.View, vm api.VM) (heir, error)

func takeOverOne(v *configdb.View, tx *configdb.Txn, vmID, from string, term uint64, choose chooseHeir) error {
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
	h, err := choose(v, vm)
	if err != nil {
		return err
	}
	tx.RequireTerm(term)
	tx.RequireRevision(configdb.Nodes.StatusKey(from), n.Meta.StatusRevision) // still lost
	b.Spec.NodeID, b.Spec.Node = h.nodeID, h.node
	b.Spec.Epoch++
	// It is still there, and not taken out at this moment; the first node of a restored
	// cluster is not there yet.
	tx.RequireRevision(configdb.Nodes.SpecKey(h.nodeID), revisionOf(v, h.nodeID))
	placement.Reserve(v, tx, h.nodeID)
	if h.ghost {
		return disown(v, tx, b, fmt.Sprintf("the backup has it on node %s; the old cluster may have moved it, and run it on %s; if that host is switched off for good, too: muster node remove %s --force", n.Meta.Name, h.node, h.node))
	}
	vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, false
	vm.Status = api.VMStatus{
		Phase: api.VMStopped, Node: h.node, Epoch: b.Spec.Epoch, RebootsDone: vm.Status.RebootsDone,
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

// heirOf is who gets the VMs of a node whose host is switched off. It prefers a node
// where the VM fits, and takes any ready one if its disks are gone with the host: there
// it can at least be deleted. The VMs go one after the other, each on a state of its own.
func heirOf(from string) chooseHeir {
	var ghost, ready lastPick
	return func(v *configdb.View, vm api.VM) (heir, error) {
		// Where the VMs of a restored cluster were is known of the time of its backup alone,
		// so each may run on any host of the old cluster of which nobody said that it is off.
		if n, err := configdb.Nodes.Get(v, from); err == nil && isGhost(v, &n) {
			g, ok, err := ghost.pick(v, otherGhost(v, from))
			if err != nil || ok {
				return heir{nodeID: g.Meta.ID, node: g.Meta.Name, ghost: true}, err
			}
		}
		if d, err := placement.Choose(v, placement.Request{VM: vm}); err == nil {
			return heir{nodeID: d.NodeID, node: d.Node}, nil
		}
		n, ok, err := ready.pick(v, func(n *api.Node) bool {
			return n.Status.Phase == api.NodeReady && n.Spec.Role != api.RoleWitness && !n.Meta.Deleting()
		})
		if err == nil && !ok {
			err = api.Errorf(api.CodeUnplaceable, "no node is ready to take over vm %q", vm.Meta.Name)
		}
		return heir{nodeID: n.Meta.ID, node: n.Meta.Name}, err
	}
}

// lastPick is the ID of the node that was picked for the VM before. It is taken again as
// long as it will do, so that the nodes need not be listed for every VM.
type lastPick string

func (l *lastPick) pick(v *configdb.View, ok func(*api.Node) bool) (api.Node, bool, error) {
	if n, err := configdb.Nodes.Get(v, string(*l)); err == nil && ok(&n) {
		return n, true, nil
	}
	nodes, err := configdb.Nodes.List(v)
	if err != nil {
		return api.Node{}, false, err
	}
	at := slices.IndexFunc(nodes, func(n api.Node) bool { return ok(&n) })
	if at < 0 {
		return api.Node{}, false, nil
	}
	*l = lastPick(nodes[at].Meta.ID)
	return nodes[at], true, nil
}

// otherGhost tells the nodes beside from that may run VMs of a ghost.
func otherGhost(v *configdb.View, from string) func(*api.Node) bool {
	return func(n *api.Node) bool {
		return n.Meta.ID != from && n.Spec.Role != api.RoleWitness && isGhost(v, n)
	}
}

// isGhost reports a node that only the backup of a restored cluster knows: it has no
// certificate of this one.
func isGhost(v *configdb.View, n *api.Node) bool {
	if _, member := v.Get(certificateKey(n.Meta.ID)); member || n.Status.Phase != api.NodeLost {
		return false
	}
	cs, err := configdb.Clusters.List(v)
	return err == nil && slices.ContainsFunc(cs, func(c api.Cluster) bool { return c.Spec.RestoredFrom != nil })
}

func revisionOf(v *configdb.View, nodeID string) uint64 {
	e, _ := v.Get(configdb.Nodes.SpecKey(nodeID))
	return e.Revision
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
