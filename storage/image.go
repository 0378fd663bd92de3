// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/reconcile"
)

const actor = "storage"

// conditionReady is the one condition of images and volumes.
const conditionReady = "Ready"

// errNotOurs ends a write for an object that moved to another node, is being
// deleted, or changed its phase under us.
var errNotOurs = errors.New("the object is no longer this node's to change")

func (s *Service) imagesOfPoolState(v *configdb.View, c configdb.Change) []string {
	return s.unfinishedImages(v, s.poolNameOfState(v, c))
}

// poolNameOfState returns the name of the pool whose state on this node
// changed, or "" if it is about another node.
func (s *Service) poolNameOfState(v *configdb.View, c configdb.Change) string {
	id, _ := configdb.PoolStates.IDOf(c.Key)
	poolID, nodeID, _ := strings.Cut(id, ".")
	if nodeID != s.cfg.NodeID {
		return ""
	}
	pool, err := configdb.Pools.Get(v, poolID)
	if err != nil {
		return ""
	}
	return pool.Meta.Name
}

func (s *Service) unfinishedImages(v *configdb.View, pool string) []string {
	if pool == "" {
		return nil
	}
	all, _ := configdb.Images.List(v) // what cannot be read is reported when it is its turn
	var ids []string
	for _, i := range all {
		if i.Spec.Pool == pool && (i.Status.Phase != api.StorageReady || i.Meta.Deleting()) {
			ids = append(ids, i.Meta.ID)
		}
	}
	return ids
}

// reconcileImage takes one step for an image whose executor is this node.
func (s *Service) reconcileImage(ctx context.Context, id string) (reconcile.Result, error) {
	v := s.cfg.DB.Local()
	img, err := configdb.Images.Get(v, id)
	switch {
	case err != nil && api.CodeOf(err) == api.CodeNotFound:
		return reconcile.Result{}, nil
	case err != nil:
		return reconcile.Result{}, err
	case img.Spec.Node != s.cfg.NodeName || s.isActive(id):
		return reconcile.Result{}, nil
	case img.Meta.Deleting():
		return s.deleteImage(ctx, v, img)
	case img.Status.Phase == api.StorageReady:
		return reconcile.Result{}, s.letGo(ctx, v, img)
	case img.Status.Phase == api.StorageFailed && img.Status.ObservedGeneration == img.Meta.Generation && !retryable(img.Status.Conditions):
		return reconcile.Result{}, s.letGo(ctx, v, img) // the content is bad; it will not become better
	}
	if img.Spec.Awaits() {
		return s.awaitUpload(ctx, img)
	}
	pool, lp, err := s.readyPool(v, img.Spec.Pool)
	if err != nil {
		return s.imageWaits(ctx, id, err)
	}
	if img.Spec.SourceVolume != "" {
		return s.imageFromVolume(ctx, v, lp, img)
	}
	return reconcile.Result{}, s.importPath(ctx, pool, lp, img)
}

// retryable reports whether a failure may go away by itself.
func retryable(list []api.Condition) bool {
	c, ok := api.FindCondition(list, conditionReady)
	if !ok || c.OK {
		return false
	}
	switch c.Reason {
	case "StorageFull", "Timeout", "Unsupported", "Error":
		return true
	}
	return false
}

// awaitUpload says what the image waits for. It also ends the phase of an
// upload that the daemon did not survive.
func (s *Service) awaitUpload(ctx context.Context, img api.Image) (reconcile.Result, error) {
	if img.Status.Phase == api.StorageFailed {
		return reconcile.Result{}, nil // an upload that failed for a reason that an upload can mend
	}
	msg := "waiting for the upload of its content"
	if img.Status.Phase == api.StorageImporting {
		msg = "the upload was interrupted; upload the content again"
	} else if img.Status.Phase == api.StoragePending && img.Status.Message != "" {
		msg = img.Status.Message
	}
	_, err := s.setImage(ctx, img.Meta.ID, func(i *api.Image) error {
		if i.Status.Phase != img.Status.Phase {
			return errNotOurs
		}
		i.Status.Phase, i.Status.Message, i.Status.Progress = api.StoragePending, msg, 0
		return nil
	})
	return reconcile.Result{}, ignore(err)
}

