// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"errors"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/reconcile"
)

func (s *Service) volumesOfPoolState(v *configdb.View, c configdb.Change) []string {
	return s.unfinishedVolumes(v, s.poolNameOfState(v, c))
}

func (s *Service) unfinishedVolumes(v *configdb.View, pool string) []string {
	if pool == "" {
		return nil
	}
	return s.volumesWhere(v, func(vol *api.Volume) bool { return vol.Spec.Pool == pool })
}

// volumesOfImage wakes the clones that wait for an image.
func (s *Service) volumesOfImage(v *configdb.View, c configdb.Change) []string {
	id, _ := configdb.Images.IDOf(c.Key)
	img, err := configdb.Images.Get(v, id)
	if err != nil || img.Status.Phase == api.StorageImporting {
		return nil
	}
	return s.volumesWhere(v, func(vol *api.Volume) bool {
		return vol.Spec.Image == img.Meta.Name && vol.Meta.Project == img.Meta.Project
	})
}

// volumesOfVM wakes what a migration may have brought here, when its operation
// ends.
func volumesOfVM(v *configdb.View, c configdb.Change) []string {
	id, ok := configdb.Operations.IDOf(c.Key)
	vm, err := configdb.VMs.Get(v, id)
	if !ok || err != nil || !c.Deleted {
		return nil
	}
	var ids []string
	for _, d := range vm.Spec.Disks {
		if vol, err := configdb.Volumes.Find(v, vm.Meta.Project, d.Volume); err == nil {
			ids = append(ids, vol.Meta.ID)
		}
	}
	return ids
}

func (s *Service) volumesWhere(v *configdb.View, match func(*api.Volume) bool) []string {
	all, _ := configdb.Volumes.List(v) // what cannot be read is reported when it is its turn
	var ids []string
	for i := range all {
		if (all[i].Status.Phase != api.StorageReady || all[i].Status.Size < all[i].Spec.Size || all[i].Meta.Deleting()) && match(&all[i]) {
			ids = append(ids, all[i].Meta.ID)
		}
	}
	return ids
}

// reconcileVolume takes one step for a volume whose executor is this node.
func (s *Service) reconcileVolume(ctx context.Context, id string) (reconcile.Result, error) {
	v := s.cfg.DB.Local()
	vol, err := configdb.Volumes.Get(v, id)
	switch {
	case err != nil && api.CodeOf(err) == api.CodeNotFound:
		return reconcile.Result{}, nil
	case err != nil:
		return reconcile.Result{}, err
	case vol.Spec.Node != s.cfg.NodeName:
		return reconcile.Result{}, nil
	case vol.Meta.Deleting():
		return s.deleteVolume(ctx, v, vol)
	case vol.Status.Phase == api.StorageReady:
		if _, ok := s.severed(v, &vol); ok { // its header names no image any more
			return reconcile.Result{}, s.sever(ctx, id)
		}
		if vol.Status.Size < vol.Spec.Size {
			return s.grow(ctx, v, vol)
		}
		return reconcile.Result{}, nil
	}
	pool, lp, err := s.readyPool(v, vol.Spec.Pool)
	if err != nil {
		return s.volumeWaits(ctx, id, err)
	}
	plan, err := s.plan(v, pool, vol)
	if err == nil && vol.Spec.SourceVolume != "" {
		plan.source, err = s.copySource(v, vol.Meta.Project, vol.Spec.SourceVolume, vol.Spec.SourceSnapshot)
	}
	if errors.Is(err, errImagePending) {
		return s.volumeWaits(ctx, id, err)
	}
	if err == nil && plan.source != nil {
		if !s.copies.tryTake() {
			_, err := s.volumeWaits(ctx, id, s.waitsForCopy())
			return reconcile.Result{After: copyRetry}, err
		}
		defer s.copies.give()
	}
	if err != nil {
		return reconcile.Result{}, s.volumeFailed(ctx, id, err, false)
	}
	if err := s.driverIn(lp).createVolume(ctx, id, plan); err != nil {
		if ctx.Err() != nil {
			return reconcile.Result{}, context.Cause(ctx)
		}
		if errors.Is(err, errUnwanted) {
			return reconcile.Result{After: time.Millisecond}, nil // its deletion is next
		}
		err = diskError(lp, "create the volume", err)
		return reconcile.Result{}, s.volumeFailed(ctx, id, err, api.CodeOf(err) != api.CodeRefused)
	}
	return reconcile.Result{}, s.volumeReady(ctx, lp, id, plan)
}

