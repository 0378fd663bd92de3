// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"fmt"
	"net/http"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// create answers POST /vms.
func (r *vmResource) create(q *request) error {
	o, body, err := r.decodeNew(q)
	if err != nil {
		return err
	}
	if o.Spec.Power == api.PowerPaused || o.Spec.Power == api.PowerSuspended {
		return api.Invalid("spec.power", "is %s; a new VM is stopped or running", o.Spec.Power)
	}
	o.Spec.ForceStop, o.Spec.Reboots = false, 0
	out, err := q.change(body, func(c *change) (*effect, error) {
		vm := o.Clone() // each attempt begins with what the client sent
		return r.make(c, &vm)
	})
	if err != nil {
		return err
	}
	return q.answerTask(out)
}

// newVolume is a disk that is made with its VM.
type newVolume struct {
	volume api.Volume
	image  *api.Image
	pool   api.Pool
}

// make adds the VM, its new volumes, its binding and its task.
func (r *vmResource) make(c *change, vm *api.VM) (*effect, error) {
	// The name first: of all that may be wrong it is what people look for.
	if _, taken := c.v.Get(r.table.NameKey(vm.Meta.Project, vm.Meta.Name)); taken {
		return nil, api.Errorf(api.CodeExists, "vm %q exists already", vm.Meta.Name)
	}
	if err := sealCloudInit(vm, &api.VM{}); err != nil {
		return nil, err
	}
	if err := c.checkRecovery(&api.VM{}, vm); err != nil {
		return nil, err
	}
	volumes, err := c.resolveDisks(vm)
	if err != nil {
		return nil, err
	}
	return r.build(c, vm, volumes, "", api.ActionVMCreate)
}

// build adds a VM whose disks are known, on the node only if that is named.
func (r *vmResource) build(c *change, vm *api.VM, volumes []newVolume, only string, action api.Action) (*effect, error) {
	if err := c.addNICs(vm, nil); err != nil {
		return nil, err
	}
	state, err := c.newMachine(vm, volumes)
	if err != nil {
		return nil, err
	}
	volumes = append(volumes, state...)
	vm.Spec.AssignSlots(nil)
	nodeID, node, err := c.placeNew(vm, volumes, only)
	if err != nil {
		return nil, err
	}
	if vm.Spec.Power == api.PowerRunning {
		if err := c.reserve(nodeID); err != nil {
			return nil, err
		}
	}
	// The node must not begin to leave the cluster meanwhile.
	at, _ := c.v.Get(configdb.Nodes.SpecKey(nodeID))
	c.tx.RequireRevision(configdb.Nodes.SpecKey(nodeID), at.Revision)
	for i := range volumes {
		if err := c.addVolume(vm, &volumes[i], node); err != nil {
			return nil, err
		}
	}
	st := vmState{vm: *vm}
	st.binding = api.Binding{
		Meta: api.NewMeta(api.KindBinding, vm.Meta.Project, vm.Meta.Name),
		Spec: api.BindingSpec{NodeID: nodeID, Node: node, Epoch: c.firstEpoch(), Protected: vm.Spec.HA == api.HARestart},
	}
	st.binding.Meta.ID = vm.Meta.ID
	st.vm.Status = api.VMStatus{Phase: api.VMCreating, Node: node, Epoch: c.firstEpoch()}
	if err := configdb.Bindings.CreateUnnamed(c.tx, &st.binding); err != nil {
		return nil, err
	}
	if err := r.resource.create(c, &st.vm); err != nil {
		return nil, err
	}
	task, err := c.vmTask(&st, action)
	e := &effect{status: http.StatusAccepted, kind: api.KindVM, id: vm.Meta.ID, task: task, object: &st.vm}
	if len(vm.Spec.ExtraArgs) > 0 {
		e.changed = "spec.extraArgs: " + argNames(vm.Spec.ExtraArgs)
	}
	if err == nil && vm.Spec.Power == api.PowerRunning {
		err = c.admit(e)
	}
	return e, err
}