// imageWaits reports why nothing happens yet.
func (s *Service) imageWaits(ctx context.Context, id string, why error) (reconcile.Result, error) {
	_, err := s.setImage(ctx, id, func(i *api.Image) error {
		i.Status.Phase, i.Status.Message = api.StoragePending, why.Error()
		return nil
	})
	return reconcile.Result{After: retryPool}, ignore(err)
}

func ignore(err error) error {
	if errors.Is(err, errNotOurs) || api.CodeOf(err) == api.CodeNotFound {
		return nil
	}
	return err
}

// setImage changes the status of an image that is this node's, on fresh state.
// The spec's revision is required too: a node that was replaced as executor
// must not report any more.
func (s *Service) setImage(ctx context.Context, id string, f func(*api.Image) error) (api.Image, error) {
	var out api.Image
	_, err := configdb.Transact(ctx, s.cfg.DB, actor, txnAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		img, err := configdb.Images.Get(v, id)
		if err != nil {
			return err
		}
		if img.Spec.Node != s.cfg.NodeName || img.Meta.Deleting() {
			return errNotOurs
		}
		img = img.Clone()
		if err := f(&img); err != nil {
			return err
		}
		img.Status.ObservedGeneration = img.Meta.Generation
		out = img
		if err := configdb.Images.UpdateStatus(v, tx, &img); err != nil || tx.Empty() {
			return err
		}
		tx.RequireRevision(configdb.Images.SpecKey(id), img.Meta.Revision)
		return nil
	})
	if err == nil {
		out, err = configdb.Images.Get(s.cfg.DB.Local(), id) // with its new revisions
	}
	return out, err
}

// claim marks an image as being worked on by this process.
func (s *Service) claim(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.active[id] {
		return false
	}
	s.active[id] = true
	return true
}

func (s *Service) isActive(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.active[id]
}

// release ends a claim and makes the loop look at what happened meanwhile.
func (s *Service) release(id string) {
	s.mu.Lock()
	delete(s.active, id)
	s.mu.Unlock()
	s.images.Enqueue(id)
}

// importPath copies a file of this node into the pool.
func (s *Service) importPath(ctx context.Context, pool api.Pool, lp *localPool, img api.Image) error {
	src, size, err := s.openSource(ctx, img.Spec.Path)
	if err != nil {
		return s.imageFailed(ctx, img.Meta.ID, err)
	}
	defer src.Close()
	if free, err := s.driverIn(lp).free(ctx); err == nil && free < size {
		return s.imageFailed(ctx, img.Meta.ID, fullError(lp))
	}
	if _, err := s.setImage(ctx, img.Meta.ID, func(i *api.Image) error {
		if i.Status.Phase == api.StorageReady {
			return errNotOurs
		}
		i.Status.Phase, i.Status.Message, i.Status.Progress = api.StorageImporting, "copying "+img.Spec.Path, 0
		return nil
	}); err != nil {
		return ignore(err)
	}
	r := &laneReader{ctx: ctx, lane: s.sources, f: src}
	_, err = s.ingest(ctx, lp, ingestion{id: img.Meta.ID, r: r, length: size, sha256: img.Spec.SHA256, pool: pool.Meta.Name})
	switch {
	case err == nil, ctx.Err() != nil:
		return context.Cause(ctx)
	case ignore(err) == nil:
		return nil
	}
	return s.imageFailed(ctx, img.Meta.ID, err)
}

