// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// cidTries bounds the search for a free vsock address among four thousand
// million.
const cidTries = 16

// newMachine completes the machine of a new VM: what is chosen when left out,
// what it claims, and the volumes that keep its state, which it returns.
func (c *change) newMachine(vm *api.VM, disks []newVolume) ([]newVolume, error) {
	s := &vm.Spec
	if err := errors.Join(c.extraArgs(nil, s.ExtraArgs), c.hostDevices(nil, s.HostDevices)); err != nil {
		return nil, err
	}
	if s.Firmware != nil {
		s.Firmware.Volume = ""
	}
	if s.TPM != nil {
		s.TPM.Volume = ""
	}
	if err := c.claimImages(vm, nil); err != nil {
		return nil, err
	}
	if err := c.claimVsock(vm); err != nil {
		return nil, err
	}
	return c.stateVolumes(vm, c.statePool(vm, disks))
}

// extraArgs refuses a change of QEMU's arguments by anybody but an
// administrator: they reach everything that QEMU does on the host.
func (c *change) extraArgs(old, want []string) error {
	if slices.Equal(old, want) || c.q.who.may(needAdministrator) {
		return nil
	}
	return &api.Error{Code: api.CodeForbidden, Field: "spec.extraArgs", Detail: fmt.Sprintf("is for administrators; %q has the role %s", c.q.who.actor, c.q.who.role)}
}

// hostDevices refuses a change of the host's devices that a VM has by anybody but an
// administrator: among those of USB are the disks and the keys of the host itself.
func (c *change) hostDevices(old, want []api.VMHostDevice) error {
	if slices.Equal(old, want) || c.q.who.may(needAdministrator) {
		return nil
	}
	return &api.Error{Code: api.CodeForbidden, Field: "spec.hostDevices", Detail: fmt.Sprintf("is for administrators; %q has the role %s", c.q.who.actor, c.q.who.role)}
}

// argNames are the options among extra arguments, for the audit trail. Their
// values may be secrets.
func argNames(args []string) string {
	var out []string
	for _, a := range args {
		if strings.HasPrefix(a, "-") {
			name, _, _ := strings.Cut(a, "=")
			out = append(out, name)
		}
	}
	return strings.Join(out, " ")
}

// statePool is the pool for the state of the machine: that of the first disk.
func (c *change) statePool(vm *api.VM, disks []newVolume) string {
	if len(vm.Spec.Disks) == 0 {
		return api.LocalPool
	}
	first := vm.Spec.Disks[0].Volume
	for i := range disks {
		if disks[i].volume.Meta.Name == first {
			return disks[i].volume.Spec.Pool
		}
	}
	if vol, err := configdb.Volumes.Find(c.v, vm.Meta.Project, first); err == nil {
		return vol.Spec.Pool
	}
	return api.LocalPool
}

