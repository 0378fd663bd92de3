// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/reconcile"
)

// A migration without shared storage copies volumes between the dir pools of two
// nodes, and a move between any two pools. Both have the file under the same name
// then; spec.node and spec.pool of the volume, which change in the transaction that
// hands it over, say which counts.
// The other one is removed when the operation is gone, whatever happened. Only
// marked files ever are: one that is not where the database says it is may be the
// last copy, for instance after the restore of an older backup.

// copyMark is the suffix of the file beside both files that marks them while a migration or a
// move is on its way.
const copyMark = ".copy"

// markOf is the suffix of the mark of this node. In a pool that all nodes see each
// has its own, and sweeps that only: another node may be about to place its file.
func (s *Service) markOf(pool api.Pool) string {
	if pool.Spec.Type == api.PoolDir {
		return copyMark
	}
	return copyMark + "." + s.cfg.NodeID
}

// mark marks a file as this node's. In a dir pool the mark says which node has made it;
// one of another node stays.
func (s *Service) mark(path string, pool api.Pool) error {
	if ours, err := s.marked(path, pool); ours || err != nil {
		return err
	}
	tmp, err := writeBeside(path, s.cfg.NodeID, []byte(s.cfg.NodeID))
	if err == nil {
		err = placeFile(tmp, path+s.markOf(pool))
	}
	if errors.Is(err, fs.ErrExist) { // since we looked
		_, err = s.marked(path, pool)
	}
	return errors.Join(err, remove(tmp))
}

// marked reports whether this node has marked a file. It refuses a file of a dir pool
// that another node has marked: its directory is this node's, too, so what would make
// room here is the volume itself. What follows from the answer must not be asked for a
// second time: the other node's mark may be gone by then.
func (s *Service) marked(path string, pool api.Pool) (bool, error) {
	b, err := readSmall(path + s.markOf(pool))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	id := string(b)
	if id == "" { // half a write of earlier software, of whatever node
		return false, api.Errorf(api.CodeRefused, "%s does not say which node made it; look whether %s is the volume, and remove the mark or both", path+s.markOf(pool), path)
	}
	if id != s.cfg.NodeID {
		return false, api.Errorf(api.CodeRefused, "%s is a file of node %s as well: the nodes have one directory in pool %s, which is of type %s; make a pool of type %s of it",
			path, s.nodeName(id), pool.Meta.Name, api.PoolDir, api.PoolShared)
	}
	return true, nil
}

// nodeName is the name of a node, or its ID if it is not known.
func (s *Service) nodeName(id string) string {
	if n, err := configdb.Nodes.Get(s.cfg.DB.Local(), id); err == nil {
		return n.Meta.Name
	}
	return clip(id)
}

// placeMarked gives a complete file its name, marked. What is there under that name
// makes room if it is marked, so that it is of an earlier try. wanted is asked right
// before each step that must not come late.
func (s *Service) placeMarked(tmp, final string, pool api.Pool, wanted func() error) error {
	ours, err := s.marked(final, pool)
	if err != nil {
		return err
	}
	marks, err := filepath.Glob(final + copyMark + "*")
	if err != nil {
		return err
	}
	for _, m := range marks {
		if !ours || m != final+s.markOf(pool) {
			return brokenError{api.Errorf(api.CodeRefused, "%s says that an earlier move to pool %s has not been cleaned up by its node (%s); start that node, or if it is gone for good remove this file and the one that it is beside",
				m, pool.Meta.Name, strings.TrimPrefix(m, final+copyMark+"."))}
		}
	}
	if err := s.makeRoom(final, pool, ours, wanted); err != nil {
		return err
	}
	if err := os.Chmod(tmp, volumeMode); err != nil {
		return err
	}
	if err := wanted(); err != nil {
		return err
	}
	return placeFile(tmp, final) // with the mark, in one directory
}

// The pauses before another try of a sweep: without a quorum, and while the pool
// is not known to be usable in this life of the daemon.
const (
	sweepRetry = retryPool
	sweepSoon  = 2 * time.Second
)

