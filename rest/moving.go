// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// Move begins moves of what no guest uses, for requests and for the evacuation of
// nodes.
type Move struct {
	Placer Placer
	Actor  string
	// deadlines is the clock for those of tasks; the system's when nil.
	deadlines func() time.Time
}

// moving is one attempt on one view.
type moving struct {
	Move
	v       *configdb.View
	tx      *configdb.Txn
	project string
	vm      *api.VM // nil: a volume that no VM has
	binding api.Binding
	// from is the node of the VM, to the one that everything comes to.
	from, to api.Node
	volumes  []api.VolumeMove
}

// Begin adds to a transaction what begins the move of a stopped VM with all of its
// volumes, and returns the ID of its task. It fails, with the reason, if the VM
// cannot be moved as wished.
func (m Move) Begin(v *configdb.View, tx *configdb.Txn, vm api.VM, in *api.MoveRequest) (task string, err error) {
	b, err := m.stopped(v, tx, vm)
	if err != nil {
		return "", err
	}
	var volumes []api.Volume
	for _, name := range vm.Spec.Volumes() {
		vol, err := configdb.Volumes.Find(v, vm.Meta.Project, name)
		if err != nil {
			return "", err
		}
		volumes = append(volumes, vol)
	}
	if err := b.target(volumes, in); err != nil {
		return "", err
	}
	for i := range volumes {
		if err := b.add(&volumes[i], in.Pool); err != nil {
			return "", err
		}
	}
	if len(b.volumes) == 0 && b.to.Meta.ID == b.from.Meta.ID {
		return "", alreadyThere("vm "+vm.Meta.Name, in)
	}
	return b.writeVM()
}

// known refuses while a node of the cluster would not take its part.
func (b *moving) known() error { return mayMove(b.v) }

// stopped begins an attempt for a VM whose owner has said that it does not run.
func (m Move) stopped(v *configdb.View, tx *configdb.Txn, vm api.VM) (*moving, error) {
	b := &moving{Move: m, v: v, tx: tx, project: vm.Meta.Project, vm: &vm}
	if err := b.known(); err != nil {
		return nil, err
	}
	if vm.Meta.Deleting() {
		return nil, api.Errorf(api.CodeRefused, "vm %s is being deleted", vm.Meta.Name)
	}
	var err error
	if b.binding, err = configdb.Bindings.Get(v, vm.Meta.ID); err != nil {
		return nil, fmt.Errorf("vm %s has no binding: %w", vm.Meta.Name, err)
	}
	if op, err := configdb.Operations.Get(v, vm.Meta.ID); err == nil {
		return nil, busy(&vm, &op)
	}
	s, at := &vm.Status, b.binding.Spec
	_, savedErr := configdb.SavedStates.Get(v, vm.Meta.ID)
	switch {
	case savedErr == nil || vm.Spec.Power == api.PowerSuspended:
		return nil, errSuspended(&vm, "it is not moved")
	case api.IgnoreNotFound(savedErr) != nil:
		return nil, savedErr
	case vm.Spec.Power != api.PowerStopped || !atRest(&vm):
		return nil, api.Errorf(api.CodeRefused, "vm %s is %s, and only a stopped vm is moved like this; muster vm migrate %s moves it while it runs (with --with-storage its disks, too), or stop it first", vm.Meta.Name, phaseText(&vm), vm.Meta.Name)
	case s.Phase == api.VMCreating:
		return nil, api.Errorf(api.CodeRefused, "vm %s is being made; wait for that", vm.Meta.Name)
	case s.Epoch != at.Epoch || s.ObservedGeneration != vm.Meta.Generation:
		return nil, api.Errorf(api.CodeRefused, "node %s has not said yet that vm %s is stopped; try again in a moment", at.Node, vm.Meta.Name)
	}
	if b.from, err = configdb.Nodes.Get(v, at.NodeID); err == nil {
		err = takesPart(&b.from)
	}
	if err != nil {
		return nil, err
	}
	tx.RequireRevision(configdb.Bindings.SpecKey(vm.Meta.ID), b.binding.Meta.Revision)
	tx.RequireRevision(configdb.VMs.SpecKey(vm.Meta.ID), vm.Meta.Revision)
	return b, b.uncopied()
}

// uncopied refuses while something is copied from a snapshot of the VM.
func (b *moving) uncopied() error {
	all, err := configdb.SnapshotsOf(b.v, b.vm.Meta.ID)
	if err != nil {
		return err
	}
	for i := range all {
		if by, is := configdb.CopyOf(b.v, all[i].Meta.ID); is {
			return api.Errorf(api.CodeRefused, "%s is being copied from snapshot %s of vm %s; wait for it, or remove it", by, all[i].Meta.Name, b.vm.Meta.Name)
		}
	}
	return nil
}

// target finds the node that the VM comes to: that of the request, or the best other
// one if that names neither node nor pool. It has to fit as for a start, with the
// pools that the volumes come to.
func (b *moving) target(volumes []api.Volume, in *api.MoveRequest) error {
	if in.Node == "" && in.Pool != "" || in.Node == b.from.Meta.Name || in.Node == b.from.Meta.ID {
		b.to = b.from
		return nil
	}
	only := ""
	if in.Node != "" {
		n, err := nodeOf(b.v, in.Node, "node")
		if err != nil {
			return err
		}
		only = n.Meta.Name
	}
	shown := b.vm.Clone()
	shown.Spec.ForgetState()
	shown.Spec.Disks = nil
	for i := range volumes {
		pool := in.Pool
		if pool == "" {
			pool = volumes[i].Spec.Pool
		}
		shown.Spec.Disks = append(shown.Spec.Disks, api.VMDisk{Pool: pool, Size: max(volumes[i].Spec.Size, volumes[i].Status.Size, 1)})
	}
	id, _, err := b.Placer.ChooseOther(b.v, shown, map[string]string{b.from.Meta.ID: "it is there now"}, only, nil)
	if err != nil {
		return err
	}
	b.to, err = configdb.Nodes.Get(b.v, id)
	return err
}

