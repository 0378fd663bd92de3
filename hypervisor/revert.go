// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// undoTag is the internal snapshot that a revert makes of the disks first, to
// take all of them back if one of them fails.
const undoTag = "muster-undo"

// revert takes the disks of a VM without process back to a snapshot, all or
// none, then its hardware; the memory is loaded by the start that follows.
func (o *operation) revert(ctx context.Context) error {
	v := o.h.cfg.DB.Local()
	snap, err := configdb.Snapshots.Get(v, o.op.Spec.SnapshotID)
	if err != nil {
		return o.failed(ctx, err, nil)
	}
	set := &diskSet{h: o.h, in: o.in, epoch: o.op.Spec.Epoch, project: o.vm.Meta.Project, disks: snap.Status.Disks}
	if snap.Status.Phase != api.SnapshotReverting {
		if err := o.prepareRevert(ctx, v, &snap, set); err != nil {
			if ctx.Err() != nil {
				return err
			}
			return o.failed(ctx, err, nil)
		}
	}
	err = set.offline(ctx, set.disks, func(v *configdb.View, volume string) error {
		return o.h.cfg.Snapshots.ApplySnapshot(ctx, v, set.project, volume, snap.Status.Tag)
	})
	switch {
	case ctx.Err() != nil:
		return err
	case err != nil:
		return o.undoRevert(ctx, &snap, set, err)
	}
	if err := o.commit(ctx, func(v *configdb.View, tx *configdb.Txn, op *api.Operation) error {
		return o.reverted(v, tx, op, snap.Meta.ID)
	}); err != nil {
		if ctx.Err() != nil || o.lost(err) {
			return err
		}
		return o.undoRevert(ctx, &snap, set, err)
	}
	o.dropUndo(ctx, snap.Meta.ID, set)
	return nil
}

// prepareRevert looks at everything before anything is touched, and makes what
// the way back needs.
func (o *operation) prepareRevert(ctx context.Context, v *configdb.View, snap *api.Snapshot, set *diskSet) error {
	if err := o.mayRevert(v, snap); err != nil {
		return err
	}
	if err := o.say(ctx, 10, "reverting to snapshot %s", snap.Meta.Name); err != nil {
		return err
	}
	disks := o.h.cfg.Snapshots
	err := set.offline(ctx, set.disks, func(v *configdb.View, volume string) error {
		var has bool
		err := unlocked(ctx, func() (err error) {
			has, err = disks.HasSnapshot(ctx, v, set.project, volume, snap.Status.Tag)
			return err
		})
		if err == nil && !has {
			err = api.Errorf(api.CodeRefused, "its file does not have snapshot %s (%s) any more", snap.Meta.Name, snap.Status.Tag)
		}
		return err
	})
	if err != nil {
		return err
	}
	err = set.offline(ctx, set.disks, func(v *configdb.View, volume string) error {
		// One that is there is of an earlier revert: the disks were written since.
		if err := disks.DeleteSnapshot(ctx, v, set.project, volume, undoTag); err != nil {
			return err
		}
		return disks.CreateSnapshot(ctx, v, set.project, volume, undoTag)
	})
	if err == nil {
		err = o.setPhase(ctx, snap.Meta.ID, api.SnapshotReverting)
	}
	if err != nil && ctx.Err() == nil {
		o.dropUndo(ctx, snap.Meta.ID, set)
	}
	return err
}

// mayRevert checks that the disks of then are there and are nobody else's.
func (o *operation) mayRevert(v *configdb.View, snap *api.Snapshot) error {
	if snap.Status.Hardware == nil || len(snap.Status.Disks) == 0 {
		return api.Errorf(api.CodeRefused, "snapshot %s is %s and cannot be reverted to", snap.Meta.Name, snap.Status.Phase)
	}
	for _, d := range snap.Status.Disks {
		vol, err := configdb.Volumes.Get(v, d.VolumeID)
		switch {
		case err != nil || vol.Meta.Name != d.Volume:
			return api.Errorf(api.CodeRefused, "volume %s, which vm %s had when snapshot %s was taken (%s), is gone", d.Volume, o.vm.Meta.Name, snap.Meta.Name, since(snap.Status.TakenAt))
		case vol.Meta.Deleting():
			return api.Errorf(api.CodeRefused, "volume %s is being deleted", d.Volume)
		case max(vol.Status.Size, vol.Spec.Size) != d.Size:
			return api.Errorf(api.CodeRefused, "volume %s had %s when snapshot %s was taken and has %s now; a volume is not made smaller or larger by a revert", d.Volume, d.Size, snap.Meta.Name, max(vol.Status.Size, vol.Spec.Size))
		}
	}
	if err := o.notElsewhere(v, snap.Status.Disks); err != nil {
		return err
	}
	if differs := o.vm.Spec.ClaimedDiffers(snap.Status.Hardware); snap.Spec.Memory && len(differs) > 0 {
		return errOtherMachine(&o.vm.Meta, snap, differs)
	}
	return configdb.ClaimNICs(v, &configdb.Txn{}, &o.vm.Meta, snap.Status.Hardware.NICs)
}

