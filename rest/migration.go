// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// Migration begins migrations, for requests and for the evacuation of nodes.
type Migration struct {
	Placer Placer
	Actor  string
	Now    time.Time
	// Reserve takes memory on a node, in the transaction of Begin.
	Reserve func(nodeID string) error
}

// beginning is one attempt on one view.
type beginning struct {
	Migration
	v       *configdb.View
	vm      api.VM
	binding api.Binding
}

// Begin adds to a transaction what begins the migration of a VM, and returns the
// ID of its task. It fails, with the reason, if the VM cannot be moved as wished.
func (m Migration) Begin(v *configdb.View, tx *configdb.Txn, vm api.VM, in *api.MigrateRequest) (task string, err error) {
	b := &beginning{Migration: m, v: v, vm: vm}
	if vm.Meta.Deleting() {
		return "", api.Errorf(api.CodeRefused, "vm %s is being deleted", vm.Meta.Name)
	}
	if b.binding, err = configdb.Bindings.Get(v, vm.Meta.ID); err != nil {
		return "", fmt.Errorf("vm %s has no binding: %w", vm.Meta.Name, err)
	}
	tx.RequireRevision(configdb.Bindings.SpecKey(vm.Meta.ID), b.binding.Meta.Revision)
	if op, err := configdb.Operations.Get(v, vm.Meta.ID); err == nil {
		return "", busy(&vm, &op)
	}
	if err := b.mayLeave(); err != nil {
		return "", err
	}
	copied, err := b.nodeBound(in)
	if err != nil {
		return "", err
	}
	to, err := b.chooseTarget(in, copied)
	if err != nil {
		return "", err
	}
	if err := m.Reserve(to.Meta.ID); err != nil {
		return "", err
	}
	return b.write(tx, in, to, copied)
}

// busy says what works on a VM.
func busy(vm *api.VM, op *api.Operation) error {
	return api.Errorf(api.CodeRefused, "vm %s is being %s; wait for task %s", vm.Meta.Name, op.Spec.Doing(), op.Spec.TaskID)
}

// write adds operation, arrival and task.
func (b *beginning) write(tx *configdb.Txn, in *api.MigrateRequest, to api.Node, copied []string) (string, error) {
	vm, at := &b.vm, b.binding.Spec
	task := api.NewTask(api.ActionVMMigrate, api.KindVM, vm.Meta, b.Actor, vmOperationDeadline, b.Now)
	task.Spec.TargetEpoch = at.Epoch
	op := api.Operation{
		Meta: api.NewMeta(api.KindOperation, vm.Meta.Project, vm.Meta.Name),
		Spec: api.OperationSpec{
			Action: api.ActionVMMigrate, VM: vm.Meta.Name, TaskID: task.Meta.ID, NodeID: at.NodeID, Epoch: at.Epoch,
			Migration: &api.MigrationSpec{
				NodeID: to.Meta.ID, Node: to.Meta.Name, MaxDowntimeMillis: in.MaxDowntimeMillis, Bandwidth: in.Bandwidth, Volumes: copied,
			},
		},
		Status: api.OperationStatus{Phase: api.TaskPending},
	}
	arr := api.Arrival{
		Meta:   api.NewMeta(api.KindArrival, vm.Meta.Project, vm.Meta.Name),
		Spec:   api.ArrivalSpec{TaskID: task.Meta.ID, NodeID: to.Meta.ID, Epoch: at.Epoch + 1},
		Status: api.ArrivalStatus{Phase: api.ArrivalPending},
	}
	op.Meta.ID, arr.Meta.ID = vm.Meta.ID, vm.Meta.ID
	if err := configdb.Tasks.CreateUnnamed(tx, &task); err != nil {
		return "", err
	}
	if err := configdb.Operations.CreateUnnamed(tx, &op); err != nil {
		return "", err
	}
	return task.Meta.ID, configdb.Arrivals.CreateUnnamed(tx, &arr)
}

// mayLeave refuses unless the VM runs, or is paused, and its owner says so.
func (b *beginning) mayLeave() error {
	vm, at := &b.vm, b.binding.Spec
	s := &vm.Status
	if vm.Spec.Power == api.PowerStopped || s.PID == 0 || s.Phase != api.VMRunning && s.Phase != api.VMPaused {
		return api.Errorf(api.CodeRefused, "vm %s is not running, it is %s; only a VM that runs or is paused can be migrated", vm.Meta.Name, phaseText(vm))
	}
	if s.Epoch != at.Epoch || s.Hardware == nil {
		return api.Errorf(api.CodeRefused, "node %s has not reported on vm %s yet; try again in a moment", at.Node, vm.Meta.Name)
	}
	if why := rooted(s.Hardware); why != "" {
		return api.Errorf(api.CodeRefused, "vm %s %s, so it cannot be moved while it runs; stop it first", vm.Meta.Name, why)
	}
	owner, err := configdb.Nodes.Get(b.v, at.NodeID)
	switch {
	case api.CodeOf(err) == api.CodeNotFound && err != nil:
		return api.Errorf(api.CodeRefused, "node %s of vm %s is not in the cluster any more", at.Node, vm.Meta.Name)
	case err != nil:
		return err
	case owner.Status.Phase != api.NodeReady:
		return api.Errorf(api.CodeRefused, "node %s of vm %s is %s, so the VM cannot be migrated", at.Node, vm.Meta.Name, owner.Status.Phase)
	}
	return nil
}

