// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/reconcile"
)

// growLook is the pause between two looks at a volume that the QEMU that has it
// open is to enlarge.
const growLook = 2 * time.Second

// grow makes a volume as large as wished. If a QEMU has it open, that is QEMU's
// work (the hypervisor tells it), and this waits until the file says so: the
// lock on the image keeps the two apart.
func (s *Service) grow(ctx context.Context, v *configdb.View, vol api.Volume) (reconcile.Result, error) {
	id, want := vol.Meta.ID, int64(vol.Spec.Size)
	_, lp, err := s.readyPool(v, vol.Spec.Pool)
	if err != nil {
		return reconcile.Result{After: retryPool}, s.growing(ctx, id, err.Error())
	}
	d := s.driverIn(lp)
	have, err := d.volumeSize(ctx, v, &vol)
	if err != nil {
		return reconcile.Result{After: retryPool}, errors.Join(s.growing(ctx, id, diskError(lp, "enlarge the volume", err).Error()), context.Cause(ctx))
	}
	if have < want && inUse(v, &vol) {
		return reconcile.Result{After: growLook}, s.growing(ctx, id, "its vm enlarges it")
	}
	if have < want {
		if err := d.growVolume(ctx, id, want); err != nil {
			return reconcile.Result{After: retryPool}, errors.Join(s.growing(ctx, id, diskError(lp, "enlarge the volume", err).Error()), context.Cause(ctx))
		}
		have = want
	}
	s.log.Info("volume enlarged", "volume", id, "size", api.Size(have))
	return reconcile.Result{}, ignore(s.setVolumeIf(ctx, id, canGrow, func(now *api.Volume) error {
		now.Status.Size, now.Status.Message = api.Size(have), ""
		return nil
	}))
}

// growing says why a volume is not as large as wished yet.
func (s *Service) growing(ctx context.Context, id, why string) error {
	_, err := configdb.Transact(ctx, s.cfg.DB, actor, txnAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		vol, err := configdb.Volumes.Get(v, id)
		if err != nil {
			return err
		}
		if vol.Spec.Node != s.cfg.NodeName || !canGrow(&vol) {
			return errNotOurs
		}
		vol = vol.Clone()
		vol.Status.Message = fmt.Sprintf("to be enlarged to %s: %s", vol.Spec.Size, why)
		return configdb.Volumes.UpdateStatus(v, tx, &vol)
	})
	return ignore(err)
}

func canGrow(vol *api.Volume) bool {
	return vol.Status.Phase == api.StorageReady && vol.Status.Size < vol.Spec.Size
}

// inUse reports whether the QEMU of a VM has a volume open, or may have.
func inUse(v *configdb.View, vol *api.Volume) bool {
	for _, by := range configdb.Volumes.Referrers(v, vol.Meta.ID) {
		id, ok := strings.CutPrefix(by, string(api.KindVM)+"/")
		if !ok {
			continue
		}
		vm, err := configdb.VMs.Get(v, id)
		if err == nil && (vm.Status.PID != 0 || vm.Status.Hardware != nil || vm.Spec.Power != api.PowerStopped) {
			return true
		}
	}
	return false
}
