// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"slices"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// wishRunning makes a stopped VM run, on its node if it fits there. It may be
// bound to another node only on the owner's own word that it is stopped.
func (c *change) wishRunning(st *vmState) error {
	vm := &st.vm
	switch vm.Spec.Power {
	case api.PowerRunning:
		if r := vm.Status.Restarts; r != nil && r.Due != nil && vm.Status.PID == 0 {
			vm.Status.Restarts = r.Clone()
			vm.Status.Restarts.Due = nil
		}
		vm.Status.Awaits = nil // whoever asks by hand does not want it to wait
		// The task looks at the wish that is already there.
		return configdb.VMs.UpdateStatus(c.v, c.tx, vm)
	case api.PowerPaused:
		return api.Errorf(api.CodeRefused, "vm %s is paused; resume it", vm.Meta.Name)
	}
	if name := configdb.UnfinishedRevert(c.v, vm.Meta.ID); name != "" {
		return api.Errorf(api.CodeRefused, "a revert of vm %s to snapshot %s was interrupted, so its disks are not of one moment; revert again: muster vm snapshot revert %s %s", vm.Meta.Name, name, vm.Meta.Name, name)
	}
	// Before the spec is touched: the word counts for the stored generation.
	said := ownerSaysStopped(st)
	vm.Spec.Power, vm.Spec.ForceStop = api.PowerRunning, false
	vm.Spec.NICs = slices.Clone(vm.Spec.NICs)
	if err := c.addNICs(vm, slices.Clone(vm.Spec.NICs)); err != nil {
		return err
	}
	nodeID, node, err := c.place(st, said)
	if err != nil {
		return err
	}
	if err := c.reserve(nodeID); err != nil {
		return err
	}
	if !said {
		return nil
	}
	return c.handOver(st, nodeID, node)
}

// ownerSaysStopped reports that the node that the VM is bound to has written,
// under this binding and about this very wish, that the VM does not run. This
// is the only ground on which a request may raise an epoch: the owner cannot
// start the VM again without seeing a new wish, and the transaction that
// states one gives the binding away, or keeps it, in the same step.
func ownerSaysStopped(st *vmState) bool {
	s := &st.vm.Status
	down := st.vm.Spec.Power == api.PowerStopped && s.Phase == api.VMStopped || st.vm.Spec.Power == api.PowerSuspended && s.Phase == api.VMSuspended
	return down && s.PID == 0 &&
		s.Epoch == st.binding.Spec.Epoch && s.ObservedGeneration == st.vm.Meta.Generation
}

// place chooses the node: the present one if it fits, another one only when
// the VM may move.
func (c *change) place(st *vmState, mayMove bool) (nodeID, node string, err error) {
	placer, at := c.q.s.cfg.Placer, st.binding.Spec
	owner, err := configdb.Nodes.Get(c.v, at.NodeID)
	gone := api.CodeOf(err) == api.CodeNotFound && err != nil || owner.Status.Phase == api.NodeLost
	if err != nil && !gone {
		return "", "", err
	}
	if gone && !mayMove {
		return "", "", api.Errorf(api.CodeRefused,
			"node %s is lost and has not said that vm %s is stopped; ha recovers protected VMs by itself, others wait for their node, or for the word that its host is switched off: muster node remove %s --force", at.Node, st.vm.Meta.Name, at.Node)
	}
	if !gone {
		nodeID, node, err = placer.Choose(c.v, st.vm, nil, at.Node)
		if err == nil || !mayMove || api.CodeOf(err) != api.CodeUnplaceable {
			return nodeID, node, err
		}
	}
	return placer.Choose(c.v, st.vm, nil, "")
}

// handOver adjusts the binding of a VM that its owner has reported stopped.
// The preconditions are that very report, the spec and the binding.
func (c *change) handOver(st *vmState, nodeID, node string) error {
	vm, b := &st.vm, &st.binding
	protected := vm.Spec.HA == api.HARestart
	moved := nodeID != b.Spec.NodeID
	if !moved && protected == b.Spec.Protected {
		return nil
	}
	c.tx.RequireRevision(configdb.VMs.StatusKey(vm.Meta.ID), vm.Meta.StatusRevision)
	c.tx.RequireRevision(configdb.VMs.SpecKey(vm.Meta.ID), vm.Meta.Revision)
	b.Spec.Protected = protected
	if moved {
		b.Spec.NodeID, b.Spec.Node = nodeID, node
		b.Spec.Epoch++
		vm.Status = api.VMStatus{
			ObservedGeneration: vm.Status.ObservedGeneration,
			Phase:              api.VMStarting,
			Node:               node,
			Epoch:              b.Spec.Epoch,
			RebootsDone:        vm.Status.RebootsDone,
		}
		if err := configdb.VMs.UpdateStatus(c.v, c.tx, vm); err != nil {
			return err
		}
	}
	return configdb.Bindings.UpdateSpec(c.v, c.tx, b)
}

// wishStopped makes a VM stop; force also hastens a stop under way.
func (c *change) wishStopped(st *vmState, force bool) {
	spec := &st.vm.Spec
	if spec.Power == api.PowerSuspended {
		if _, saved := c.saved(st.vm.Meta.ID); saved {
			return
		}
	}
	if spec.Power == api.PowerStopped {
		if force && !atRest(&st.vm) {
			spec.ForceStop = true
		}
		return
	}
	spec.Power, spec.ForceStop = api.PowerStopped, force
}

func (c *change) wishPaused(st *vmState) error {
	if st.vm.Spec.Power == api.PowerPaused {
		return held(&st.vm)
	}
	if err := runs(&st.vm); err != nil {
		return err
	}
	st.vm.Spec.Power = api.PowerPaused
	return nil
}

func (c *change) wishResumed(st *vmState) error {
	if st.vm.Spec.Power == api.PowerSuspended {
		return c.wishRunning(st)
	}
	if st.vm.Spec.Power == api.PowerPaused {
		err := held(&st.vm)
		st.vm.Spec.Power = api.PowerRunning
		return err
	}
	return runs(&st.vm)
}

func (c *change) wishReboot(st *vmState) error {
	if err := runs(&st.vm); err != nil {
		return err
	}
	st.vm.Spec.Reboots++
	return nil
}

// held refuses unless a VM that is meant to be paused has a process: without
// one, letting it go on would be a start, past the placement.
func held(vm *api.VM) error {
	if vm.Status.Phase == api.VMPaused || vm.Status.Phase == api.VMRunning {
		return nil
	}
	return api.Errorf(api.CodeRefused, "vm %s is not paused, it is %s; stop it, then start it", vm.Meta.Name, phaseText(vm))
}

// runs refuses unless the VM is running and meant to.
func runs(vm *api.VM) error {
	if vm.Spec.Power == api.PowerPaused {
		return api.Errorf(api.CodeRefused, "vm %s is paused; resume it first", vm.Meta.Name)
	}
	if vm.Spec.Power != api.PowerRunning || vm.Status.Phase != api.VMRunning && vm.Status.Phase != api.VMPaused {
		return api.Errorf(api.CodeRefused, "vm %s is not running, it is %s", vm.Meta.Name, phaseText(vm))
	}
	return nil
}