// volumePlan is what has to be made.
type volumePlan struct {
	content                api.VolumeContent
	size                   int64
	image                  string // ID of the one that it is a clone of
	backing, backingFormat string
	source                 *copySource // nil: nothing to copy
}

var errImagePending = errors.New("image is not ready")

// pendingError tells people which image is meant.
type pendingError struct{ text string }

func (e pendingError) Error() string        { return e.text }
func (e pendingError) Is(target error) bool { return target == errImagePending }

// plan checks the wish against the image and the pool.
func (s *Service) plan(v *configdb.View, pool api.Pool, vol api.Volume) (volumePlan, error) {
	if vol.Spec.Content != "" {
		return s.contentPlan(vol.Spec.Content)
	}
	p := volumePlan{size: int64(vol.Spec.Size)}
	if vol.Spec.Image == "" {
		if p.size <= 0 {
			return p, api.Invalid("spec.size", "is missing; give the size of an empty volume")
		}
		return p, nil
	}
	img, err := configdb.Images.Find(v, vol.Meta.Project, vol.Spec.Image)
	if err != nil {
		return p, err
	}
	name := img.Meta.Name
	switch {
	case img.Spec.Pool != pool.Meta.Name:
		return p, api.Errorf(api.CodeRefused, "image %q is in pool %q, and a linked clone must be in the pool of its image; choose that pool", name, img.Spec.Pool)
	case img.Meta.Deleting():
		return p, api.Errorf(api.CodeRefused, "image %q is being deleted", name)
	case img.Status.Phase == api.StorageFailed:
		return p, pendingError{"image \"" + name + "\" failed: " + img.Status.Message}
	case img.Status.Phase != api.StorageReady:
		return p, pendingError{"waiting for image \"" + name + "\" to become ready"}
	case pool.Spec.Type == api.PoolDir && img.Spec.Node != s.cfg.NodeName:
		return p, api.Errorf(api.CodeRefused, "image %q is in the pool %q of node %s, not of node %s; choose that node, or import the image here too", name, pool.Meta.Name, img.Spec.Node, s.cfg.NodeName)
	case img.Status.Format != formatQcow2 && img.Status.Format != formatRaw:
		return p, api.Errorf(api.CodeRefused, "image %q has the unknown format %q", name, clip(img.Status.Format))
	}
	if p.size == 0 {
		p.size = int64(img.Status.VirtualSize)
	}
	if p.size < int64(img.Status.VirtualSize) {
		return p, api.Invalid("spec.size", "is %s, less than the %s of image %q; give at least that much", api.Size(p.size), img.Status.VirtualSize, name)
	}
	p.image, p.backing, p.backingFormat = img.Meta.ID, backingRef(img.Meta.ID, img.Status.Format), img.Status.Format
	return p, nil
}

func (s *Service) volumeReady(ctx context.Context, lp *localPool, id string, p volumePlan) error {
	err := s.setVolume(ctx, id, func(vol *api.Volume) error {
		vol.Status.Phase, vol.Status.Message = api.StorageReady, ""
		vol.Status.Format, vol.Status.Size, vol.Status.Progress = s.driverIn(lp).volumeFormat(p), api.Size(p.size), 0
		vol.Status.Conditions = api.SetCondition(vol.Status.Conditions, success(), s.cfg.Now())
		return nil
	})
	if api.CodeOf(err) == api.CodeNotFound && err != nil {
		// Deleted meanwhile, by an executor that found no file yet.
		return s.driverIn(lp).removeVolume(ctx, id)
	}
	return ignore(err)
}

func (s *Service) volumeWaits(ctx context.Context, id string, why error) (reconcile.Result, error) {
	err := s.setVolume(ctx, id, func(vol *api.Volume) error {
		vol.Status.Phase, vol.Status.Message = api.StoragePending, why.Error()
		return nil
	})
	return reconcile.Result{After: retryPool}, ignore(err)
}

