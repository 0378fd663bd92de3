// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"syscall"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/reconcile"
)

// An image from a volume has the content of an internal snapshot of it, or of a
// volume that no VM has. The latter is referred to by the image until that has its
// content, so that no VM takes it and nobody deletes it meanwhile.

// imagesOfSnapshot wakes the images that wait for a snapshot.
func (s *Service) imagesOfSnapshot(v *configdb.View, c configdb.Change) []string {
	id, _ := configdb.Snapshots.IDOf(c.Key)
	all, _ := configdb.Images.List(v) // what cannot be read is reported when it is its turn
	var ids []string
	for i := range all {
		if all[i].Spec.SourceSnapshot == id && all[i].Status.Phase != api.StorageReady {
			ids = append(ids, all[i].Meta.ID)
		}
	}
	return ids
}

// imageSource finds what an image is copied from, or says what it waits for.
func (s *Service) imageSource(v *configdb.View, img *api.Image) (*copySource, error) {
	if img.Spec.SourceSnapshot != "" {
		return s.copySource(v, img.Meta.Project, img.Spec.SourceVolume, img.Spec.SourceSnapshot)
	}
	vol, err := configdb.Volumes.Find(v, img.Meta.Project, img.Spec.SourceVolume)
	if err != nil {
		return nil, err
	}
	if _, ours := v.Get(sourceRef(vol.Meta.ID, img.Meta.ID)); !ours {
		return nil, api.Errorf(api.CodeRefused, "volume %q is not the one that image %q was to be made of", vol.Meta.Name, img.Meta.Name)
	}
	return s.sourceIn(v, img.Meta.Project, vol, "")
}

// imageFromVolume copies a volume into a new image.
func (s *Service) imageFromVolume(ctx context.Context, v *configdb.View, lp *localPool, img api.Image) (reconcile.Result, error) {
	id := img.Meta.ID
	src, err := s.imageSource(v, &img)
	if errors.Is(err, errImagePending) {
		return s.imageWaits(ctx, id, err)
	}
	if err != nil {
		return reconcile.Result{}, s.imageFailed(ctx, id, err)
	}
	if !s.copies.tryTake() {
		_, err := s.imageWaits(ctx, id, s.waitsForCopy())
		return reconcile.Result{After: copyRetry}, err
	}
	defer s.copies.give()
	f := follower{wanted: imageWanted(id), tell: func(ctx context.Context, percent int) error {
		_, err := s.setImage(ctx, id, func(i *api.Image) error {
			if i.Status.Phase == api.StorageReady {
				return errNotOurs
			}
			i.Status.Phase, i.Status.Progress, i.Status.Message = api.StorageImporting, percent, "copying volume "+i.Spec.SourceVolume
			return nil
		})
		return err
	}}
	if err := s.roomForCopy(ctx, v, lp, src); err != nil {
		return reconcile.Result{}, s.imageFailed(ctx, id, err)
	}
	if img.Status.Phase != api.StorageFailed { // what fails again should write nothing
		if err := f.tell(ctx, 0); err != nil {
			return reconcile.Result{}, ignore(err)
		}
	}
	done, err := s.makeImage(ctx, lp, id, func(tmp string) (string, error) {
		err := s.followed(ctx, f, func(ctx context.Context, progress *progressReader) error {
			return s.copyFrom(ctx, volumePlan{source: src}, tmp, progress)
		})
		if err != nil {
			return "", err
		}
		return s.checksum(ctx, lp, tmp)
	})
	switch {
	case err == nil:
		return reconcile.Result{}, s.letGo(ctx, s.cfg.DB.Local(), done)
	case ctx.Err() != nil:
		return reconcile.Result{}, context.Cause(ctx)
	case errors.Is(err, errUnwanted):
		return reconcile.Result{After: lookInterval}, nil // its deletion is next
	case ignore(err) == nil:
		return reconcile.Result{}, nil
	}
	return reconcile.Result{}, s.imageFailed(ctx, id, err)
}

// roomForCopy refuses a copy that cannot fit.
func (s *Service) roomForCopy(ctx context.Context, v *configdb.View, lp *localPool, src *copySource) error {
	_, from, err := s.readyPool(v, src.volume.Spec.Pool)
	if err != nil {
		return err
	}
	return s.roomFor(ctx, lp, from, src.path)
}

// roomFor refuses if a pool has less space than a file takes.
func (s *Service) roomFor(ctx context.Context, lp, from *localPool, path string) error {
	takes, err := call(ctx, from.work, callDeadline, func() (int64, error) {
		var st syscall.Stat_t
		err := syscall.Stat(path, &st)
		return st.Blocks * 512, err
	})
	if err != nil {
		return diskError(from, "look at the volume", err)
	}
	if free, err := s.driverIn(lp).free(ctx); err == nil && free < takes {
		return fullError(lp)
	}
	return nil
}

func imageWanted(id string) func(v *configdb.View) bool {
	return func(v *configdb.View) bool {
		img, err := configdb.Images.Get(v, id)
		return api.IgnoreNotFound(err) != nil || err == nil && !img.Meta.Deleting()
	}
}

// checksum is the SHA-256 of a file.
func (s *Service) checksum(ctx context.Context, lp *localPool, path string) (string, error) {
	f, err := call(ctx, lp.work, callDeadline, func() (*os.File, error) { return os.Open(path) })
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	r := &laneReader{ctx: ctx, lane: lp.work, f: f}
	if _, err := io.CopyBuffer(sum, r, make([]byte, chunkBytes)); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

func sourceRef(volumeID, imageID string) string {
	return configdb.Volumes.RefPrefix(volumeID) + string(api.KindImage) + "/" + imageID
}

// releaseSource lets go of the volume that an image was to be made of.
func releaseSource(v *configdb.View, tx *configdb.Txn, img *api.Image) (held bool) {
	if img.Spec.SourceVolume == "" || img.Spec.SourceSnapshot != "" {
		return false
	}
	vol, err := configdb.Volumes.Find(v, img.Meta.Project, img.Spec.SourceVolume)
	if err != nil {
		return false
	}
	if _, held = v.Get(sourceRef(vol.Meta.ID, img.Meta.ID)); held {
		configdb.Volumes.Release(tx, vol.Meta.ID, api.KindImage, img.Meta.ID)
	}
	return held
}

// letGo is releaseSource for an image that needs it no more.
func (s *Service) letGo(ctx context.Context, v *configdb.View, img api.Image) error {
	tx := &configdb.Txn{Actor: actor}
	if !releaseSource(v, tx, &img) {
		return nil
	}
	_, err := s.cfg.DB.Txn(ctx, tx)
	return err
}