// MakeCopy makes an empty file for a volume of another node that a migration
// brings here. What an earlier attempt left is replaced.
func (s *Service) MakeCopy(ctx context.Context, v *configdb.View, volumeID string) (path, format string, err error) {
	vol, err := configdb.Volumes.Get(v, volumeID)
	if err != nil {
		return "", "", err
	}
	if vol.Spec.Node == s.cfg.NodeName {
		return "", "", fmt.Errorf("volume %q is on this node already", vol.Meta.Name)
	}
	pool, lp, err := s.readyPool(v, vol.Spec.Pool)
	if err != nil {
		return "", "", err
	}
	if pool.Spec.Shared() {
		return "", "", fmt.Errorf("volume %q is on the shared pool %q and needs no copy", vol.Meta.Name, pool.Meta.Name)
	}
	if vol.Status.Format != formatQcow2 || vol.Status.Size <= 0 {
		return "", "", api.Errorf(api.CodeRefused, "volume %q has format %q and size %s; only ready qcow2 volumes can be copied", vol.Meta.Name, clip(vol.Status.Format), vol.Status.Size)
	}
	s.moves.Lock()
	defer s.moves.Unlock()
	path = volumePath(lp.path, volumeID)
	if err := lp.work.attempt(ctx, callDeadline, func(wanted func() error) error {
		ours, err := s.marked(path, pool)
		if err != nil {
			return err
		}
		return s.makeRoom(path, pool, ours, wanted)
	}); err != nil {
		return "", "", diskError(lp, "make room for the volume's copy", err)
	}
	err = s.tool(ctx, lp, createDeadline, func(ctx context.Context) error {
		return s.img.create(ctx, path, "", "", int64(vol.Status.Size))
	})
	if err == nil {
		err = lp.work.do(ctx, callDeadline, func() error { return os.Chmod(path, 0o600) })
	}
	if err != nil {
		return "", "", diskError(lp, "make the volume's copy", err)
	}
	return path, formatQcow2, nil
}

// makeRoom marks the place of a copy. What is there makes room if this node had marked
// it, so that it is of an earlier try; any other file may, after the restore of an older
// backup, be the last copy of the volume.
func (s *Service) makeRoom(path string, pool api.Pool, ours bool, wanted func() error) error {
	switch _, err := os.Lstat(path); {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	case err == nil && !ours:
		return api.Errorf(api.CodeRefused, "%s is there already and belongs to no migration or move; look what it is and move it away", path)
	}
	if err := s.mark(path, pool); err != nil || !ours {
		return err
	}
	if err := wanted(); err != nil {
		return err
	}
	return remove(path)
}

// MarkCopied marks the file of a volume that a migration takes away from here.
func (s *Service) MarkCopied(ctx context.Context, v *configdb.View, volumeID string) error {
	vol, err := configdb.Volumes.Get(v, volumeID)
	if err != nil {
		return err
	}
	pool, lp, err := s.readyPool(v, vol.Spec.Pool)
	if err != nil {
		return err
	}
	s.moves.Lock()
	defer s.moves.Unlock()
	err = lp.work.do(ctx, callDeadline, func() error { return s.mark(volumePath(lp.path, volumeID), pool) })
	if err != nil {
		return diskError(lp, "mark the volume", err)
	}
	return nil
}

// copiesLoop looks for files that a migration left, at the start and whenever an
// operation ends.
func (s *Service) copiesLoop() *reconcile.Loop {
	return reconcile.New(reconcile.Config{
		Name: "copies", DB: s.cfg.DB, Log: s.log, Workers: 1, Reconcile: s.sweepCopies,
		Sources: []reconcile.Source{
			{Prefix: configdb.Operations.SpecPrefix(), IDs: dirPools},
			{Prefix: configdb.PoolStates.StatusPrefix(), IDs: s.ownPools},
		},
	})
}

// ownPools is the pool whose state on this node changed.
func (s *Service) ownPools(_ *configdb.View, c configdb.Change) []string {
	id, _ := configdb.PoolStates.IDOf(c.Key)
	if pool, node, _ := strings.Cut(id, "."); node == s.cfg.NodeID {
		return []string{pool}
	}
	return nil
}

// dirPools are looked at whenever an operation ends. In shared pools only moves
// leave something, and their node looks itself.
func dirPools(v *configdb.View, _ configdb.Change) []string {
	pools, _ := configdb.Pools.List(v) // one that cannot be read is not swept
	var ids []string
	for _, p := range pools {
		if p.Spec.Type == api.PoolDir {
			ids = append(ids, p.Meta.ID)
		}
	}
	return ids
}

// sweepCopies removes the files of one pool that are copies of volumes which
// are elsewhere. It decides on a linearizable view only, and makes no file
// meanwhile, so that it never takes a copy that is just being made.
func (s *Service) sweepCopies(ctx context.Context, poolID string) (reconcile.Result, error) {
	pool, err := configdb.Pools.Get(s.cfg.DB.Local(), poolID)
	if err != nil {
		return reconcile.Result{}, api.IgnoreNotFound(err)
	}
	if pool.Spec.Type == api.PoolRBD {
		return reconcile.Result{}, nil // it has no files, and nothing moves there
	}
	lp := s.local(pool)
	if !lp.usable() {
		return reconcile.Result{After: sweepSoon}, nil // its stored state may tell nothing new
	}
	s.moves.Lock()
	defer s.moves.Unlock()
	files, err := call(ctx, lp.work, callDeadline, func() ([]fs.DirEntry, error) {
		return os.ReadDir(filepath.Join(lp.path, "volumes"))
	})
	if err != nil {
		return reconcile.Result{}, fmt.Errorf("look for copies in %s: %w", lp.what, err)
	}
	suspects := suspects(files, s.markOf(pool))
	if len(suspects) == 0 {
		return reconcile.Result{}, nil
	}
	v, err := s.cfg.DB.View(ctx)
	if err != nil {
		return reconcile.Result{After: sweepRetry}, nil
	}
	moving, err := movingVolumes(v)
	if err != nil {
		return reconcile.Result{}, err
	}
	var errs []error
	var left reconcile.Result
	for _, id := range suspects {
		if !moving[id] {
			errs = append(errs, s.sweepCopy(ctx, v, pool, lp, id))
		} else if pool.Spec.Type != api.PoolDir {
			left.After = sweepSoon
		}
	}
	return left, errors.Join(errs...)
}