func errOtherMachine(vm *api.Meta, snap *api.Snapshot, differs []string) error {
	return api.Errorf(api.CodeRefused, "vm %s has another %s now than when snapshot %s was taken, and its memory goes on in the machine of then only; make it what it was first", vm.Name, strings.Join(differs, ", "), snap.Meta.Name)
}

func (o *operation) setPhase(ctx context.Context, id string, phase api.SnapshotPhase) error {
	return o.commit(ctx, func(v *configdb.View, tx *configdb.Txn, op *api.Operation) error {
		snap, err := configdb.Snapshots.Get(v, id)
		if err != nil {
			return err
		}
		op.Status.Progress = 30
		snap.Status.Phase = phase
		snap.Status.Undo = true
		return configdb.Snapshots.UpdateStatus(v, tx, &snap)
	})
}

// undoRevert takes all disks back to where they were. If that fails too, the
// snapshot stays marked, so that the VM does not start on a mixture.
func (o *operation) undoRevert(ctx context.Context, snap *api.Snapshot, set *diskSet, why error) error {
	if err := o.say(ctx, 0, "undoing the revert: %v", why); err != nil {
		return errors.Join(why, err)
	}
	uctx, cancel := context.WithTimeout(ctx, undoDeadline)
	defer cancel()
	err := set.offline(uctx, set.disks, func(v *configdb.View, volume string) error {
		return o.h.cfg.Snapshots.ApplySnapshot(uctx, v, set.project, volume, undoTag)
	})
	if ctx.Err() != nil {
		return why
	}
	if err != nil {
		mixed := fmt.Errorf("%w; and the disks could not be taken back to where they were: %w; vm %s does not start until a revert has succeeded", why, err, o.vm.Meta.Name)
		return o.failed(ctx, mixed, nil)
	}
	err = o.failed(ctx, fmt.Errorf("%w; all disks are as they were before", why), func(v *configdb.View, tx *configdb.Txn) error {
		now, err := configdb.Snapshots.Get(v, snap.Meta.ID)
		if err != nil {
			return api.IgnoreNotFound(err)
		}
		now.Status.Phase = api.SnapshotReady
		return configdb.Snapshots.UpdateStatus(v, tx, &now)
	})
	if err == nil || !errors.Is(err, errTaken) {
		o.dropUndo(ctx, snap.Meta.ID, set)
	}
	return err
}

// dropUndo removes the way back. If that does not work, a later look does it.
func (o *operation) dropUndo(ctx context.Context, id string, set *diskSet) {
	o.h.dropUndo(ctx, &o.vm, o.op.Spec.Epoch, id, set)
}

func (h *Hypervisor) dropUndo(ctx context.Context, vm *api.VM, epoch uint64, id string, set *diskSet) bool {
	err := set.drop(ctx, "muster-undo", undoTag)
	if err == nil {
		err = h.transact(ctx, func(v *configdb.View, tx *configdb.Txn) error {
			snap, err := configdb.Snapshots.Get(v, id)
			if err != nil || !snap.Status.Undo {
				return api.IgnoreNotFound(err)
			}
			snap.Status.Undo = false
			return errors.Join(h.stillBound(v, tx, vm.Meta.ID, epoch), configdb.Snapshots.UpdateStatus(v, tx, &snap))
		})
	}
	if err != nil && ctx.Err() == nil {
		h.log.Warn("the way back of a revert is still in the disks; its removal is tried again", "vm", vm.Meta.ID, "tag", undoTag, "err", err)
	}
	return err == nil
}

// leftUndo begins the removal of what a revert left in the disks whose daemon was
// killed at its end.
func (s *step) leftUndo(all []api.Snapshot) bool {
	for i := range all {
		snap := &all[i]
		if !snap.Status.Undo || snap.Status.Phase != api.SnapshotReady {
			continue
		}
		set := &diskSet{h: s.h, in: s.in, epoch: s.b.Spec.Epoch, project: s.vm.Meta.Project, disks: snap.Status.Disks}
		vm, epoch, id := s.vm, s.b.Spec.Epoch, snap.Meta.ID
		s.silent = true
		s.begin(func(ctx context.Context) {
			if !s.h.dropUndo(ctx, &vm, epoch, id, set) {
				_ = pause(ctx, waitLook)
			}
		})
		return true
	}
	return false
}

