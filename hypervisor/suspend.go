// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/qmp"
)

// QuitDeadline is how long QEMU may take to close its disks after its memory was
// saved, before it is killed.
const QuitDeadline = 20 * time.Second

// suspend saves the memory, then commits that the VM is suspended; the look that
// follows ends QEMU. Until that commit the guest can go on.
func (o *operation) suspend(ctx context.Context) error {
	v := o.h.cfg.DB.Local()
	if !o.live {
		return o.failed(ctx, api.Errorf(api.CodeRefused, "vm %s has ended meanwhile", o.vm.Meta.Name), nil)
	}
	set, err := o.set(v, o.hardware())
	if err = errors.Join(o.refused, err); err != nil {
		return o.failed(ctx, err, nil)
	}
	if o.again {
		return o.undoSuspend(ctx, set, o.interrupted())
	}
	if err := o.say(ctx, 10, "saving the memory"); err != nil {
		return err
	}
	machine, err := o.savedMachine(ctx)
	var size api.Size
	if err == nil {
		size, err = o.saveMemory(ctx, set)
	}
	if err == nil {
		err = o.commit(ctx, func(v *configdb.View, tx *configdb.Txn, op *api.Operation) error {
			vm, err := configdb.VMs.Get(v, o.vm.Meta.ID)
			if err != nil {
				return err
			}
			if vm.Meta.Deleting() || vm.Spec.Power == api.PowerStopped {
				return api.Errorf(api.CodeConflict, "vm %s was told to stop meanwhile", vm.Meta.Name)
			}
			vm.Spec.Power, vm.Spec.ForceStop = api.PowerSuspended, false
			st := api.SavedState{Meta: api.NewMeta(api.KindSavedState, vm.Meta.Project, vm.Meta.Name), Spec: api.SavedStateSpec{
				Tag: api.SuspendTag, Disks: set.disks, Hardware: o.hardware(), Machine: machine, Size: size, SavedAt: o.h.cfg.Now().UTC(),
			}}
			st.Meta.ID = vm.Meta.ID
			succeed(op)
			return errors.Join(configdb.VMs.UpdateSpec(v, tx, &vm), configdb.SavedStates.CreateUnnamed(tx, &st))
		})
		if err == nil {
			return nil
		}
	}
	return o.undoSuspend(ctx, set, err)
}

// saveMemory halts the guest and writes its memory into the first disk.
func (o *operation) saveMemory(ctx context.Context, set *diskSet) (api.Size, error) {
	names, err := set.names(ctx)
	if err != nil {
		return 0, err
	}
	// One that is there is of a suspend whose resume could not remove it.
	if err := set.drop(ctx, o.jobID(), api.SuspendTag); err != nil {
		return 0, err
	}
	state, err := o.in.runState(ctx)
	switch {
	case err != nil:
		return 0, err
	case state == runRunning:
		// Or QEMU would let it go on after the job.
		if err := o.in.command(ctx, "stop", nil); err != nil {
			return 0, err
		}
	case state != runPaused && state != runPrelaunch:
		return 0, api.Errorf(api.CodeRefused, "vm %s: QEMU reports state %s; a running or paused vm can be suspended", o.vm.Meta.Name, state)
	}
	if err := o.in.job(ctx, o.jobID(), "snapshot-save", map[string]any{"tag": api.SuspendTag, "vmstate": names[0], "devices": names}); err != nil {
		return 0, err
	}
	nodes, err := set.nodes(ctx, set.disks)
	if err != nil {
		return 0, err
	}
	size := nodes[set.disks[0].VolumeID].tags[api.SuspendTag]
	if size == 0 {
		return 0, errors.New("QEMU says that it saved the memory, but the first disk does not have it")
	}
	return size, nil
}

