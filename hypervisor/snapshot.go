// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// isFull reports that a disk could not be written; of memory QEMU only says that
// there was an error, and a full pool is nearly always its cause.
func isFull(text string) bool {
	return strings.Contains(text, "No space left on device") || strings.Contains(text, "Error while writing VM state")
}

// set returns the disks of hardware.
func (o *operation) set(v *configdb.View, hw *api.VMSpec) (*diskSet, error) {
	d := &diskSet{h: o.h, in: o.in, epoch: o.op.Spec.Epoch, project: o.vm.Meta.Project}
	spec := o.vm.Spec.WithHardware(hw)
	spec.AssignSlots(nil)
	add := func(volume string, slot int) error {
		vol, err := configdb.Volumes.Find(v, o.vm.Meta.Project, volume)
		if err != nil {
			return err
		}
		if f := vol.Status.Format; f != "" && f != "qcow2" {
			return errRaw(volume, f)
		}
		d.disks = append(d.disks, api.SnapshotDisk{Volume: vol.Meta.Name, VolumeID: vol.Meta.ID, Slot: slot, Size: max(vol.Status.Size, vol.Spec.Size)})
		return nil
	}
	for _, disk := range spec.Disks {
		if err := add(disk.Volume, disk.Slot); err != nil {
			return nil, err
		}
	}
	if len(d.disks) == 0 {
		return nil, api.Errorf(api.CodeRefused, "vm %s has no disk to keep it on", o.vm.Meta.Name)
	}
	if spec.UEFI() {
		if err := add(spec.Firmware.Volume, 0); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// needMemory refuses the disks alone where something else would not fit to them.
func (o *operation) needMemory(snap *api.Snapshot) error {
	if snap.Spec.Memory || snap.Spec.Temporary || o.hardware().TPM == nil {
		return nil // what is copied gets a TPM of its own
	}
	return api.Errorf(api.CodeRefused, api.TPMNeedsMemory, o.vm.Meta.Name)
}

// hardware is what the guest has now.
func (o *operation) hardware() *api.VMSpec {
	if o.live && o.vm.Status.Hardware != nil {
		return o.vm.Status.Hardware
	}
	return o.vm.Spec.Hardware()
}

func (o *operation) jobID() string { return "muster-" + o.op.Spec.TaskID }

// snapshot makes a snapshot of all disks, and of the memory if wished.
func (o *operation) snapshot(ctx context.Context) error {
	v := o.h.cfg.DB.Local()
	snap, err := configdb.Snapshots.Get(v, o.op.Spec.SnapshotID)
	if err != nil {
		return o.failed(ctx, err, nil)
	}
	tag := api.SnapshotTag(snap.Meta.ID)
	set, err := o.set(v, o.hardware())
	if err == nil {
		err = errors.Join(o.refused, o.needMemory(&snap))
	}
	if err != nil {
		return o.dropped(ctx, err)
	}
	if o.again {
		return o.undoSnapshot(ctx, set, tag, o.interrupted())
	}
	if meant := o.vm.Spec.Power; !o.live && (snap.Spec.Memory || meant == api.PowerRunning || meant == api.PowerPaused) {
		return o.dropped(ctx, api.Errorf(api.CodeRefused, "QEMU of vm %s has ended meanwhile; ask again when it runs", o.vm.Meta.Name))
	}
	if err := o.say(ctx, 10, "taking snapshot %s", snap.Meta.Name); err != nil {
		return err
	}
	taken := api.SnapshotStatus{Phase: api.SnapshotReady, Tag: tag, Disks: set.disks, Hardware: o.hardware(), Power: api.PowerStopped, Consistency: api.ConsistencyStopped, Current: true}
	if o.live {
		err = o.takeLive(ctx, set, &snap, &taken)
	} else {
		if err := set.untouched(ctx, tag); err != nil {
			return o.dropped(ctx, err)
		}
		err = set.offline(ctx, set.disks, func(v *configdb.View, volume string) error {
			return o.h.cfg.Snapshots.CreateSnapshot(ctx, v, set.project, volume, tag)
		})
	}
	if err == nil {
		at := o.h.cfg.Now().UTC()
		taken.TakenAt = &at
		err = o.commit(ctx, func(v *configdb.View, tx *configdb.Txn, op *api.Operation) error {
			now, err := configdb.Snapshots.Get(v, snap.Meta.ID)
			if err != nil {
				return err
			}
			now.Status = taken
			succeed(op)
			return errors.Join(o.setCurrent(v, tx, now.Meta.ID), configdb.Snapshots.UpdateStatus(v, tx, &now))
		})
		if err == nil {
			return nil
		}
	}
	return o.undoSnapshot(ctx, set, tag, err)
}

// takeLive lets QEMU make the snapshot.
func (o *operation) takeLive(ctx context.Context, set *diskSet, snap *api.Snapshot, taken *api.SnapshotStatus) error {
	names, err := set.names(ctx)
	if err != nil {
		return err
	}
	state, err := o.in.runState(ctx)
	if err != nil {
		return err
	}
	switch state {
	case runRunning:
		taken.Power = api.PowerRunning
	case runPaused, runPrelaunch:
		taken.Power = api.PowerPaused
	default:
		return api.Errorf(api.CodeRefused, "vm %s: QEMU reports state %s; a snapshot is taken of a running, paused or stopped vm", o.vm.Meta.Name, state)
	}
	if snap.Spec.Memory {
		if taken.Machine, err = o.savedMachine(ctx); err != nil {
			return err
		}
		taken.Consistency = api.ConsistencyMemory
		err = o.in.job(ctx, o.jobID(), "snapshot-save", map[string]any{"tag": taken.Tag, "vmstate": names[0], "devices": names})
	} else {
		taken.Consistency, err = o.takeDisks(ctx, names, taken.Tag)
	}
	if err != nil {
		return err
	}
	nodes, err := set.nodes(ctx, set.disks)
	if err != nil {
		return err
	}
	for _, disk := range set.disks {
		if !nodes[disk.VolumeID].has(taken.Tag) {
			return fmt.Errorf("QEMU says that it made the snapshot, but volume %s does not have it", disk.Volume)
		}
	}
	taken.MemorySize = nodes[set.disks[0].VolumeID].tags[taken.Tag]
	return nil
}

// takeDisks makes the snapshots of all disks in one transaction of QEMU, with
// the guest's file systems frozen if its agent can do that.
func (o *operation) takeDisks(ctx context.Context, names []string, tag string) (api.Consistency, error) {
	got := api.ConsistencyCrash
	began := o.h.cfg.Now()
	n, err := o.h.cfg.Quiesce.Freeze(ctx, o.vm.Meta.ID, freezeMost)
	switch {
	case err != nil:
		o.h.log.Info("the guest's file systems are not frozen for a snapshot", "vm", o.vm.Meta.ID, "err", err)
	case n > 0:
		defer o.thaw(ctx)
	}
	var actions []map[string]any
	for _, n := range names {
		actions = append(actions, map[string]any{"type": "blockdev-snapshot-internal-sync", "data": map[string]any{"device": n, "name": tag}})
	}
	conn := o.in.openConn()
	if conn == nil {
		return got, errors.New("the connection to QEMU has ended")
	}
	jctx, cancel := context.WithTimeout(ctx, JobDeadline)
	defer cancel()
	if err := conn.Execute(jctx, "transaction", map[string]any{"actions": actions}, nil); err != nil {
		if isFull(err.Error()) {
			err = api.Errorf(api.CodeStorageFull, "%w; the pool of the disk is most likely full: free some space", err)
		}
		return got, err
	}
	if n > 0 && o.h.cfg.Now().Sub(began) < freezeMost {
		got = api.ConsistencyQuiesced
	}
	return got, nil
}

func (o *operation) thaw(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), freezeMost)
	defer cancel()
	if err := o.h.cfg.Quiesce.Thaw(ctx, o.vm.Meta.ID); err != nil {
		o.h.log.Warn("the guest's file systems were not thawed; that is tried again", "vm", o.vm.Meta.ID, "err", err)
	}
}

