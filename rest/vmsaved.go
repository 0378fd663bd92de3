// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"errors"
	"net/http"
	"reflect"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/feature"
)

// saved returns the memory that a VM's next start goes on from, if there is any
// that is not to be discarded.
func (c *change) saved(vmID string) (*api.SavedState, bool) {
	st, err := configdb.SavedStates.Get(c.v, vmID)
	return &st, err == nil && !st.Spec.Discard
}

func errSuspended(vm *api.VM, what string) error {
	return api.Errorf(api.CodeRefused, "vm %s is suspended, so %s; let it go on (muster vm resume %s), or throw its memory away (muster vm stop --discard-suspend %s)",
		vm.Meta.Name, what, vm.Meta.Name, vm.Meta.Name)
}

// sameIfSuspended refuses other hardware for a VM whose guest expects to find its
// own again.
func sameIfSuspended(old, want *api.VM) error {
	was := old.Clone()
	was.Spec.SetDefaults()
	if old.Spec.Power == api.PowerSuspended && !reflect.DeepEqual(was.Spec.Hardware(), want.Spec.Hardware()) {
		return errSuspended(old, "its hardware cannot be changed")
	}
	return nil
}

// respectSaved keeps the saved memory of a VM from being lost without a word:
// only the flag for it does that.
func (c *change) respectSaved(st *vmState, action api.Action, discard bool) error {
	_, has := c.saved(st.vm.Meta.ID)
	if !has && st.vm.Spec.Power != api.PowerSuspended {
		if discard {
			return api.Errorf(api.CodeRefused, "vm %s is %s, not suspended: there is no saved memory to discard", st.vm.Meta.Name, phaseText(&st.vm))
		}
		return nil
	}
	switch {
	case discard:
		c.discardSaved(&st.vm)
		if action == api.ActionVMStop && st.vm.Spec.Power == api.PowerSuspended {
			st.vm.Spec.Power, st.vm.Spec.ForceStop = api.PowerStopped, true
		}
	case action == api.ActionVMStart, action == api.ActionVMResume:
	case action == api.ActionVMStop && st.vm.Spec.Power != api.PowerSuspended:
		// It is being loaded: it stays where it is.
		st.vm.Spec.Power, st.vm.Spec.ForceStop = api.PowerSuspended, false
	default:
		return errSuspended(&st.vm, "it can be started or resumed only")
	}
	return nil
}

// discardSaved asks the VM's node to drop its saved memory.
func (c *change) discardSaved(vm *api.VM) {
	st, has := c.saved(vm.Meta.ID)
	if !has {
		return
	}
	st.Spec.Discard = true
	// It can only fail if the object is gone.
	_ = configdb.SavedStates.UpdateSpec(c.v, c.tx, st)
}

// quiet refuses long work on a VM that is being deleted or whose memory is saved.
func (c *change) quiet(st *vmState) error {
	if st.vm.Meta.Deleting() {
		return api.Errorf(api.CodeRefused, "vm %s is being deleted", st.vm.Meta.Name)
	}
	if _, has := c.saved(st.vm.Meta.ID); has || st.vm.Spec.Power == api.PowerSuspended {
		return errSuspended(&st.vm, "this is not possible now")
	}
	return nil
}

// needQcow2 refuses what internal snapshots cannot do: a VM without disks, or
// with one that is not qcow2.
func (c *change) needQcow2(vm *api.VM) error {
	if len(vm.Spec.Disks) == 0 {
		return api.Errorf(api.CodeRefused, "vm %s has no disk to keep it on; add a qcow2 volume", vm.Meta.Name)
	}
	for _, d := range vm.Spec.Disks {
		vol, err := configdb.Volumes.Find(c.v, vm.Meta.Project, d.Volume)
		if err != nil {
			return err
		}
		if vol.Status.Phase != api.StorageReady {
			return api.Errorf(api.CodeRefused, "volume %s of vm %s is not ready; wait for it", d.Volume, vm.Meta.Name)
		}
		if f := vol.Status.Format; f != "" && f != "qcow2" {
			return api.Errorf(api.CodeRefused, "volume %s of vm %s has the format %s, and only qcow2 volumes (those in pools of type dir and shared) have snapshots; detach it, or copy its content to a qcow2 volume", d.Volume, vm.Meta.Name, f)
		}
	}
	return nil
}

// maySave refuses what keeps the state of VMs as long as a node of the cluster
// would not respect it.
func (c *change) maySave() error {
	if f := feature.Snapshots; !f.InForce(c.v) {
		return api.Errorf(api.CodeRefused, "snapshots, suspend and clone need feature level %d, and the cluster is at %d, because a node with older software would start a suspended vm without its memory; see muster cluster status", f.Level(), max(1, feature.Level(c.v)))
	}
	return nil
}

// needSavable refuses memory that QEMU cannot save.
func needSavable(vm *api.VM) error {
	spec := &vm.Spec
	if vm.Status.Hardware != nil {
		spec = vm.Status.Hardware // what waits for the next start is not there yet
	}
	for _, d := range spec.HostDevices {
		if d.PCI != "" {
			return api.Errorf(api.CodeRefused, "vm %s has the device %s of its host, whose state cannot be saved; take it out and restart the vm, or take a snapshot without memory", vm.Meta.Name, d.PCI)
		}
	}
	return nil
}

// suspend answers POST /vms/{name}/suspend.
func (r *vmResource) suspend(q *request) error {
	out, err := q.change(nil, func(c *change) (*effect, error) {
		st, err := r.loaded(c)
		if err != nil {
			return nil, err
		}
		if err := c.maySave(); err != nil {
			return nil, err
		}
		if st.vm.Spec.Power == api.PowerSuspended {
			return nil, api.Errorf(api.CodeRefused, "vm %s is suspended already", st.vm.Meta.Name)
		}
		if err := c.quiet(st); err != nil {
			return nil, err
		}
		if st.vm.Spec.Power == api.PowerStopped || st.vm.Status.Phase != api.VMRunning && st.vm.Status.Phase != api.VMPaused {
			return nil, api.Errorf(api.CodeRefused, "vm %s is %s; only a running or paused vm can be suspended", st.vm.Meta.Name, phaseText(&st.vm))
		}
		if err := errors.Join(needSavable(&st.vm), c.needQcow2(&st.vm)); err != nil {
			return nil, err
		}
		task, err := c.begin(st, api.ActionVMSuspend, nil)
		return &effect{status: http.StatusAccepted, kind: api.KindVM, id: st.vm.Meta.ID, task: task, object: &st.vm}, err
	})
	if err != nil {
		return err
	}
	return q.answerTask(out)
}

// loaded finds the VM of the request with its binding.
func (r *vmResource) loaded(c *change) (*vmState, error) {
	vm, err := r.find(c.q, c.v)
	if err != nil {
		return nil, err
	}
	return c.load(vm)
}