// undoSuspend removes what was saved; the look that follows lets the guest go on
// as wished.
func (o *operation) undoSuspend(ctx context.Context, set *diskSet, why error) error {
	if ctx.Err() != nil {
		return why
	}
	if err := o.say(ctx, 0, "undoing the suspend: %v", why); err != nil && !o.lost(err) {
		return errors.Join(why, err)
	}
	if _, err := configdb.SavedStates.Get(o.h.cfg.DB.Local(), o.vm.Meta.ID); err == nil {
		return nil // the write whose outcome was not known had landed
	}
	if o.again {
		_, _ = o.in.endJob(ctx, o.jobID()) // a QEMU that has gone has no job
	}
	uctx, cancel := context.WithTimeout(ctx, undoDeadline)
	defer cancel()
	if err := set.drop(uctx, o.jobID(), api.SuspendTag); err != nil {
		o.h.log.Warn("the memory that was saved stays in the disks until the next suspend", "vm", o.vm.Meta.ID, "tag", api.SuspendTag, "err", err)
	}
	return o.failed(ctx, why, nil)
}

// atRest reports a VM that is not to run and does not.
func (s *step) atRest() {
	s.vm.Status.RebootsDone = s.vm.Spec.Reboots
	if s.vm.Spec.Power != api.PowerSuspended {
		s.report(api.VMStopped, "")
		return
	}
	st, err := configdb.SavedStates.Get(s.v, s.vm.Meta.ID)
	switch {
	case err != nil:
		s.report(api.VMSuspended, fmt.Sprintf("its memory is gone; muster vm stop --discard-suspend %s makes it a stopped vm", s.vm.Meta.Name))
	case st.Status.Message != "":
		s.report(api.VMSuspended, st.Status.Message)
	default:
		s.report(api.VMSuspended, fmt.Sprintf("%s of memory saved on disk", st.Spec.Size))
	}
}

// saved carries out what the memory of a VM that is on disk asks for. While it
// is there, no guest runs beside it.
func (s *step) saved(ctx context.Context, st api.SavedState) (bool, error) {
	running := s.vm.Spec.Power == api.PowerRunning || s.vm.Spec.Power == api.PowerPaused
	vm, epoch := s.vm.Clone(), s.b.Spec.Epoch // the work goes on while this look writes its status
	switch {
	case st.Spec.Discard && s.proc == nil:
		s.silent = true
		s.begin(func(ctx context.Context) { s.h.discard(ctx, s.in, vm, epoch, st) })
		return true, nil
	case !running && s.proc != nil && !s.vm.Spec.ForceStop:
		return true, s.quit(ctx)
	case !running || s.proc == nil:
		return false, nil
	case s.in.loadPID != s.proc.PID, st.Spec.Discard:
		// Whether the memory is in it is not known. Its guest never ran.
		s.silent = true
		s.result.After = attachRetry
		return true, s.h.kill(ctx, s.vm.Meta.ID)
	}
	if err := s.protect(ctx, true); err != nil {
		return true, err
	}
	s.meet()
	if err := s.h.attach(ctx, s.in); err != nil {
		return true, s.unreachable(ctx, err)
	}
	s.alive()
	s.report(api.VMStarting, "loading the memory")
	s.begin(func(ctx context.Context) { s.h.load(ctx, s.in, vm, epoch, st) })
	return true, nil
}

// quit ends a QEMU whose memory is saved; it closes its disks properly.
func (s *step) quit(ctx context.Context) error {
	s.silent = true
	s.result.After = lookSoon
	if s.in.quitAt.IsZero() || s.in.quitPID != s.proc.PID {
		s.in.quitAt, s.in.quitPID = s.now, s.proc.PID
		s.meet()
		if err := s.h.attach(ctx, s.in); err == nil {
			err := s.in.command(ctx, "quit", nil)
			var refused *qmp.CommandError
			if errors.As(err, &refused) {
				return s.h.kill(ctx, s.vm.Meta.ID)
			}
		}
	}
	if s.now.Sub(s.in.quitAt) > QuitDeadline {
		return s.h.kill(ctx, s.vm.Meta.ID)
	}
	return nil
}

// noteLoad remembers that a new QEMU waits for its memory.
func (in *instance) noteLoad(s *step) {
	if _, saved := s.v.Get(configdb.SavedStates.SpecKey(in.id)); saved {
		in.loadPID = in.pid
	}
}

