// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"fmt"
	"maps"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// CloneRequest is the body of POST /vms/{name}/clone.
type CloneRequest struct {
	Name     string `json:"name" doc:"name of the new VM" maxLength:"63"`
	Snapshot string `json:"snapshot,omitempty" doc:"name of a snapshot to copy; without one, a temporary one is taken of the VM as it is"`
	Full     bool   `json:"full,omitempty" doc:"make the copies independent of the images that the disks are clones of"`
	Start    bool   `json:"start,omitempty" doc:"start the new VM when its disks are copied"`
}

// clone answers POST /vms/{name}/clone.
func (r *vmResource) clone(q *request) error {
	in, body, err := optionalBody[CloneRequest](q)
	if err != nil {
		return err
	}
	if err := api.ValidName("name", in.Name); err != nil {
		return err
	}
	out, err := q.change(body, func(c *change) (*effect, error) { return r.copyOf(c, in) })
	if err != nil {
		return err
	}
	return q.answerTask(out)
}

// copyOf adds a new VM whose disks are copied from a snapshot of another. What
// makes a VM itself is new: ID (and with it the machine ID and the firmware's
// UUID), MAC addresses, reserved addresses, volumes.
func (r *vmResource) copyOf(c *change, in CloneRequest) (*effect, error) {
	st, err := r.loaded(c)
	if err != nil {
		return nil, err
	}
	source := &st.vm
	if err := c.maySave(); err != nil {
		return nil, err
	}
	if _, taken := c.v.Get(r.table.NameKey(source.Meta.Project, in.Name)); taken {
		return nil, api.Errorf(api.CodeExists, "vm %q exists already", in.Name)
	}
	snap, hardware, err := r.cloneSource(c, st, in)
	if err != nil {
		return nil, err
	}
	vm := api.VM{Meta: api.NewMeta(api.KindVM, source.Meta.Project, in.Name)}
	vm.Meta.Labels = maps.Clone(source.Meta.Labels)
	vm.Spec = wishesOf(source, in.Name).WithHardware(hardware)
	if vm.Spec.MemoryMin > vm.Spec.Memory {
		vm.Spec.MemoryMin = 0 // of a time when it had more
	}
	if in.Start {
		vm.Spec.Power = api.PowerRunning
	}
	for i := range vm.Spec.NICs {
		vm.Spec.NICs[i].MAC, vm.Spec.NICs[i].Address = "", ""
	}
	vm.Spec.ForgetState()
	volumes, only, err := c.copiedDisks(&vm, snap.Meta.ID, in.Full)
	if err != nil {
		return nil, err
	}
	if err := vm.Prepare(); err != nil {
		return nil, err
	}
	return r.build(c, &vm, volumes, only, api.ActionVMClone)
}

// wishesOf are those of a VM's that its copy has, too. Its guest is told its own
// name: with it comes a new instance for cloud-init, which makes new host keys.
func wishesOf(source *api.VM, name string) *api.VMSpec {
	was := source.Clone()
	s := &api.VMSpec{HA: was.Spec.HA, Power: api.PowerStopped, MemoryMin: was.Spec.MemoryMin, Limits: was.Spec.Limits, CloudInit: was.Spec.CloudInit, Recovery: was.Spec.Recovery}
	if s.CloudInit != nil {
		_, domain, qualified := strings.Cut(s.CloudInit.Hostname, ".")
		s.CloudInit.Hostname = ""
		if qualified {
			s.CloudInit.Hostname = name + "." + domain
		}
	}
	return s
}