// resolveDisks claims the existing volumes, prepares the new ones and leaves
// in the VM the names of volumes only.
func (c *change) resolveDisks(vm *api.VM) ([]newVolume, error) {
	var out []newVolume
	for i := range vm.Spec.Disks {
		d, field := &vm.Spec.Disks[i], fmt.Sprintf("spec.disks[%d]", i)
		if d.Volume != "" {
			if err := onlyVolume(d, field); err != nil {
				return nil, err
			}
			if err := c.attach(vm, d.Volume, field+".volume"); err != nil {
				return nil, err
			}
			continue
		}
		name := fmt.Sprintf("%s-disk%d", vm.Meta.Name, i)
		n, err := c.newDisk(vm, d, name, field)
		if err != nil {
			return nil, err
		}
		out = append(out, n)
	}
	return out, nil
}

// onlyVolume refuses a disk that names a volume and says how to make one.
func onlyVolume(d *api.VMDisk, field string) error {
	if d.Image != "" || d.Size != 0 || d.Pool != "" {
		return api.Invalid(field, "names the volume %q and what to make a new one of; give one of them", d.Volume)
	}
	return nil
}

// newDisk prepares the volume of a disk that is made for its VM, and leaves its
// name in the disk.
func (c *change) newDisk(vm *api.VM, d *api.VMDisk, name, field string) (n newVolume, err error) {
	if len(name) > api.MaxNameLength {
		return n, api.Invalid("meta.name", "is too long: the name of its volume %q would have more than %d characters", name, api.MaxNameLength)
	}
	n = newVolume{volume: api.Volume{
		Meta: api.NewMeta(api.KindVolume, vm.Meta.Project, name),
		Spec: api.VolumeSpec{Pool: d.Pool, Image: d.Image, Size: d.Size},
	}}
	n.volume.Meta.Owner = string(api.KindVM) + "/" + vm.Meta.ID
	if n.image, n.pool, err = c.source(&n.volume, field); err != nil {
		return n, err
	}
	if _, taken := c.v.Get(configdb.Volumes.NameKey(vm.Meta.Project, name)); taken {
		return n, api.Errorf(api.CodeExists, "volume %q, which %s would be, exists already; attach it with volume, or remove it", name, field)
	}
	d.Volume, d.Image, d.Size, d.Pool = name, "", 0, ""
	return n, nil
}

// attach claims an existing volume for the VM alone.
func (c *change) attach(vm *api.VM, name, field string) error {
	vol, err := configdb.Volumes.Find(c.v, vm.Meta.Project, name)
	if err != nil {
		return atField(err, field)
	}
	if vol.Spec.Content != "" {
		return &api.Error{Code: api.CodeRefused, Field: field, Detail: fmt.Sprintf("volume %s is no disk: it keeps the state (%s) of a VM's machine", vol.Meta.Name, vol.Spec.Content)}
	}
	if by := configdb.Volumes.Referrers(c.v, vol.Meta.ID); len(by) > 0 {
		return api.Errorf(api.CodeRefused, "volume %s is attached to %s", name, c.names(by))
	}
	if err := usable(api.KindVolume, &vol.Meta, vol.Status.Phase); err != nil {
		return err
	}
	c.tx.RequireEmpty(configdb.Volumes.RefPrefix(vol.Meta.ID))
	c.tx.RequireRevision(configdb.Volumes.SpecKey(vol.Meta.ID), vol.Meta.Revision)
	configdb.Volumes.Refer(c.tx, vol.Meta.ID, api.KindVM, vm.Meta.ID)
	return nil
}