// add adds a volume to the move, if it has to move at all.
func (b *moving) add(vol *api.Volume, pool string) error {
	if pool == "" {
		pool = vol.Spec.Pool
	}
	from, err := configdb.Pools.Find(b.v, api.DefaultProject, vol.Spec.Pool)
	if err != nil {
		return err
	}
	to, err := configdb.Pools.Find(b.v, api.DefaultProject, pool)
	if err != nil {
		return atField(err, "pool")
	}
	for _, p := range []*api.Pool{&from, &to} {
		if p.Spec.Type == api.PoolRBD && to.Meta.ID != from.Meta.ID {
			return api.Errorf(api.CodeRefused, "pool %s is of type rbd, from and to which volumes are not moved; copy the content of volume %s with the tools of its guest to a new volume", p.Meta.Name, vol.Meta.Name)
		}
	}
	if to.Meta.ID == from.Meta.ID && (to.Spec.Type != api.PoolDir || vol.Spec.Node == b.to.Meta.Name) {
		return nil
	}
	if err := errors.Join(usable(api.KindPool, &to.Meta, ""), movable(vol)); err != nil {
		return err
	}
	holder := &b.to
	if from.Spec.Type == api.PoolDir {
		n, err := nodeOf(b.v, vol.Spec.Node, "")
		if err != nil {
			return err
		}
		holder = &n
	}
	if err := readyOn(b.v, &from, holder); err != nil {
		return err
	}
	if err := readyOn(b.v, &to, &b.to); err != nil {
		return err
	}
	if vol.Spec.Image != "" {
		if err := b.detachable(vol); err != nil {
			return err
		}
	}
	b.tx.RequireRevision(configdb.Volumes.SpecKey(vol.Meta.ID), vol.Meta.Revision)
	b.tx.RequireRevision(configdb.Pools.SpecKey(to.Meta.ID), to.Meta.Revision)
	b.volumes = append(b.volumes, api.VolumeMove{ID: vol.Meta.ID, Pool: to.Meta.Name, Whole: vol.Spec.Image != ""})
	return nil
}

// movable refuses a volume that is not at rest.
func movable(vol *api.Volume) error {
	switch {
	case vol.Meta.Deleting():
		return api.Errorf(api.CodeRefused, "volume %s is being deleted", vol.Meta.Name)
	case vol.Status.Phase != api.StorageReady:
		return api.Errorf(api.CodeRefused, "volume %s is %s; it moves when it is ready", vol.Meta.Name, vol.Status.Phase)
	case vol.Spec.Size > vol.Status.Size:
		return api.Errorf(api.CodeRefused, "volume %s is being enlarged; move it when that is done", vol.Meta.Name)
	}
	return nil
}

// detachable refuses a linked clone whose snapshots would lose what they have of the
// image, which stays behind.
func (b *moving) detachable(vol *api.Volume) error {
	all, err := configdb.Snapshots.List(b.v)
	if err != nil {
		return err
	}
	for i := range all {
		if slices.ContainsFunc(all[i].Status.Disks, func(d api.SnapshotDisk) bool { return d.VolumeID == vol.Meta.ID }) {
			return api.Errorf(api.CodeRefused, "volume %s is a clone of image %s, which stays where it is, and holds snapshot %s of vm %s, which needs the image; delete the snapshot, or make an independent vm of it: muster vm clone %s NEW --full",
				vol.Meta.Name, vol.Spec.Image, all[i].Meta.Name, all[i].Spec.VM, all[i].Spec.VM)
		}
	}
	return nil
}

func (b *moving) writeVM() (string, error) {
	return b.write(api.ActionVMMove, api.KindVM, b.vm.Meta, api.OperationSpec{VM: b.vm.Meta.Name, Epoch: b.binding.Spec.Epoch})
}

// write adds operation and task.
func (b *moving) write(action api.Action, kind api.Kind, target api.Meta, spec api.OperationSpec) (string, error) {
	now := time.Now
	if b.deadlines != nil {
		now = b.deadlines
	}
	task := api.NewTask(action, kind, target, b.Actor, vmOperationDeadline, now())
	task.Spec.TargetEpoch = spec.Epoch
	spec.Action, spec.TaskID, spec.NodeID = action, task.Meta.ID, b.to.Meta.ID
	spec.Move = &api.MoveSpec{Node: b.to.Meta.Name, FromNodeID: b.from.Meta.ID, From: b.from.Meta.Name, Volumes: b.volumes}
	op := api.Operation{Meta: api.NewMeta(api.KindOperation, b.project, target.Name), Spec: spec, Status: api.OperationStatus{Phase: api.TaskPending}}
	op.Meta.ID = target.ID
	// The target must not begin to leave meanwhile.
	b.tx.RequireRevision(configdb.Nodes.SpecKey(b.to.Meta.ID), b.to.Meta.Revision)
	if err := configdb.Tasks.CreateUnnamed(b.tx, &task); err != nil {
		return "", err
	}
	return task.Meta.ID, configdb.Operations.CreateUnnamed(b.tx, &op)
}