// stateVolumes names and prepares the volumes that the machine needs and has
// not.
func (c *change) stateVolumes(vm *api.VM, pool string) ([]newVolume, error) {
	var out []newVolume
	add := func(field, suffix string, content api.VolumeContent) (string, error) {
		name := vm.Meta.Name + suffix
		if len(name) > api.MaxNameLength {
			return "", api.Invalid("meta.name", "is too long: the name of its volume %q would have more than %d characters", name, api.MaxNameLength)
		}
		if _, taken := c.v.Get(configdb.Volumes.NameKey(vm.Meta.Project, name)); taken {
			return "", api.Errorf(api.CodeExists, "volume %q, which %s would be, exists already; remove it first, or wait until it is gone", name, field)
		}
		n := newVolume{volume: api.Volume{
			Meta: api.NewMeta(api.KindVolume, vm.Meta.Project, name),
			Spec: api.VolumeSpec{Pool: pool, Content: content},
		}}
		n.volume.Meta.Owner = string(api.KindVM) + "/" + vm.Meta.ID
		var err error
		if n.image, n.pool, err = c.source(&n.volume, field); err != nil {
			return "", err
		}
		if n.pool.Spec.Type == api.PoolRBD && content == api.ContentTPM {
			return "", api.Invalid(field, "needs a file for its state, and pool %s is of type rbd; give the VM a first disk in a pool of type dir or shared, or no TPM", n.pool.Meta.Name)
		}
		out = append(out, n)
		return name, nil
	}
	var err error
	if f := vm.Spec.Firmware; vm.Spec.UEFI() && f.Volume == "" {
		content := api.ContentUEFI
		if f.SecureBoot {
			content = api.ContentUEFISecure
		}
		if f.Volume, err = add("spec.firmware", "-uefi", content); err != nil {
			return nil, err
		}
	}
	if t := vm.Spec.TPM; t != nil && t.Volume == "" {
		if t.Volume, err = add("spec.tpm", "-tpm", api.ContentTPM); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// claimImages claims the images that the VM's machine reads and gives back those
// that old read and the VM does not: at once if the VM is at rest, else when its
// QEMU has let go.
func (c *change) claimImages(vm *api.VM, old *api.VM) error {
	kept := map[string]bool{}
	images := vm.Spec.MachineImages()
	for _, field := range slices.Sorted(maps.Keys(images)) {
		name := images[field]
		img, err := configdb.Images.Find(c.v, vm.Meta.Project, *name)
		if err != nil {
			return atField(err, field)
		}
		if err := usable(api.KindImage, &img.Meta, img.Status.Phase); err != nil {
			return err
		}
		*name = img.Meta.Name // it may have been an ID
		if !kept[*name] {
			c.tx.RequireRevision(configdb.Images.SpecKey(img.Meta.ID), img.Meta.Revision)
			configdb.Images.Refer(c.tx, img.Meta.ID, api.KindVM, vm.Meta.ID)
			configdb.KeepImage(c.v, c.tx, vm.Meta.ID, img.Meta.ID)
		}
		kept[*name] = true
	}
	if old == nil {
		return nil
	}
	given := map[string]bool{}
	for _, name := range old.Spec.MachineImages() {
		switch {
		case kept[*name], given[*name]:
		case saidAtRest(old):
			configdb.ReleaseImage(c.v, c.tx, vm, *name)
		default:
			configdb.ReleaseImageLater(c.v, c.tx, vm, *name)
		}
		given[*name] = true
	}
	return nil
}

// claimVsock takes the VM's address, or a free one.
func (c *change) claimVsock(vm *api.VM) error {
	v := vm.Spec.Vsock
	if v == nil {
		return nil
	}
	if v.CID != 0 {
		if by, ok := c.claim(configdb.VsockKey(v.CID), vm); !ok {
			return &api.Error{Code: api.CodeRefused, Field: "spec.vsock.cid", Detail: fmt.Sprintf("%d belongs to %s", v.CID, by)}
		}
		configdb.KeepVsock(c.v, c.tx, vm.Meta.ID, v.CID)
		return nil
	}
	for range cidTries {
		cid := api.MinVsockCID + rand.Uint32N(api.MaxVsockCID-api.MinVsockCID)
		if _, taken := c.v.Get(configdb.VsockKey(cid)); taken {
			continue
		}
		v.CID = cid
		c.claim(configdb.VsockKey(cid), vm)
		return nil
	}
	return api.Errorf(api.CodeRefused, "%d random vsock addresses were all taken; give one in spec.vsock.cid", cidTries)
}

// machineOf are the fields that make the machine, by name.
func machineOf(s *api.VMSpec) map[string]any {
	return map[string]any{
		"machine": s.MachineType(), "cpu": s.CPU, "firmware": s.Firmware, "kernel": s.Kernel, "tpm": s.TPM, "numa": s.NUMA, "hugepages": s.Hugepages.Size(),
		"watchdog": s.Watchdog, "vsock": s.Vsock, "cdroms": s.CDROMs,
		"bootOrder": s.BootOrder, "hostDevices": s.HostDevices, "extraArgs": s.ExtraArgs,
	}
}

// machineChanges names what differs between the machines of two specs.
func machineChanges(old, want *api.VMSpec) []string {
	a, b := machineOf(old), machineOf(want)
	var out []string
	for name, was := range a {
		if is := b[name]; !reflect.DeepEqual(was, is) && !(isEmpty(was) && isEmpty(is)) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

func isEmpty(v any) bool {
	r := reflect.ValueOf(v)
	return r.Kind() == reflect.Slice && r.Len() == 0
}

// completeMachine gives a wish what it leaves out of what the cluster chose.
func completeMachine(old, want *api.VMSpec) error {
	if want.Vsock != nil && want.Vsock.CID == 0 && old.Vsock != nil {
		want.Vsock.CID = old.Vsock.CID
	}
	return keepState(old, want)
}

// changeMachine takes the machine of a wish, which is complete, over into the VM.
// One that runs keeps the machine of its start until it is stopped; but for what
// is in its CD-ROM drives.
func (c *change) changeMachine(st *vmState, old, want *api.VM) error {
	w := &want.Spec
	if err := errors.Join(c.extraArgs(old.Spec.ExtraArgs, w.ExtraArgs), c.hostDevices(old.Spec.HostDevices, w.HostDevices)); err != nil {
		return err
	}
	changed := machineChanges(&old.Spec, w)
	if len(changed) > 0 || w.Memory != old.Spec.Memory {
		if err := c.q.s.cfg.Placer.Check(c.v, *want); err != nil {
			return err
		}
	}
	if len(changed) == 0 {
		return nil
	}
	if err := keepsState(old, w); err != nil {
		return err
	}
	vm := &st.vm
	adopt(&vm.Spec, w)
	if err := c.claimImages(vm, old); err != nil {
		return err
	}
	if v := old.Spec.Vsock; v != nil && (w.Vsock == nil || w.Vsock.CID != v.CID) {
		if saidAtRest(old) {
			configdb.ReleaseVsock(c.v, c.tx, old)
		} else {
			configdb.ReleaseVsockLater(c.v, c.tx, old)
		}
	}
	if err := c.claimVsock(vm); err != nil {
		return err
	}
	return c.changeState(st, old)
}

// saidAtRest reports that a VM is at rest by its node's word about this very wish.
func saidAtRest(vm *api.VM) bool {
	return atRest(vm) && vm.Status.ObservedGeneration == vm.Meta.Generation
}

// machineOfStart is the machine that a VM runs with or is about to; nil if it is at
// rest.
func machineOfStart(vm *api.VM) *api.VMSpec {
	switch {
	case atRest(vm):
		return nil
	case vm.Status.Hardware != nil:
		return vm.Status.Hardware
	}
	return &vm.Spec
}

// keepsState refuses to delete what the machine of a running VM has open: its UEFI
// variables or its TPM's state.
func keepsState(old *api.VM, want *api.VMSpec) error {
	hw := machineOfStart(old)
	if hw == nil {
		return nil
	}
	have := want.StateVolumes()
	for _, name := range hw.StateVolumes() {
		if slices.Contains(have, name) {
			continue
		}
		field, what := "spec.firmware", "UEFI variables are"
		if hw.TPM != nil && hw.TPM.Volume == name {
			field, what = "spec.tpm", "TPM's state is"
		}
		return &api.Error{Code: api.CodeRefused, Field: field, Detail: fmt.Sprintf(
			"vm %s is %s, and its %s in volume %s, which this change deletes; stop the VM first (muster vm stop %s)", old.Meta.Name, phaseText(old), what, name, old.Meta.Name)}
	}
	return nil
}

// adopt copies the fields of machineOf.
func adopt(to, from *api.VMSpec) {
	to.Machine, to.CPU, to.Firmware, to.TPM, to.NUMA, to.Hugepages = from.Machine, from.CPU, from.Firmware, from.TPM, from.NUMA, from.Hugepages
	to.Kernel = from.Kernel
	to.Watchdog, to.Vsock, to.CDROMs, to.BootOrder = from.Watchdog, from.Vsock, from.CDROMs, from.BootOrder
	to.HostDevices, to.ExtraArgs = from.HostDevices, from.ExtraArgs
}

// keepState gives a wish the volumes that the VM has; they are not a user's to
// choose.
func keepState(old, want *api.VMSpec) error {
	if want.UEFI() {
		have := ""
		if old.UEFI() {
			have = old.Firmware.Volume
		}
		if named := want.Firmware.Volume; named != "" && have != "" && named != have {
			return api.Invalid("spec.firmware.volume", "cannot be changed; it is %s", have)
		}
		if have != "" && want.Firmware.SecureBoot != old.Firmware.SecureBoot {
			return api.Errorf(api.CodeRefused, "spec.firmware.secureBoot cannot be changed while the VM has the UEFI variables of volume %s, whose keys belong to it; set spec.firmware.type to bios first, which removes them", have)
		}
		want.Firmware.Volume = have
	}
	if want.TPM != nil {
		have := ""
		if old.TPM != nil {
			have = old.TPM.Volume
		}
		if named := want.TPM.Volume; named != "" && have != "" && named != have {
			return api.Invalid("spec.tpm.volume", "cannot be changed; it is %s", have)
		}
		want.TPM.Volume = have
	}
	return nil
}

// changeState makes the volumes of state that the machine now needs, on the
// VM's node, and removes those that it needs no more.
func (c *change) changeState(st *vmState, old *api.VM) error {
	vm := &st.vm
	volumes, err := c.stateVolumes(vm, c.statePool(vm, nil))
	if err != nil {
		return err
	}
	for i := range volumes {
		if err := c.addVolume(vm, &volumes[i], st.binding.Spec.Node); err != nil {
			return err
		}
	}
	have := vm.Spec.StateVolumes()
	for _, name := range old.Spec.StateVolumes() {
		if slices.Contains(have, name) {
			continue
		}
		// One that was to come at the next start: that must not have been meanwhile.
		c.tx.RequireRevision(configdb.VMs.StatusKey(vm.Meta.ID), vm.Meta.StatusRevision)
		vol, err := configdb.Volumes.Find(c.v, vm.Meta.Project, name)
		if err != nil {
			continue // gone already
		}
		configdb.Volumes.Release(c.tx, vol.Meta.ID, api.KindVM, vm.Meta.ID)
		now := c.q.s.cfg.Now().UTC()
		vol.Meta.DeletingAt = &now
		if err := configdb.Volumes.UpdateSpec(c.v, c.tx, &vol); err != nil {
			return err
		}
	}
	return nil
}