// rooted says what of a guest's hardware does not move, "" if all of it does.
func rooted(hw *api.VMSpec) string {
	switch {
	case len(hw.HostDevices) > 0:
		return "has devices of its host"
	case hw.TPM != nil:
		return "has a TPM, whose state does not move in this version"
	}
	return ""
}

// nodeBound returns the volumes that have to be copied along because they are in
// a pool of the present node alone.
func (b *beginning) nodeBound(in *api.MigrateRequest) (ids []string, err error) {
	var names []string
	for _, d := range b.vm.Status.Hardware.Disks {
		vol, err := configdb.Volumes.Find(b.v, b.vm.Meta.Project, d.Volume)
		if err != nil {
			return nil, err
		}
		pool, err := configdb.Pools.Find(b.v, "", vol.Spec.Pool)
		if err != nil {
			return nil, err
		}
		if pool.Spec.Type == api.PoolDir {
			ids, names = append(ids, vol.Meta.ID), append(names, vol.Meta.Name)
		}
	}
	for _, name := range b.vm.Status.Hardware.StateVolumes() {
		vol, err := configdb.Volumes.Find(b.v, b.vm.Meta.Project, name)
		if err != nil {
			return nil, err
		}
		if pool, err := configdb.Pools.Find(b.v, "", vol.Spec.Pool); err != nil || pool.Spec.Type == api.PoolDir {
			return nil, errors.Join(err, api.Errorf(api.CodeRefused, "vm %s keeps the state of its firmware in a pool that only node %s has (%s), which cannot be copied in this version",
				b.vm.Meta.Name, b.binding.Spec.Node, name))
		}
	}
	if len(ids) > 0 && !in.WithStorage {
		return nil, &api.Error{Code: api.CodeRefused, Field: "withStorage", Detail: fmt.Sprintf(
			"vm %s has disks that only node %s has (%s); they can be copied along, which takes its time: --with-storage (\"withStorage\": true)",
			b.vm.Meta.Name, b.binding.Spec.Node, strings.Join(names, ", "))}
	}
	return ids, nil
}

// chooseTarget finds the node to move to: that of the request, or the best one
// where the guest can run on as it is.
func (b *beginning) chooseTarget(in *api.MigrateRequest, copied []string) (api.Node, error) {
	at := b.binding.Spec
	owner, err := configdb.Nodes.Get(b.v, at.NodeID)
	if err != nil {
		return owner, err
	}
	if in.To == owner.Meta.Name || in.To == owner.Meta.ID {
		return owner, &api.Error{Code: api.CodeRefused, Field: "to", Detail: fmt.Sprintf("vm %s is on node %s already", b.vm.Meta.Name, owner.Meta.Name)}
	}
	vm := b.vm.Clone()
	power := vm.Spec.Power
	vm.Spec = *vm.Status.Hardware // what runs is what has to fit
	vm.Spec.Power = power
	id, _, err := b.Placer.ChooseOther(b.v, vm, at.NodeID, in.To, copied)
	if err != nil {
		return owner, err
	}
	to, err := configdb.Nodes.Get(b.v, id)
	if err != nil {
		return to, err
	}
	return to, unlike(&b.vm, &owner, &to)
}

// unlike refuses a target whose QEMU would not take the guest as it is.
func unlike(vm *api.VM, from, to *api.Node) error {
	refuse := func(format string, args ...any) error {
		return &api.Error{Code: api.CodeRefused, Field: "to", Detail: fmt.Sprintf("vm %s cannot move to node %s: ", vm.Meta.Name, to.Meta.Name) + fmt.Sprintf(format, args...)}
	}
	if a, b := vm.Status.Accelerator, string(to.Status.Accelerator); a != "" && b != "" && a != b {
		return refuse("it runs with %s, and that node has %s", a, b)
	}
	if a, b := from.Status.QEMUVersion, to.Status.QEMUVersion; a != b {
		return refuse("node %s has QEMU %s and that node %s; the machine of the guest is that of its QEMU's version, so they must be the same", from.Meta.Name, a, b)
	}
	return nil
}
