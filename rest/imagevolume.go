// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// imageOrigin is the volume that an image is to be made of.
type imageOrigin struct {
	volume api.Volume
	pool   api.Pool
	vmID   string // that has the volume; "" for none
}

// origin finds the volume that an image is to be made of, and fills in the pool of
// the image: that of the volume.
func (c *change) origin(img *api.Image) (*imageOrigin, error) {
	if err := mayMove(c.v); err != nil {
		return nil, err
	}
	vol, err := configdb.Volumes.Find(c.v, img.Meta.Project, img.Spec.SourceVolume)
	if err != nil {
		return nil, atField(err, "spec.sourceVolume")
	}
	if err := usable(api.KindVolume, &vol.Meta, vol.Status.Phase); err != nil {
		return nil, err
	}
	o := &imageOrigin{volume: vol, vmID: vmOf(c.v, vol.Meta.ID)}
	switch name := vol.Meta.Name; {
	case vol.Spec.Content != "":
		return nil, api.Errorf(api.CodeRefused, "volume %s is no disk: it keeps the state (%s) of a VM's machine, and no image is made of it", name, vol.Spec.Content)
	case vol.Status.Phase != api.StorageReady:
		return nil, api.Errorf(api.CodeRefused, "volume %s is %s; wait until it is ready", name, vol.Status.Phase)
	case vol.Status.Size < vol.Spec.Size && o.vmID == "":
		return nil, api.Errorf(api.CodeRefused, "volume %s is being enlarged; wait until that is done", name)
	case vol.Status.Format != "" && vol.Status.Format != "qcow2":
		return nil, api.Errorf(api.CodeRefused, "volume %s has the format %s; images are made of qcow2 volumes only", name, vol.Status.Format)
	}
	if o.pool, err = configdb.Pools.Find(c.v, api.DefaultProject, vol.Spec.Pool); err != nil {
		return nil, err
	}
	img.Spec.SourceVolume = vol.Meta.Name // it may have been an ID
	if img.Spec.Pool == "" {
		img.Spec.Pool = vol.Spec.Pool
	}
	return o, nil
}

// vmOf is the ID of the VM that has a volume, "" if none has.
func vmOf(v *configdb.View, volumeID string) string {
	for _, by := range configdb.Volumes.Referrers(v, volumeID) {
		if id, ok := strings.CutPrefix(by, string(api.KindVM)+"/"); ok {
			return id
		}
	}
	return ""
}

// copyFrom chooses the node that copies the volume into the image's pool, and what
// is copied: a snapshot of its VM, or the volume itself if no VM has it.
func (c *change) copyFrom(o *imageOrigin, img *api.Image, to *api.Pool) error {
	var err error
	if img.Spec.Node, err = c.copyNode(o, to, img.Spec.Node); err != nil {
		return err
	}
	if o.vmID != "" {
		img.Spec.SourceSnapshot, err = c.originSnapshot(o, img)
		return err
	}
	if img.Spec.SourceSnapshot != "" {
		return &api.Error{Code: api.CodeRefused, Field: "spec.sourceSnapshot", Detail: "volume " + o.volume.Meta.Name + " is attached to no vm; leave the snapshot out"}
	}
	c.tx.RequireRevision(configdb.Volumes.SpecKey(o.volume.Meta.ID), o.volume.Meta.Revision)
	c.tx.RequireRevision(configdb.Operations.SpecKey(o.volume.Meta.ID), 0)
	if op, err := configdb.Operations.Get(c.v, o.volume.Meta.ID); err == nil {
		return api.Errorf(api.CodeRefused, "volume %s is being %s; wait for task %s", o.volume.Meta.Name, op.Spec.Doing(), op.Spec.TaskID)
	}
	// Until the image has the content: no VM attaches a volume that is referred to.
	configdb.Volumes.Refer(c.tx, o.volume.Meta.ID, api.KindImage, img.Meta.ID)
	return nil
}

// originSnapshot is the ID of the snapshot that was asked for, or of a new one.
func (c *change) originSnapshot(o *imageOrigin, img *api.Image) (string, error) {
	vm, err := configdb.VMs.Get(c.v, o.vmID)
	if err != nil {
		return "", err
	}
	if img.Spec.SourceSnapshot == "" {
		st, err := c.load(vm)
		if err != nil {
			return "", err
		}
		snap, err := c.temporary(st, "to make image "+img.Meta.Name+" of volume "+o.volume.Meta.Name)
		return snap.Meta.ID, err
	}
	snap, err := configdb.FindSnapshot(c.v, &vm.Meta, img.Spec.SourceSnapshot)
	if err != nil {
		return "", atField(err, "spec.sourceSnapshot")
	}
	has := slices.ContainsFunc(snap.Status.Disks, func(d api.SnapshotDisk) bool { return d.VolumeID == o.volume.Meta.ID })
	switch {
	case snap.Status.Phase != api.SnapshotReady:
		return "", api.Errorf(api.CodeRefused, "snapshot %s of vm %s is %s; only a ready one can be copied", snap.Meta.Name, vm.Meta.Name, snap.Status.Phase)
	case !has:
		return "", api.Errorf(api.CodeRefused, "snapshot %s of vm %s does not have volume %s", snap.Meta.Name, vm.Meta.Name, o.volume.Meta.Name)
	}
	// It must not begin to be deleted meanwhile.
	c.tx.RequireRevision(configdb.Snapshots.StatusKey(snap.Meta.ID), snap.Meta.StatusRevision)
	return snap.Meta.ID, c.idle(&vm)
}

// copyNode is a node that has both the volume and the pool to copy it to.
func (c *change) copyNode(o *imageOrigin, to *api.Pool, asked string) (string, error) {
	if o.pool.Spec.Type == api.PoolDir {
		if asked != "" && asked != o.volume.Spec.Node {
			return "", &api.Error{Code: api.CodeRefused, Field: "spec.node", Detail: "volume " + o.volume.Meta.Name + " is on node " + o.volume.Spec.Node + " only, which has to copy it; leave the node out"}
		}
		return c.storageNode(to, o.volume.Spec.Node, false)
	}
	if asked != "" {
		if _, err := c.storageNode(&o.pool, asked, false); err != nil {
			return "", err
		}
		return c.storageNode(to, asked, false)
	}
	self := c.q.s.cfg.Node()
	if images := c.q.s.cfg.Images; images.HasPool(c.v, to.Meta.Name) && images.HasPool(c.v, o.pool.Meta.Name) {
		return self, nil
	}
	for _, st := range poolStates(c.v, to.Meta.ID) {
		n, err := configdb.Nodes.Get(c.v, st.Spec.NodeID)
		if err != nil || !st.Status.Ready || n.Status.Phase != api.NodeReady {
			continue
		}
		if has, err := configdb.PoolStateOf(c.v, o.pool.Meta.ID, n.Meta.ID); err == nil && has.Status.Ready {
			return n.Meta.Name, nil
		}
	}
	return "", api.Errorf(api.CodeRefused, "no node has both pool %s of volume %s and pool %s ready; see muster pool ls", o.pool.Meta.Name, o.volume.Meta.Name, to.Meta.Name)
}