// undoSnapshot takes back what was made of a snapshot and removes the object.
// If not all could be taken back, the object stays and says so.
func (o *operation) undoSnapshot(ctx context.Context, set *diskSet, tag string, why error) error {
	if ctx.Err() != nil {
		return why // the next life does it
	}
	if err := o.say(ctx, 0, "undoing the snapshot: %v", why); err != nil && !o.lost(err) {
		return errors.Join(why, err)
	} else if snap, getErr := configdb.Snapshots.Get(o.h.cfg.DB.Local(), o.op.Spec.SnapshotID); err != nil && getErr == nil && snap.Status.Phase == api.SnapshotReady {
		return nil // the write whose outcome was not known had landed
	}
	if o.again && o.live {
		_, _ = o.in.endJob(ctx, o.jobID()) // a QEMU that has gone has no job
	}
	uctx, cancel := context.WithTimeout(ctx, undoDeadline)
	defer cancel()
	if err := set.drop(uctx, o.jobID(), tag); err != nil {
		rest := fmt.Errorf("%w; what was made of it could not be removed: %w", why, err)
		return o.failed(ctx, rest, func(v *configdb.View, tx *configdb.Txn) error {
			return o.snapshotFailed(v, tx, tag, set.disks, rest)
		})
	}
	return o.dropped(ctx, why)
}