// source finds the image and the pool of a new volume and fills in the pool:
// that of the image, else the local one.
func (c *change) source(vol *api.Volume, field string) (*api.Image, api.Pool, error) {
	var image *api.Image
	if vol.Spec.Image != "" {
		img, err := configdb.Images.Find(c.v, vol.Meta.Project, vol.Spec.Image)
		if err != nil {
			return nil, api.Pool{}, atField(err, field+".image")
		}
		if err := usable(api.KindImage, &img.Meta, img.Status.Phase); err != nil {
			return nil, api.Pool{}, err
		}
		vol.Spec.Image = img.Meta.Name // it may have been an ID
		switch {
		case vol.Spec.Pool == "":
			vol.Spec.Pool = img.Spec.Pool
		case vol.Spec.Pool != img.Spec.Pool:
			if pool, err := configdb.Pools.Find(c.v, api.DefaultProject, vol.Spec.Pool); err != nil {
				return nil, pool, atField(err, field+".pool")
			}
			return nil, api.Pool{}, &api.Error{Code: api.CodeRefused, Field: field + ".pool", Detail: fmt.Sprintf(
				"image %s is in pool %s and a volume cloned from it has to be there too, not in pool %s; leave the pool out", img.Meta.Name, img.Spec.Pool, vol.Spec.Pool)}
		}
		if vs := img.Status.VirtualSize; vol.Spec.Size != 0 && vol.Spec.Size < vs {
			return nil, api.Pool{}, api.Invalid(field+".size", "is %s, less than the %s of image %s", vol.Spec.Size, vs, img.Meta.Name)
		}
		image = &img
	}
	if vol.Spec.Pool == "" {
		vol.Spec.Pool = api.LocalPool
	}
	pool, err := configdb.Pools.Find(c.v, api.DefaultProject, vol.Spec.Pool)
	if err != nil {
		return nil, pool, atField(err, field+".pool")
	}
	return image, pool, usable(api.KindPool, &pool.Meta, "")
}

// placeNew asks for a node, showing the placer the existing volumes and the
// new disks apart.
func (c *change) placeNew(vm *api.VM, volumes []newVolume, only string) (nodeID, node string, err error) {
	shown, disks := shownTo(vm, volumes)
	return c.q.s.cfg.Placer.Choose(c.v, shown, disks, only)
}

// shownTo shows the placer the existing volumes of a VM and its new disks apart.
func shownTo(vm *api.VM, volumes []newVolume) (api.VM, []api.VMDisk) {
	shown := vm.Clone()
	shown.Spec.Disks = nil
	isNew := map[string]bool{}
	var disks []api.VMDisk
	for i := range volumes {
		v := &volumes[i].volume
		isNew[v.Meta.Name] = true
		disks = append(disks, api.VMDisk{Pool: v.Spec.Pool, Image: v.Spec.Image, Size: v.Spec.Size})
	}
	for _, d := range vm.Spec.Disks {
		if !isNew[d.Volume] {
			shown.Spec.Disks = append(shown.Spec.Disks, d)
		}
	}
	return shown, disks
}

// addVolume adds a volume made with a VM, on the VM's node.
func (c *change) addVolume(vm *api.VM, n *newVolume, node string) error {
	n.volume.Spec.Node = node
	n.volume.Status.Phase = api.StoragePending
	if err := n.volume.Prepare(); err != nil {
		return err
	}
	c.referSource(n)
	// Not Refer: it requires that the volume exists already. Creating it in
	// the same transaction promises as much.
	c.tx.Put(configdb.Volumes.RefPrefix(n.volume.Meta.ID)+string(api.KindVM)+"/"+vm.Meta.ID, nil)
	return configdb.Volumes.Create(c.tx, &n.volume)
}

// referSource claims the image and the pool, at the revisions that were looked
// at: neither may have begun to be deleted meanwhile.
func (c *change) referSource(n *newVolume) {
	id := n.volume.Meta.ID
	if n.image != nil {
		c.tx.RequireRevision(configdb.Images.SpecKey(n.image.Meta.ID), n.image.Meta.Revision)
		configdb.Images.Refer(c.tx, n.image.Meta.ID, api.KindVolume, id)
	}
	c.tx.RequireRevision(configdb.Pools.SpecKey(n.pool.Meta.ID), n.pool.Meta.Revision)
	configdb.Pools.Refer(c.tx, n.pool.Meta.ID, api.KindVolume, id)
}

// usable refuses what is being deleted or failed.
func usable(kind api.Kind, m *api.Meta, phase api.StoragePhase) error {
	switch {
	case m.Deleting():
		return api.Errorf(api.CodeRefused, "%s %s is being deleted", kind, m.Name)
	case phase == api.StorageFailed:
		return api.Errorf(api.CodeRefused, "%s %s has failed; look at its status, then delete it", kind, m.Name)
	}
	return nil
}

// atField says which field of the request named what does not exist.
func atField(err error, field string) error {
	if api.CodeOf(err) != api.CodeNotFound {
		return err
	}
	return &api.Error{Code: api.CodeNotFound, Field: field, Detail: err.Error()}
}
