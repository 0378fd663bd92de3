// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// change carries out a PUT or PATCH: of a volume only the size changes, and only
// upwards.
func (r *volumeResource) change(c *change, old, want *api.Volume) (*effect, error) {
	size := want.Spec.Size
	if size == old.Spec.Size {
		return r.updateLabels(c, old, want)
	}
	have := max(old.Spec.Size, old.Status.Size)
	if size < have {
		return nil, api.Invalid("spec.size", "is %s, but volume %s has %s, and volumes never shrink; give more, or copy the data to a smaller one", size, old.Meta.Name, have)
	}
	if err := usable(api.KindVolume, &old.Meta, old.Status.Phase); err != nil {
		return nil, err
	}
	if err := c.stays(old); err != nil {
		return nil, err
	}
	if old.Status.Phase != api.StorageReady {
		return nil, api.Errorf(api.CodeRefused, "volume %s is %s; enlarge it when it is ready", old.Meta.Name, old.Status.Phase)
	}
	if err := c.unworked(old); err != nil {
		return nil, err
	}
	before := old.Clone()
	before.Spec.Size = size
	if _, err := r.updateLabels(c, &before, want); err != nil { // nothing else
		return nil, err
	}
	e, err := r.store(c, want)
	if err != nil || size == have {
		return e, err
	}
	e.task, err = c.newTask(want.Meta.Project, api.TaskSpec{
		Action: api.ActionVolumeResize, TargetKind: api.KindVolume, TargetID: want.Meta.ID, Target: want.Meta.Name, TargetGeneration: want.Meta.Generation,
	}, storageDeadline)
	return e, err
}

// unworked refuses while something works on a VM that has the volume, because a
// snapshot or a revert has looked at the size; and while its guest is on disk, which
// expects to find its own disk again.
func (c *change) unworked(vol *api.Volume) error {
	for _, by := range configdb.Volumes.Referrers(c.v, vol.Meta.ID) {
		id, ok := strings.CutPrefix(by, string(api.KindVM)+"/")
		if !ok {
			continue
		}
		vm, err := configdb.VMs.Get(c.v, id)
		if api.IgnoreNotFound(err) != nil {
			return err
		}
		if err != nil {
			continue
		}
		if err := c.idle(&vm); err != nil {
			return err
		}
		if _, saved := c.saved(id); saved || vm.Spec.Power == api.PowerSuspended {
			return errSuspended(&vm, "its disks are not enlarged")
		}
	}
	return nil
}