// load loads saved memory into a QEMU that has not run its guest, and commits
// that it is used up before anything lets the guest go on.
func (h *Hypervisor) load(ctx context.Context, in *instance, vm api.VM, epoch uint64, st api.SavedState) {
	set := &diskSet{h: h, in: in, epoch: epoch, project: vm.Meta.Project, disks: st.Spec.Disks}
	err := func() error {
		names, err := set.names(ctx)
		if err != nil {
			return err
		}
		return in.job(ctx, "muster-load", "snapshot-load", map[string]any{"tag": st.Spec.Tag, "vmstate": names[0], "devices": names})
	}()
	switch {
	case ctx.Err() != nil:
		return
	case gone(err):
		h.log.Warn("QEMU ended while memory was loaded into it; it is tried again", "vm", vm.Meta.ID, "err", err)
		return
	case err != nil:
		h.log.Warn("saved memory was not loaded", "vm", vm.Meta.ID, "tag", st.Spec.Tag, "err", err)
		why := fmt.Errorf("%w%s", err, tail(h.pathsOf(in.id).qemuLog, in.logFrom))
		if err := h.notLoaded(ctx, &vm, epoch, st, why); err != nil {
			h.log.Warn("a failed load was not recorded", "vm", vm.Meta.ID, "err", err)
		}
		return
	}
	err = h.transact(ctx, func(v *configdb.View, tx *configdb.Txn) error {
		now, err := configdb.SavedStates.Get(v, vm.Meta.ID)
		if err != nil {
			return api.IgnoreNotFound(err)
		}
		if err := h.stillBound(v, tx, vm.Meta.ID, epoch); err != nil {
			return err
		}
		cur, err := configdb.VMs.Get(v, vm.Meta.ID)
		if err != nil {
			return err
		}
		if cur.Spec.Power == api.PowerSuspended {
			return api.Errorf(api.CodeConflict, "vm %s was told to stay suspended meanwhile", cur.Meta.Name)
		}
		tx.RequireRevision(configdb.VMs.SpecKey(vm.Meta.ID), cur.Meta.Revision)
		cur.Status.Hardware = st.Spec.Hardware
		configdb.SavedStates.DeleteUnnamed(tx, &now)
		return errors.Join(configdb.VMs.UpdateStatus(v, tx, &cur), endRevert(v, tx, &st, succeed))
	})
	if err != nil {
		h.log.Warn("loaded memory was not recorded; it is loaded again", "vm", vm.Meta.ID, "err", err)
		return
	}
	h.log.Info("the guest goes on from saved memory", "vm", vm.Meta.ID, "tag", st.Spec.Tag)
	if st.Spec.SnapshotID == "" {
		if err := set.drop(ctx, "muster-load", st.Spec.Tag); err != nil && ctx.Err() == nil {
			h.log.Warn("memory that was loaded stays in the disks until the next suspend", "vm", vm.Meta.ID, "err", err)
		}
	}
}

// endRevert ends the operation that waits for a load.
func endRevert(v *configdb.View, tx *configdb.Txn, st *api.SavedState, how func(*api.Operation)) error {
	op, err := configdb.Operations.Get(v, st.Meta.ID)
	if err != nil || op.Spec.Action != api.ActionVMRevert || op.Spec.SnapshotID != st.Spec.SnapshotID || op.Status.Phase != api.TaskRunning {
		return api.IgnoreNotFound(err)
	}
	how(&op)
	return configdb.Operations.UpdateStatus(v, tx, &op)
}

// notLoaded makes the VM suspended again, with the reason; the look that follows
// ends QEMU. Nothing is lost: the memory stays where it is.
func (h *Hypervisor) notLoaded(ctx context.Context, vm *api.VM, epoch uint64, st api.SavedState, why error) error {
	text := fmt.Sprintf("the memory saved at %s could not be loaded: %v; muster vm start %s tries again, with --discard-suspend it starts without that memory",
		st.Spec.SavedAt.UTC().Format(time.RFC3339), why, vm.Meta.Name)
	return h.transact(ctx, func(v *configdb.View, tx *configdb.Txn) error {
		if err := h.stillBound(v, tx, vm.Meta.ID, epoch); err != nil {
			return err
		}
		now, err := configdb.SavedStates.Get(v, vm.Meta.ID)
		if err != nil {
			return api.IgnoreNotFound(err)
		}
		cur, err := configdb.VMs.Get(v, vm.Meta.ID)
		if err != nil {
			return err
		}
		now.Status.Message = text
		if cur.Spec.Power != api.PowerStopped {
			cur.Spec.Power, cur.Spec.ForceStop = api.PowerSuspended, false
		}
		return errors.Join(configdb.SavedStates.UpdateStatus(v, tx, &now), configdb.VMs.UpdateSpec(v, tx, &cur),
			endRevert(v, tx, &st, func(op *api.Operation) { fail(op, errors.New(text)) }))
	})
}