// suspects are the volumes whose files are marked.
func suspects(files []fs.DirEntry, mark string) (ids []string) {
	for _, f := range files {
		name, marked := strings.CutSuffix(f.Name(), mark)
		if id, ok := strings.CutSuffix(name, "."+formatQcow2); marked && ok && api.IsID(id) {
			ids = append(ids, id)
		}
	}
	return ids
}

// movingVolumes are those that a migration or a move copies now.
func movingVolumes(v *configdb.View) (map[string]bool, error) {
	ops, err := configdb.Operations.List(v)
	out := map[string]bool{}
	for i := range ops {
		if m := ops[i].Spec.Migration; m != nil {
			for _, id := range m.Volumes {
				out[id] = true
			}
		}
		if m := ops[i].Spec.Move; m != nil {
			for _, o := range m.Volumes {
				out[o.ID] = true
			}
		}
	}
	return out, err
}

// sweepCopy removes the mark of a file that is the volume, and else the file.
func (s *Service) sweepCopy(ctx context.Context, v *configdb.View, pool api.Pool, lp *localPool, id string) error {
	vol, err := configdb.Volumes.Get(v, id)
	if api.IgnoreNotFound(err) != nil {
		return err
	}
	path := volumePath(lp.path, id)
	ours, wrong := call(ctx, lp.work, callDeadline, func() (bool, error) { return s.marked(path, pool) })
	if wrong != nil {
		s.log.Warn("a marked file is left to the node that marked it", "volume", id, "pool", lp.name, "err", wrong)
	}
	if !ours {
		return nil // nor is it when the mark has gone since we looked: it was the other node's
	}
	if err != nil || vol.Spec.Pool != pool.Meta.Name || pool.Spec.Type == api.PoolDir && vol.Spec.Node != s.cfg.NodeName {
		s.log.Info("a copy of a volume that is elsewhere is removed", "volume", id, "pool", lp.name)
		if err := s.driverIn(lp).removeVolume(ctx, id); err != nil {
			return diskError(lp, "remove a volume's copy", err)
		}
	}
	return lp.work.attempt(ctx, callDeadline, func(wanted func() error) error {
		if err := wanted(); err != nil {
			return err
		}
		return remove(path + s.markOf(pool))
	})
}

// severed reports that a volume cannot be a linked clone of its image any more,
// because a migration copied it whole to another node than the image's.
func (s *Service) severed(v *configdb.View, vol *api.Volume) (api.Image, bool) {
	if vol.Spec.Image == "" || vol.Spec.Node != s.cfg.NodeName {
		return api.Image{}, false
	}
	pool, err := configdb.Pools.Find(v, "", vol.Spec.Pool)
	if err != nil || pool.Spec.Type != api.PoolDir {
		return api.Image{}, false
	}
	if moving, err := movingVolumes(v); err != nil || moving[vol.Meta.ID] {
		return api.Image{}, false // it may be taken back yet
	}
	img, err := configdb.Images.Find(v, vol.Meta.Project, vol.Spec.Image)
	return img, err == nil && img.Spec.Node != vol.Spec.Node
}

// sever releases the image of such a volume.
func (s *Service) sever(ctx context.Context, id string) error {
	_, err := configdb.Transact(ctx, s.cfg.DB, actor, txnAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		vol, err := configdb.Volumes.Get(v, id)
		if err != nil {
			return err
		}
		img, ok := s.severed(v, &vol)
		if !ok {
			return errNotOurs
		}
		vol.Spec.Image, vol.Spec.Size = "", max(vol.Spec.Size, vol.Status.Size)
		tx.RequireRevision(configdb.Operations.SpecKey(strings.TrimPrefix(vol.Meta.Owner, "vm/")), 0)
		configdb.Images.Release(tx, img.Meta.ID, api.KindVolume, id)
		return configdb.Volumes.UpdateSpec(v, tx, &vol)
	})
	return ignore(err)
}
