// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"fmt"
	"slices"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// rework writes into st what a wish says about the VM's hardware, reserves what
// that needs, and reports whether it is a change. A VM that runs is changed by
// its node, at once or at its next start; here it is only made sure that the
// node can.
func (c *change) rework(old *api.VM, st *vmState, want *api.VMSpec) (bool, error) {
	vm := &st.vm
	if err := want.TakenSlot(&old.Spec); err != nil {
		return false, err
	}
	if !sameNICs(old.Spec.NICs, want.NICs) {
		if err := c.replaceNICs(old, vm, want.NICs); err != nil {
			return false, err
		}
	}
	made, err := c.replaceDisks(old, st, want.Disks)
	if err != nil {
		return false, err
	}
	vm.Spec.CPUs, vm.Spec.Memory, vm.Spec.HA, vm.Spec.Display = want.CPUs, want.Memory, want.HA, want.Display
	vm.Spec.Recovery = want.Recovery
	vm.Spec.MaxCPUs, vm.Spec.MaxMemory, vm.Spec.MemoryMin = want.MaxCPUs, want.MaxMemory, want.MemoryMin
	vm.Spec.AssignSlotsBeside(&old.Spec, old.Status.Hardware)
	adopt(&vm.Spec, want) // one part may be right with the other only
	if err := vm.Spec.Validate(); err != nil {
		return false, err
	}
	changed := !vm.Spec.SameHardware(&old.Spec) || vm.Spec.MemoryMin != old.Spec.MemoryMin
	if !changed || atRest(old) {
		return changed, nil
	}
	return true, c.fitLive(old, st, made)
}

// fitLive refuses what the node of a running VM cannot give it.
func (c *change) fitLive(old *api.VM, st *vmState, made []newVolume) error {
	vm, at := &st.vm, st.binding.Spec
	larger := old.Status.HeldMemory(&vm.Spec) > old.Status.HeldMemory(&old.Spec)
	shown, disks := shownTo(vm, made)
	media := asItRuns(old, &shown.Spec)
	more := larger || media || len(vm.Spec.NICs) > 0 && !slices.Equal(vm.Spec.NICs, old.Spec.NICs) || added(old.Spec.Disks, vm.Spec.Disks)
	if !more {
		return nil
	}
	if _, _, err := c.q.s.cfg.Placer.Choose(c.v, shown, disks, at.Node); err != nil {
		return err
	}
	if larger {
		return c.reserve(at.NodeID)
	}
	return nil
}

// asItRuns gives a wish the machine that a VM runs with, because what is added
// while it runs is added to that; only what is in its drives is changed, and media
// is whether it is.
func asItRuns(old *api.VM, spec *api.VMSpec) (media bool) {
	hw := machineOfStart(old)
	if hw == nil {
		return false
	}
	wished := spec.CDROMs
	adopt(spec, hw.Hardware())
	if len(wished) < len(spec.CDROMs) {
		return false
	}
	for i := range spec.CDROMs {
		if d := &spec.CDROMs[i]; d.Bus == wished[i].Bus && d.Image != wished[i].Image {
			d.Image = wished[i].Image
			media = media || d.Image != ""
		}
	}
	return media
}

func added(old, now []api.VMDisk) bool {
	return slices.ContainsFunc(now, func(d api.VMDisk) bool { return !hasVolume(old, d.Volume) })
}

func hasVolume(disks []api.VMDisk, name string) bool {
	return slices.ContainsFunc(disks, func(d api.VMDisk) bool { return d.Volume == name })
}

// replaceDisks attaches what a wish adds, makes what is new, and gives back what
// is left out: at once if the VM is at rest, else when its QEMU has let go.
func (c *change) replaceDisks(old *api.VM, st *vmState, want []api.VMDisk) ([]newVolume, error) {
	vm := &st.vm
	vm.Spec.Disks = slices.Clone(want)
	var made []newVolume
	for i := range vm.Spec.Disks {
		d, field := &vm.Spec.Disks[i], fmt.Sprintf("spec.disks[%d]", i)
		if d.Volume != "" {
			if err := onlyVolume(d, field); err != nil {
				return nil, err
			}
		}
		switch {
		case d.Volume != "" && hasVolume(old.Spec.Disks, d.Volume):
		case d.Volume != "":
			if err := c.attachAgain(vm, d, field+".volume"); err != nil {
				return nil, err
			}
		default:
			n, err := c.newDisk(vm, d, c.diskName(vm, made), field)
			if err != nil {
				return nil, err
			}
			if err := c.addVolume(vm, &n, st.binding.Spec.Node); err != nil {
				return nil, err
			}
			made = append(made, n)
		}
	}
	for _, d := range old.Spec.Disks {
		if hasVolume(vm.Spec.Disks, d.Volume) {
			continue
		}
		vol, err := configdb.Volumes.Find(c.v, vm.Meta.Project, d.Volume)
		switch {
		case err != nil && api.CodeOf(err) == api.CodeNotFound:
		case err != nil:
			return nil, err
		case saidAtRest(old):
			// The word "stopped" is about this very wish: one that is older may have been
			// followed by a start that the node has not told yet. And the node must not say
			// meanwhile that it has started the VM.
			c.tx.RequireRevision(configdb.VMs.StatusKey(vm.Meta.ID), vm.Meta.StatusRevision)
			if err := configdb.ReleaseVolume(c.v, c.tx, vm.Meta.ID, &vol); err != nil {
				return nil, err
			}
		default:
			configdb.Detach(c.v, c.tx, vm.Meta.ID, vol.Meta.ID)
		}
	}
	return made, nil
}

// attachAgain attaches a volume, also one that this VM is about to let go of.
func (c *change) attachAgain(vm *api.VM, d *api.VMDisk, field string) error {
	vol, err := configdb.Volumes.Find(c.v, vm.Meta.Project, d.Volume)
	if err != nil {
		return atField(err, field)
	}
	d.Volume = vol.Meta.Name // it may have been an ID; twice is found at the end
	if configdb.KeepAttached(c.v, c.tx, vm.Meta.ID, vol.Meta.ID) {
		return nil
	}
	return c.attach(vm, d.Volume, field)
}

// diskName is the first free name for a new disk of a VM.
func (c *change) diskName(vm *api.VM, made []newVolume) string {
	for i := 0; ; i++ {
		name := fmt.Sprintf("%s-disk%d", vm.Meta.Name, i)
		_, taken := c.v.Get(configdb.Volumes.NameKey(vm.Meta.Project, name))
		if !taken && !slices.ContainsFunc(made, func(n newVolume) bool { return n.volume.Meta.Name == name }) {
			return name
		}
	}
}

// screenOf is the screen that a VM has: that of the hardware that runs, which a
// change of the spec reaches at the next start.
func screenOf(vm *api.VM) api.Display {
	if vm.Status.Hardware != nil {
		return vm.Status.Hardware.Display
	}
	return vm.Spec.Display
}