// openSource opens the file to import. Only regular files: a device or a FIFO
// could block, or never end.
func (s *Service) openSource(ctx context.Context, path string) (*os.File, int64, error) {
	f, err := call(ctx, s.sources, callDeadline, func() (*os.File, error) {
		return os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, 0, api.Errorf(api.CodeInvalid, "there is no file %s on node %s", path, s.cfg.NodeName)
	case err != nil:
		return nil, 0, fmt.Errorf("open the file to import on node %s: %w", s.cfg.NodeName, err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = api.Errorf(api.CodeInvalid, "%s on node %s is not a regular file", path, s.cfg.NodeName)
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, info.Size(), nil
}

// imageFailed records a failure. What may go away is returned as an error too,
// so that the loop tries again with back-off; an equal failure writes nothing.
func (s *Service) imageFailed(ctx context.Context, id string, cause error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	failed, err := s.setImage(ctx, id, func(i *api.Image) error {
		if i.Status.Phase == api.StorageReady {
			return errNotOurs
		}
		i.Status.Phase, i.Status.Message, i.Status.Progress = api.StorageFailed, cause.Error(), 0
		i.Status.Conditions = api.SetCondition(i.Status.Conditions, failure(cause), s.cfg.Now())
		return nil
	})
	if err != nil {
		return ignore(err)
	}
	if retryable(failed.Status.Conditions) {
		return cause
	}
	return nil
}

func failure(cause error) api.Condition {
	return api.Condition{Type: conditionReady, Reason: reason(cause), Message: cause.Error()}
}

func success() api.Condition { return api.Condition{Type: conditionReady, OK: true, Reason: "Ready"} }

// deleteImage removes the file, then the object with its references.
func (s *Service) deleteImage(ctx context.Context, v *configdb.View, img api.Image) (reconcile.Result, error) {
	if why := keeps(configdb.Images.Referrers(v, img.Meta.ID), img.Meta.Finalizers); why != "" {
		return reconcile.Result{}, s.imageDeleting(ctx, img.Meta.ID, why)
	}
	pool, err := configdb.Pools.Find(v, "", img.Spec.Pool)
	if err != nil && api.CodeOf(err) != api.CodeNotFound {
		return reconcile.Result{}, err
	}
	if err == nil {
		_, lp, err := s.readyPool(v, img.Spec.Pool)
		if err != nil {
			return reconcile.Result{After: retryPool}, s.imageDeleting(ctx, img.Meta.ID, err.Error())
		}
		if err := s.imageDeleting(ctx, img.Meta.ID, ""); err != nil {
			return reconcile.Result{}, err
		}
		if err := s.driverIn(lp).removeImage(ctx, img.Meta.ID); err != nil {
			return reconcile.Result{}, diskError(lp, "remove the image's file", err)
		}
	}
	_, err = configdb.Transact(ctx, s.cfg.DB, actor, txnAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		return dropImage(v, tx, img.Meta.ID, pool.Meta.ID)
	})
	if errors.Is(err, configdb.ErrConflict) {
		// Somebody refers to it since: a change of that wakes us.
		return reconcile.Result{After: retryPool}, nil
	}
	return reconcile.Result{}, ignore(err)
}

func dropImage(v *configdb.View, tx *configdb.Txn, id, poolID string) error {
	img, err := configdb.Images.Get(v, id)
	if err != nil {
		return err
	}
	configdb.Images.Delete(tx, &img)
	releaseSource(v, tx, &img)
	if poolID != "" {
		configdb.Pools.Release(tx, poolID, api.KindImage, id)
	}
	return nil
}

// keeps says who holds an object that is to be deleted.
func keeps(referrers, finalizers []string) string {
	if len(referrers) > 0 {
		return "waiting for " + strings.Join(referrers[:min(len(referrers), 5)], ", ") + " to let go of it"
	}
	for _, f := range finalizers {
		if f != finalizer {
			return "waiting for " + f + " to clean up"
		}
	}
	return ""
}

func (s *Service) imageDeleting(ctx context.Context, id, why string) error {
	_, err := configdb.Transact(ctx, s.cfg.DB, actor, txnAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		img, err := configdb.Images.Get(v, id)
		if err != nil {
			return err
		}
		img = img.Clone()
		img.Status.Phase, img.Status.Message = api.StorageDeleting, why
		img.Status.ObservedGeneration = img.Meta.Generation
		return configdb.Images.UpdateStatus(v, tx, &img)
	})
	return ignore(err)
}

// laneReader reads a file that may be on a hung file system.
type laneReader struct {
	ctx  context.Context // of the one import that reads
	lane *lane
	f    *os.File
}

func (l *laneReader) Read(p []byte) (int, error) {
	// Into a buffer of its own: a call that hangs must not write to p later.
	type chunk struct {
		b   []byte
		err error
	}
	c, err := call(l.ctx, l.lane, callDeadline, func() (chunk, error) {
		b := make([]byte, len(p))
		n, err := l.f.Read(b)
		return chunk{b[:n], err}, nil
	})
	if err != nil {
		return 0, err
	}
	return copy(p, c.b), c.err
}
