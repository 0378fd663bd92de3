// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/access"
)

// dirDriver keeps a pool in a directory: its node's own (dir), or one that all nodes
// see (shared), which check proves. Images and volumes are files in the folders of
// these names.
type dirDriver struct {
	s  *Service
	lp *localPool
}

// backingRef is the image as a volume's header names it: relative, so that a
// shared pool may be mounted elsewhere, and valid from volumes/ and tmp/ alike.
func backingRef(id, format string) string      { return "../images/" + id + "." + format }
func imagePath(root, id, format string) string { return filepath.Join(root, "images", id+"."+format) }
func volumePath(root, id string) string        { return filepath.Join(root, "volumes", id+".qcow2") }

func (d *dirDriver) volumePath(id string) string { return volumePath(d.lp.path, id) }

func (d *dirDriver) imagePath(id, format string) string { return imagePath(d.lp.path, id, format) }

func (d *dirDriver) volumeFormat(p volumePlan) string { return p.format() }

func (d *dirDriver) check(ctx context.Context, v *configdb.View, pool *api.Pool, st api.PoolState) (verdict, error) {
	s, lp := d.s, d.lp
	others, err := s.otherStates(v, pool.Meta.ID)
	if err != nil {
		return verdict{}, err
	}
	look := look{
		path: lp.path, poolID: lp.id, nodeID: s.cfg.NodeID, clean: !lp.cleaned,
		create: pool.Spec.Type == api.PoolDir, shared: pool.Spec.Type == api.PoolShared,
		established: st.Status.Stamp != "",
	}
	for _, o := range others {
		if look.shared {
			look.established = look.established || o.stamp != ""
			look.others = append(look.others, o)
		}
	}
	seen, err := call(ctx, lp.check, checkDeadline, look.run)
	if ctx.Err() != nil {
		return verdict{}, context.Cause(ctx)
	}
	if err != nil {
		return verdict{reason: err.Error(), again: checkInterval}, nil
	}
	lp.cleaned = true
	if !look.shared {
		got := verdict{ready: true, space: seen.space, again: checkInterval}
		if st.Status.Stamp == "" {
			got.stamp = rand.Text() // says from now on that the marker must be there
		}
		return got, nil
	}
	got, err := s.checkShared(ctx, lp, st, look, seen)
	got.root = &seen.root
	return got, err
}

func (d *dirDriver) leave(ctx context.Context) error {
	path, id, node := d.lp.path, d.lp.id, d.s.cfg.NodeID
	return d.lp.check.do(ctx, checkDeadline, func() error { return leavePool(path, id, node) })
}

func (d *dirDriver) free(ctx context.Context) (int64, error) {
	return call(ctx, d.lp.work, callDeadline, func() (int64, error) {
		_, sp, err := statRoot(d.lp.path)
		return int64(sp.free), err
	})
}

// createVolume creates the file, or finds the one that an earlier attempt made.
func (d *dirDriver) createVolume(ctx context.Context, id string, p volumePlan) error {
	s, lp := d.s, d.lp
	final := d.volumePath(id)
	exists, err := call(ctx, lp.work, callDeadline, func() (bool, error) {
		_, err := os.Lstat(final)
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		return err == nil, err
	})
	if err != nil {
		return err
	}
	if exists {
		return d.adoptVolume(ctx, final, p)
	}
	tmp := s.tmpFile(lp, id)
	defer s.discard(lp, tmp)
	if p.source != nil {
		err = s.copyInto(ctx, id, tmp, p)
	} else {
		err = s.tool(ctx, lp, createDeadline, func(ctx context.Context) error { return s.fill(ctx, tmp, p) })
	}
	if err != nil {
		return err
	}
	err = lp.work.do(ctx, createDeadline, func() error {
		if err := os.Chmod(tmp, volumeMode); err != nil {
			return err
		}
		if err := syncFile(tmp); err != nil {
			return err
		}
		return placeFile(tmp, final)
	})
	if errors.Is(err, fs.ErrExist) {
		return d.adoptVolume(ctx, final, p) // another executor was faster
	}
	return err
}