// lost reports that the operation is no longer this node's to finish.
func (o *operation) lost(err error) bool { return errors.Is(err, errTaken) }

func (o *operation) snapshotFailed(v *configdb.View, tx *configdb.Txn, tag string, disks []api.SnapshotDisk, why error) error {
	snap, err := configdb.Snapshots.Get(v, o.op.Spec.SnapshotID)
	if err != nil {
		return api.IgnoreNotFound(err)
	}
	snap.Status.Phase, snap.Status.Tag, snap.Status.Disks = api.SnapshotFailed, tag, disks
	snap.Status.Message = why.Error() + "; remove it with muster vm snapshot rm " + o.vm.Meta.Name + " " + snap.Meta.Name
	return configdb.Snapshots.UpdateStatus(v, tx, &snap)
}

// dropped ends a snapshot's making in failure: as if it had never been asked for.
func (o *operation) dropped(ctx context.Context, why error) error {
	remove := func(v *configdb.View, tx *configdb.Txn) error {
		snap, err := configdb.Snapshots.Get(v, o.op.Spec.SnapshotID)
		if err != nil || snap.Status.Phase == api.SnapshotReady {
			return api.IgnoreNotFound(err)
		}
		configdb.DeleteSnapshot(tx, &snap)
		return nil
	}
	err := o.failed(ctx, why, remove)
	if !o.lost(err) {
		return err
	}
	// Its task was ended by others; the disks are clean, so the object goes too.
	return errors.Join(why, o.h.transact(ctx, func(v *configdb.View, tx *configdb.Txn) error {
		return errors.Join(o.h.stillBound(v, tx, o.vm.Meta.ID, o.op.Spec.Epoch), remove(v, tx))
	}))
}

// setCurrent moves the mark of the snapshot that the VM descends from; id may be
// empty. That snapshot's own status is written by the caller.
func (o *operation) setCurrent(v *configdb.View, tx *configdb.Txn, id string) error {
	all, err := configdb.SnapshotsOf(v, o.vm.Meta.ID)
	if err != nil {
		return err
	}
	for i := range all {
		if all[i].Meta.ID == id || !all[i].Status.Current {
			continue
		}
		all[i].Status.Current = false
		if err := configdb.Snapshots.UpdateStatus(v, tx, &all[i]); err != nil {
			return err
		}
	}
	return nil
}