// discard removes saved memory that its VM's user does not want any more.
func (h *Hypervisor) discard(ctx context.Context, in *instance, vm api.VM, epoch uint64, st api.SavedState) {
	set := &diskSet{h: h, in: in, epoch: epoch, project: vm.Meta.Project, disks: st.Spec.Disks}
	var err error
	if st.Spec.SnapshotID == "" {
		err = set.drop(ctx, "muster-load", st.Spec.Tag)
	}
	if err == nil {
		err = h.transact(ctx, func(v *configdb.View, tx *configdb.Txn) error {
			now, err := configdb.SavedStates.Get(v, vm.Meta.ID)
			if err != nil {
				return api.IgnoreNotFound(err)
			}
			configdb.SavedStates.DeleteUnnamed(tx, &now)
			return errors.Join(h.stillBound(v, tx, vm.Meta.ID, epoch), endRevert(v, tx, &st, func(op *api.Operation) {
				fail(op, api.Errorf(api.CodeRefused, "the memory of the snapshot was discarded before it was loaded"))
			}))
		})
	}
	if err != nil && ctx.Err() == nil {
		h.log.Warn("discarded memory is not removed yet; it is tried again", "vm", vm.Meta.ID, "err", err)
		_ = pause(ctx, waitLook)
	}
}

// forgetTags removes what is saved of a VM that is being deleted from the volumes
// that outlive it. What cannot be removed stays in them.
func (s *step) forgetTags(ctx context.Context) {
	disks := s.h.cfg.Snapshots
	if disks == nil {
		return
	}
	type tagged struct {
		tag   string
		disks []api.SnapshotDisk
	}
	var all []tagged
	snaps, _ := configdb.SnapshotsOf(s.v, s.vm.Meta.ID) // one that cannot be read says nothing of its disks
	for i := range snaps {
		all = append(all, tagged{api.SnapshotTag(snaps[i].Meta.ID), snaps[i].Status.Disks})
		if snaps[i].Status.Undo {
			all = append(all, tagged{undoTag, snaps[i].Status.Disks})
		}
	}
	if st, err := configdb.SavedStates.Get(s.v, s.vm.Meta.ID); err == nil && st.Spec.SnapshotID == "" {
		all = append(all, tagged{st.Spec.Tag, st.Spec.Disks})
	}
	me := string(api.KindVM) + "/" + s.vm.Meta.ID
	for _, t := range all {
		for _, d := range t.disks {
			vol, err := configdb.Volumes.Get(s.v, d.VolumeID)
			if err != nil || vol.Meta.Owner == me {
				continue
			}
			if _, mine := s.v.Get(configdb.Volumes.RefPrefix(d.VolumeID) + me); !mine {
				continue
			}
			if err := disks.DeleteSnapshot(ctx, s.v, s.vm.Meta.Project, d.Volume, t.tag); err != nil {
				s.h.log.Warn("a snapshot of a deleted vm stays in a volume", "vm", s.vm.Meta.ID, "volume", d.Volume, "tag", t.tag, "err", err)
			}
		}
	}
}

// dropSnapshots adds to the end of a VM the end of what is saved of it. What is
// in the files of its own volumes goes with them.
func (s *step) dropSnapshots(tx *configdb.Txn) error {
	all, err := configdb.SnapshotsOf(s.v, s.vm.Meta.ID)
	if err != nil {
		return err
	}
	for i := range all {
		configdb.DeleteSnapshot(tx, &all[i])
	}
	st, err := configdb.SavedStates.Get(s.v, s.vm.Meta.ID)
	if err != nil {
		return api.IgnoreNotFound(err)
	}
	configdb.SavedStates.DeleteUnnamed(tx, &st)
	return nil
}