// adoptVolume accepts a file of the volume's name only if it is what the plan
// would make. The volume was never ready, so no guest has written to it.
func (d *dirDriver) adoptVolume(ctx context.Context, path string, p volumePlan) error {
	info, err := call(ctx, d.lp.work, infoDeadline+callDeadline, func() (*imageInfo, error) {
		return d.s.img.info(ctx, path, p.format())
	})
	var exit *exitError
	if err != nil && !errors.As(err, &exit) {
		return err
	}
	if err != nil || info.VirtualSize != p.size || info.Backing != p.backing {
		return api.Errorf(api.CodeRefused, "%s is there already and is not what this volume should be; move it away", path)
	}
	return nil
}

func (d *dirDriver) removeVolume(ctx context.Context, id string) error {
	return d.lp.work.attempt(ctx, callDeadline, func(wanted func() error) error {
		path := d.volumePath(id)
		if err := wanted(); err != nil {
			return err
		}
		if err := remove(path); err != nil {
			return err
		}
		return syncDir(filepath.Dir(path))
	})
}

// volumeSize is the size that the header of the file has. That is read here: qemu-img
// would open what else the header names, and a QEMU may have written it.
func (d *dirDriver) volumeSize(ctx context.Context, v *configdb.View, vol *api.Volume) (int64, error) {
	path := d.volumePath(vol.Meta.ID)
	if _, err := d.s.honest(ctx, v, d.lp, path, vol.Meta.Project, vol.Meta.Name); err != nil {
		return 0, err
	}
	return call(ctx, d.lp.work, callDeadline, func() (int64, error) {
		f, err := os.Open(path)
		if err != nil {
			return 0, err
		}
		defer f.Close()
		return sizeIn(f)
	})
}

func (d *dirDriver) growVolume(ctx context.Context, id string, to int64) error {
	path := d.volumePath(id)
	return d.s.tool(ctx, d.lp, createDeadline, func(ctx context.Context) error { return d.s.img.grow(ctx, path, to) })
}

func (d *dirDriver) grantVolume(ctx context.Context, id string, uid, gid, readers int) error {
	return d.lp.work.do(ctx, callDeadline, func() error {
		path := d.volumePath(id)
		changed, err := access.OpenWay(filepath.Dir(path), readers)
		if len(changed) > 0 {
			d.s.log.Info("the VMs' group may search directories on the way to a pool", "pool", d.lp.name, "group", readers, "directories", changed)
		}
		if err != nil {
			return err
		}
		return access.Give(path, uid, gid, volumeMode)
	})
}

func (d *dirDriver) grantImage(ctx context.Context, id, format string, readers int) error {
	return d.lp.work.do(ctx, callDeadline, func() error {
		_, err := access.OpenWay(filepath.Dir(d.imagePath(id, format)), readers)
		return err
	})
}

// placeImage makes the file read-only and gives it its final name. A file of
// that name is from an attempt whose report was lost: nothing can use it,
// since the image was never ready, so it makes room.
func (d *dirDriver) placeImage(ctx context.Context, id string, found inspected) (inspected, int64, error) {
	if err := d.removeImage(ctx, id); err != nil {
		return found, 0, err
	}
	final := d.imagePath(id, found.format)
	size, err := call(ctx, d.lp.work, createDeadline, func() (int64, error) {
		if err := os.Chmod(found.path, 0o444); err != nil {
			return 0, err
		}
		if err := syncFile(found.path); err != nil {
			return 0, err
		}
		var st syscall.Stat_t
		if err := syscall.Stat(found.path, &st); err != nil {
			return 0, err
		}
		return st.Blocks * 512, placeFile(found.path, final)
	})
	return found, size, err
}

func (d *dirDriver) removeImage(ctx context.Context, id string) error {
	return d.lp.work.do(ctx, callDeadline, func() error {
		return errors.Join(remove(d.imagePath(id, formatQcow2)), remove(d.imagePath(id, formatRaw)))
	})
}