// reverted gives the VM the hardware of then, in the transaction that ends the
// revert of its disks.
func (o *operation) reverted(v *configdb.View, tx *configdb.Txn, op *api.Operation, id string) error {
	snap, err := configdb.Snapshots.Get(v, id)
	if err != nil {
		return err
	}
	vm, err := configdb.VMs.Get(v, o.vm.Meta.ID)
	if err != nil {
		return err
	}
	if st, err := configdb.SavedStates.Get(v, vm.Meta.ID); err == nil && st.Spec.SnapshotID == id && snap.Status.Phase == api.SnapshotReady {
		return nil // written already, by an attempt without an answer
	}
	if err := o.exchangeDevices(v, tx, &vm, &snap); err != nil {
		return err
	}
	now := vm.Spec
	vm.Spec = now.WithHardware(snap.Status.Hardware)
	vm.Spec.KeepClaimed(&now)
	switch {
	case snap.Spec.Memory:
		vm.Spec.Power, vm.Spec.ForceStop = snap.Status.Power, false
		st := api.SavedState{Meta: api.NewMeta(api.KindSavedState, vm.Meta.Project, vm.Meta.Name), Spec: api.SavedStateSpec{
			Tag: snap.Status.Tag, Disks: snap.Status.Disks, Hardware: snap.Status.Hardware, Machine: snap.Status.Machine, SnapshotID: id, Size: snap.Status.MemorySize, SavedAt: *snap.Status.TakenAt,
		}}
		st.Meta.ID = vm.Meta.ID
		if err := configdb.SavedStates.CreateUnnamed(tx, &st); err != nil {
			return err
		}
		op.Status.Progress, op.Status.Message = 60, "loading the memory of snapshot "+snap.Meta.Name
	default:
		if op.Spec.Start {
			vm.Spec.Power, vm.Spec.ForceStop = api.PowerRunning, false
		}
		succeed(op)
	}
	if err := configdb.VMs.UpdateSpec(v, tx, &vm); err != nil {
		return err
	}
	all, err := configdb.SnapshotsOf(v, vm.Meta.ID)
	if err != nil {
		return err
	}
	for i := range all {
		s := &all[i]
		s.Status.Current = s.Meta.ID == id
		if s.Status.Phase == api.SnapshotReverting { // also one that was interrupted
			s.Status.Phase = api.SnapshotReady
		}
		if err := configdb.Snapshots.UpdateStatus(v, tx, s); err != nil {
			return err
		}
	}
	return nil
}

// exchangeDevices detaches what the VM did not have then, without deleting it,
// and attaches what it had.
func (o *operation) exchangeDevices(v *configdb.View, tx *configdb.Txn, vm *api.VM, snap *api.Snapshot) error {
	then := map[string]bool{}
	for _, d := range snap.Status.Disks {
		then[d.Volume] = true
		if slices.Contains(vm.Spec.StateVolumes(), d.Volume) {
			continue // the machine stays the VM's
		}
		if !slices.ContainsFunc(vm.Spec.Disks, func(now api.VMDisk) bool { return now.Volume == d.Volume }) {
			tx.RequireEmpty(configdb.Volumes.RefPrefix(d.VolumeID))
			configdb.Volumes.Refer(tx, d.VolumeID, api.KindVM, vm.Meta.ID)
		}
	}
	for _, d := range vm.Spec.Disks {
		vol, err := configdb.Volumes.Find(v, vm.Meta.Project, d.Volume)
		if err == nil && !then[d.Volume] {
			if err := configdb.ReleaseVolume(v, tx, vm.Meta.ID, &vol); err != nil {
				return err
			}
		}
	}
	left := slices.DeleteFunc(slices.Clone(vm.Spec.NICs), func(n api.VMNIC) bool {
		return slices.ContainsFunc(snap.Status.Hardware.NICs, func(t api.VMNIC) bool { return t.MAC == n.MAC && t.Network == n.Network && t.Address == n.Address })
	})
	configdb.ReleaseNICs(v, tx, &api.VM{Meta: vm.Meta, Spec: api.VMSpec{NICs: left}})
	return configdb.ClaimNICs(v, tx, &vm.Meta, snap.Status.Hardware.NICs)
}