// forget removes a snapshot from the disks, then the object. It may be repeated.
func (o *operation) forget(ctx context.Context) error {
	v := o.h.cfg.DB.Local()
	snap, err := configdb.Snapshots.Get(v, o.op.Spec.SnapshotID)
	if err != nil {
		return o.failed(ctx, err, nil)
	}
	tag := api.SnapshotTag(snap.Meta.ID)
	set := &diskSet{h: o.h, in: o.in, epoch: o.op.Spec.Epoch, project: o.vm.Meta.Project, disks: snap.Status.Disks}
	if len(set.disks) == 0 { // its making was never finished
		if s, err := o.set(v, o.vm.Spec.Hardware()); err == nil {
			set.disks = s.disks
		}
	}
	if err := o.notElsewhere(v, set.existing(v)); err != nil {
		return o.failed(ctx, err, nil)
	}
	err = o.commit(ctx, func(v *configdb.View, tx *configdb.Txn, op *api.Operation) error {
		now, err := configdb.Snapshots.Get(v, snap.Meta.ID)
		if err != nil {
			return err
		}
		op.Status.Phase, op.Status.Progress, op.Status.Message = api.TaskRunning, 10, "removing snapshot "+now.Meta.Name
		now.Status.Phase = api.SnapshotDeleting
		return configdb.Snapshots.UpdateStatus(v, tx, &now)
	})
	if err != nil {
		return err
	}
	err = set.drop(ctx, o.jobID(), tag)
	if err == nil && snap.Status.Undo {
		err = set.drop(ctx, o.jobID(), undoTag)
	}
	if err != nil {
		if ctx.Err() != nil {
			return err
		}
		return o.failed(ctx, err, func(v *configdb.View, tx *configdb.Txn) error { return o.snapshotFailed(v, tx, tag, set.disks, err) })
	}
	return o.commit(ctx, func(v *configdb.View, tx *configdb.Txn, op *api.Operation) error {
		now, err := configdb.Snapshots.Get(v, snap.Meta.ID)
		if err != nil {
			return err
		}
		succeed(op)
		if err := o.adoptChildren(v, tx, &now); err != nil {
			return err
		}
		configdb.DeleteSnapshot(tx, &now)
		return nil
	})
}

// adoptChildren gives the children of a snapshot that goes to its parent, and
// the mark of the current one too.
func (o *operation) adoptChildren(v *configdb.View, tx *configdb.Txn, gone *api.Snapshot) error {
	all, err := configdb.SnapshotsOf(v, o.vm.Meta.ID)
	if err != nil {
		return err
	}
	for i := range all {
		s := &all[i]
		if s.Spec.Parent == gone.Meta.Name {
			s.Spec.Parent = gone.Spec.Parent
			if err := configdb.Snapshots.UpdateSpec(v, tx, s); err != nil {
				return err
			}
		}
		if gone.Status.Current && s.Meta.Name == gone.Spec.Parent {
			s.Status.Current = true
			if err := configdb.Snapshots.UpdateStatus(v, tx, s); err != nil {
				return err
			}
		}
	}
	return nil
}

// notElsewhere refuses if another VM has one of the disks.
func (o *operation) notElsewhere(v *configdb.View, disks []api.SnapshotDisk) error {
	for _, d := range disks {
		by := configdb.Volumes.Referrers(v, d.VolumeID)
		mine := string(api.KindVM) + "/" + o.vm.Meta.ID
		if i := slices.IndexFunc(by, func(b string) bool { return b != mine }); i >= 0 {
			_, id, _ := strings.Cut(by[i], "/")
			if vm, err := configdb.VMs.Get(v, id); err == nil {
				id = vm.Meta.Name
			}
			return api.Errorf(api.CodeRefused, "volume %s, which was a disk of vm %s, is attached to %s now; detach it there first", d.Volume, o.vm.Meta.Name, id)
		}
	}
	return nil
}

// since is for messages.
func since(t *time.Time) string {
	if t == nil {
		return "an unknown time"
	}
	return t.UTC().Format(time.RFC3339)
}