// volumeFailed records a failure; what may go away is returned too, so that
// the loop tries again with back-off. An equal failure writes nothing.
func (s *Service) volumeFailed(ctx context.Context, id string, cause error, again bool) error {
	err := s.setVolume(ctx, id, func(vol *api.Volume) error {
		vol.Status.Phase, vol.Status.Message = api.StorageFailed, cause.Error()
		vol.Status.Conditions = api.SetCondition(vol.Status.Conditions, failure(cause), s.cfg.Now())
		return nil
	})
	switch {
	case err != nil:
		return ignore(err)
	case again:
		return cause
	}
	return nil
}

// setVolume changes the status of a volume that is this node's, on fresh
// state, and never one that is ready: a guest may use it.
func (s *Service) setVolume(ctx context.Context, id string, f func(*api.Volume) error) error {
	return s.setVolumeIf(ctx, id, func(vol *api.Volume) bool { return vol.Status.Phase != api.StorageReady }, f)
}

// setVolumeIf changes the status of a volume of ours as long as may allows it.
func (s *Service) setVolumeIf(ctx context.Context, id string, may func(*api.Volume) bool, f func(*api.Volume) error) error {
	_, err := configdb.Transact(ctx, s.cfg.DB, actor, txnAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		vol, err := configdb.Volumes.Get(v, id)
		if err != nil {
			return err
		}
		if vol.Spec.Node != s.cfg.NodeName || vol.Meta.Deleting() || !may(&vol) {
			return errNotOurs
		}
		vol = vol.Clone()
		if err := f(&vol); err != nil {
			return err
		}
		vol.Status.ObservedGeneration = vol.Meta.Generation
		if err := configdb.Volumes.UpdateStatus(v, tx, &vol); err != nil || tx.Empty() {
			return err
		}
		tx.RequireRevision(configdb.Volumes.SpecKey(id), vol.Meta.Revision)
		return nil
	})
	return err
}

// deleteVolume removes the file, then the object with its references.
func (s *Service) deleteVolume(ctx context.Context, v *configdb.View, vol api.Volume) (reconcile.Result, error) {
	id := vol.Meta.ID
	if why := keeps(configdb.Volumes.Referrers(v, id), vol.Meta.Finalizers); why != "" {
		return reconcile.Result{}, s.volumeDeleting(ctx, id, why)
	}
	pool, err := configdb.Pools.Find(v, "", vol.Spec.Pool)
	if err != nil && api.CodeOf(err) != api.CodeNotFound {
		return reconcile.Result{}, err
	}
	if err == nil {
		_, lp, err := s.readyPool(v, vol.Spec.Pool)
		if err != nil {
			return reconcile.Result{After: retryPool}, s.volumeDeleting(ctx, id, err.Error())
		}
		if err := s.volumeDeleting(ctx, id, ""); err != nil {
			return reconcile.Result{}, err
		}
		if err := s.driverIn(lp).removeVolume(ctx, id); err != nil {
			return reconcile.Result{}, diskError(lp, "remove the volume's file", err)
		}
	}
	_, err = configdb.Transact(ctx, s.cfg.DB, actor, txnAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		return dropVolume(v, tx, id, pool.Meta.ID)
	})
	if errors.Is(err, configdb.ErrConflict) {
		return reconcile.Result{After: retryPool}, nil // somebody refers to it since; that change wakes us
	}
	return reconcile.Result{}, ignore(err)
}

// dropVolume removes the object and what it refers to.
func dropVolume(v *configdb.View, tx *configdb.Txn, id, poolID string) error {
	vol, err := configdb.Volumes.Get(v, id)
	if err != nil {
		return err
	}
	configdb.Volumes.Delete(tx, &vol)
	if poolID != "" {
		configdb.Pools.Release(tx, poolID, api.KindVolume, id)
	}
	if vol.Spec.Image != "" {
		if img, err := configdb.Images.Find(v, vol.Meta.Project, vol.Spec.Image); err == nil {
			configdb.Images.Release(tx, img.Meta.ID, api.KindVolume, id)
		}
	}
	return nil
}

func (s *Service) volumeDeleting(ctx context.Context, id, why string) error {
	_, err := configdb.Transact(ctx, s.cfg.DB, actor, txnAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		vol, err := configdb.Volumes.Get(v, id)
		if err != nil {
			return err
		}
		vol = vol.Clone()
		vol.Status.Phase, vol.Status.Message = api.StorageDeleting, why
		vol.Status.ObservedGeneration = vol.Meta.Generation
		return configdb.Volumes.UpdateStatus(v, tx, &vol)
	})
	return ignore(err)
}