// cloneSource finds the snapshot to copy, or begins a temporary one.
func (r *vmResource) cloneSource(c *change, st *vmState, in CloneRequest) (api.Snapshot, *api.VMSpec, error) {
	vm := &st.vm
	if in.Snapshot != "" {
		snap, err := configdb.FindSnapshot(c.v, &vm.Meta, in.Snapshot)
		if err != nil {
			return snap, nil, err
		}
		if snap.Status.Phase != api.SnapshotReady || snap.Status.Hardware == nil {
			return snap, nil, api.Errorf(api.CodeRefused, "snapshot %s of vm %s is %s; only a ready one can be copied", snap.Meta.Name, vm.Meta.Name, snap.Status.Phase)
		}
		// It must not begin to be deleted meanwhile.
		c.tx.RequireRevision(configdb.Snapshots.StatusKey(snap.Meta.ID), snap.Meta.StatusRevision)
		return snap, snap.Status.Hardware, c.idle(vm)
	}
	if len(vm.Spec.Disks) == 0 {
		return api.Snapshot{}, nil, api.Errorf(api.CodeRefused, "vm %s has no disks to copy; create another vm instead", vm.Meta.Name)
	}
	hardware := vm.Spec.Hardware()
	if vm.Status.Hardware != nil && vm.Status.PID != 0 {
		hardware = vm.Status.Hardware // what the snapshot will be of
	}
	snap, err := c.temporary(st, "to copy the disks of "+vm.Meta.Name+" for "+in.Name)
	return snap, hardware, err
}

// temporary begins a snapshot that is removed when nothing is copied from it any
// more.
func (c *change) temporary(st *vmState, why string) (api.Snapshot, error) {
	e, err := newSnapshots(nil).make(c, st, SnapshotRequest{Name: "clone-" + api.NewID(), Description: why}, true)
	if err != nil {
		return api.Snapshot{}, err
	}
	return *e.object.(*api.Snapshot), nil
}

// copiedDisks gives the new VM a volume for each disk of the source, in the pool
// of that one; only is the node of those in a dir pool.
func (c *change) copiedDisks(vm *api.VM, snapshotID string, full bool) (out []newVolume, only string, err error) {
	vm.Spec.AssignSlots(nil)
	for i := range vm.Spec.Disks {
		d, field := &vm.Spec.Disks[i], fmt.Sprintf("disk %d", i)
		src, err := configdb.Volumes.Find(c.v, vm.Meta.Project, d.Volume)
		if err != nil {
			return nil, "", err
		}
		if err := usable(api.KindVolume, &src.Meta, src.Status.Phase); err != nil {
			return nil, "", err
		}
		name := fmt.Sprintf("%s-disk%d", vm.Meta.Name, i)
		if len(name) > api.MaxNameLength {
			return nil, "", api.Invalid("name", "is too long: the name of its volume %q would have more than %d characters", name, api.MaxNameLength)
		}
		if _, taken := c.v.Get(configdb.Volumes.NameKey(vm.Meta.Project, name)); taken {
			return nil, "", api.Errorf(api.CodeExists, "volume %q, which the copy of %s would be, exists already; choose another name for the VM, or remove it", name, d.Volume)
		}
		n := newVolume{volume: api.Volume{
			Meta: api.NewMeta(api.KindVolume, vm.Meta.Project, name),
			Spec: api.VolumeSpec{Pool: src.Spec.Pool, Image: src.Spec.Image, Size: max(src.Status.Size, src.Spec.Size), SourceVolume: src.Meta.Name, SourceSnapshot: snapshotID},
		}}
		if full {
			n.volume.Spec.Image = ""
		}
		n.volume.Meta.Owner = string(api.KindVM) + "/" + vm.Meta.ID
		if n.image, n.pool, err = c.source(&n.volume, field); err != nil {
			return nil, "", err
		}
		if n.pool.Spec.Type == api.PoolDir {
			if only != "" && only != src.Spec.Node {
				return nil, "", api.Errorf(api.CodeRefused, "the disks are on the nodes %s and %s; a VM's disks in dir pools have to be on one node", only, src.Spec.Node)
			}
			only = src.Spec.Node
		}
		d.Volume = name
		out = append(out, n)
	}
	return out, only, nil
}
