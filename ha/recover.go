// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"fmt"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/reconcile"
)

// recover looks at one VM: if its node is lost, a protected VM is bound to
// another node and an unprotected one is marked unknown.
func (s *Service) recover(ctx context.Context, term uint64, vmID string) (reconcile.Result, error) {
	v := s.db.Local()
	c, err := readCase(v, vmID)
	if err != nil || c == nil {
		return reconcile.Result{}, err
	}
	tx := &configdb.Txn{Actor: Actor}
	if !c.binding.Spec.Protected {
		err = c.markUnknown(v, tx, term)
	} else {
		err = c.move(v, tx, term, s.placer)
	}
	if api.CodeOf(err) == api.CodeUnplaceable {
		reason := err
		tx = &configdb.Txn{Actor: Actor}
		if err := c.explain(v, tx, term, reason); err != nil {
			return reconcile.Result{}, err
		}
		if !tx.Empty() {
			if _, err := s.db.Txn(ctx, tx); err != nil {
				return reconcile.Result{}, err
			}
			s.log.Warn("vm cannot be recovered", "vm", c.vm.Meta.Name, "err", reason)
		}
		return reconcile.Result{After: recoverRetry}, nil
	}
	if err != nil || tx.Empty() {
		return reconcile.Result{}, err
	}
	rev, err := s.db.Txn(ctx, tx)
	if err != nil {
		return reconcile.Result{}, err
	}
	s.log.Info("lost node's vm handled", "vm", c.vm.Meta.Name, "from", c.node.Meta.Name,
		"protected", c.binding.Spec.Protected, "epoch", c.binding.Spec.Epoch, "rev", rev)
	return reconcile.Result{}, nil
}

// lossCase is one VM on one lost node, as of one view.
type lossCase struct {
	vm      api.VM
	binding api.Binding
	node    api.Node
}

// readCase returns nil if the VM is not on a lost node.
func readCase(v *configdb.View, vmID string) (*lossCase, error) {
	var c lossCase
	var err error
	if c.binding, err = configdb.Bindings.Get(v, vmID); err != nil {
		return nil, api.IgnoreNotFound(err)
	}
	if c.node, err = configdb.Nodes.Get(v, c.binding.Spec.NodeID); err != nil {
		return nil, api.IgnoreNotFound(err)
	}
	if c.node.Status.Phase != api.NodeLost {
		return nil, nil
	}
	if _, later := v.Get(configdb.LaterLifeKey(c.node.Meta.ID)); later {
		return nil, nil // it lives, and runs its VMs
	}
	if c.vm, err = configdb.VMs.Get(v, vmID); err != nil {
		return nil, api.IgnoreNotFound(err)
	}
	return &c, nil
}

// require makes a transaction valid only for exactly the case that was read:
// above all, only while the node is still lost.
func (c *lossCase) require(tx *configdb.Txn, term uint64) {
	tx.RequireTerm(term)
	tx.RequireRevision(configdb.Nodes.StatusKey(c.node.Meta.ID), c.node.Meta.StatusRevision)
	tx.RequireRevision(configdb.LaterLifeKey(c.node.Meta.ID), 0)
	tx.RequireRevision(configdb.Bindings.SpecKey(c.vm.Meta.ID), c.binding.Meta.Revision)
	tx.RequireRevision(configdb.VMs.SpecKey(c.vm.Meta.ID), c.vm.Meta.Revision)
}

// move binds the VM to another node under the next epoch.
func (c *lossCase) move(v *configdb.View, tx *configdb.Txn, term uint64, placer Placer) error {
	nodeID, node, err := placer.Choose(v, c.vm)
	if err != nil {
		return err
	}
	if nodeID == c.node.Meta.ID {
		return fmt.Errorf("recover vm %s: placement chose the lost node %s", c.vm.Meta.Name, node)
	}
	c.require(tx, term)
	// The new node must not begin to leave the cluster meanwhile.
	to, _ := v.Get(configdb.Nodes.SpecKey(nodeID))
	tx.RequireRevision(configdb.Nodes.SpecKey(nodeID), to.Revision)
	c.binding.Spec.NodeID, c.binding.Spec.Node = nodeID, node
	c.binding.Spec.Epoch++
	if err := configdb.Bindings.UpdateSpec(v, tx, &c.binding); err != nil {
		return err
	}
	suspended := c.vm.Spec.Power == api.PowerSuspended
	wantsRun := c.vm.Spec.Power != api.PowerStopped && !suspended && !c.vm.Meta.Deleting()
	// Whoever raises the epoch hands the status over to the new owner.
	message := fmt.Sprintf("moved from the lost node %s", c.node.Meta.Name)
	c.vm.Status = api.VMStatus{
		ObservedGeneration: c.vm.Status.ObservedGeneration, RebootsDone: c.vm.Status.RebootsDone,
		Phase: api.VMStopped, Node: node, Epoch: c.binding.Spec.Epoch, Message: message,
	}
	if suspended {
		c.vm.Status.Phase = api.VMSuspended
	}
	if wantsRun {
		c.vm.Status.Phase = api.VMStarting
		placer.Reserve(v, tx, nodeID)
		t := api.NewTask(api.ActionVMRecover, api.KindVM, c.vm.Meta, Actor, recoverDeadline, time.Now())
		t.Spec.TargetEpoch = c.binding.Spec.Epoch
		t.Status.Message = message
		if err := configdb.Tasks.CreateUnnamed(tx, &t); err != nil {
			return err
		}
	}
	return configdb.VMs.UpdateStatus(v, tx, &c.vm)
}

// markUnknown says of an unprotected VM that nobody knows whether it runs. One
// that its owner had reported stopped stays so.
func (c *lossCase) markUnknown(v *configdb.View, tx *configdb.Txn, term uint64) error {
	reportedStopped := (c.vm.Status.Phase == api.VMStopped || c.vm.Status.Phase == api.VMSuspended) && c.vm.Status.Epoch == c.binding.Spec.Epoch &&
		c.vm.Status.ObservedGeneration == c.vm.Meta.Generation
	if reportedStopped || c.vm.Status.Phase == api.VMUnknown {
		return nil
	}
	c.require(tx, term)
	c.vm.Status.Phase = api.VMUnknown
	c.vm.Status.Message = fmt.Sprintf("node %s is lost; the vm is not protected (--ha restart), so it stays bound to that node until it returns", c.node.Meta.Name)
	return configdb.VMs.UpdateStatus(v, tx, &c.vm)
}

// explain writes why a protected VM has no place. The condition's time is not
// renewed, so that the same reason is written once.
func (c *lossCase) explain(v *configdb.View, tx *configdb.Txn, term uint64, reason error) error {
	c.require(tx, term)
	c.vm.Status.Phase = api.VMFailed
	c.vm.Status.Message = fmt.Sprintf("node %s is lost and no other node fits: %v", c.node.Meta.Name, reason)
	c.vm.Status.Conditions = api.SetCondition(c.vm.Status.Conditions, api.Condition{
		Type: "Recovered", Reason: "NoNodeFits", Message: c.vm.Status.Message,
	}, time.Now())
	return configdb.VMs.UpdateStatus(v, tx, &c.vm)
}
