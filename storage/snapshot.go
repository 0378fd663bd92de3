// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"errors"
	"os"
	"slices"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// snapshotDeadline bounds one change of the internal snapshots of a volume. It
// rewrites tables, not data: 1 TiB has 128 MiB of them.
const snapshotDeadline = 5 * time.Minute

// snapshotInfo is one internal snapshot (QAPI SnapshotInfo).
type snapshotInfo struct {
	ID   string `json:"id"`
	Name string `json:"name"`
}

// What qemu-img snapshot does.
const (
	flagCreate = "-c"
	flagApply  = "-a"
	flagDelete = "-d"
)

// CreateSnapshot makes an internal snapshot of a volume that no QEMU has open.
// One of that name that is there already stays: it is of an earlier attempt.
func (s *Service) CreateSnapshot(ctx context.Context, v *configdb.View, project, name, tag string) error {
	return s.changeSnapshot(ctx, v, project, name, tag, flagCreate)
}

// ApplySnapshot takes the content of a volume that no QEMU has open back to a
// snapshot.
func (s *Service) ApplySnapshot(ctx context.Context, v *configdb.View, project, name, tag string) error {
	return s.changeSnapshot(ctx, v, project, name, tag, flagApply)
}

// DeleteSnapshot removes an internal snapshot of a volume that no QEMU has open.
// It is no error if there is none.
func (s *Service) DeleteSnapshot(ctx context.Context, v *configdb.View, project, name, tag string) error {
	return s.changeSnapshot(ctx, v, project, name, tag, flagDelete)
}

// HasSnapshot reports whether a volume that no QEMU has open has an internal
// snapshot of a name.
func (s *Service) HasSnapshot(ctx context.Context, v *configdb.View, project, name, tag string) (bool, error) {
	path, lp, err := s.resolveQcow2(v, project, name)
	if err != nil {
		return false, err
	}
	if _, err := s.honest(ctx, v, lp, path, project, name); err != nil {
		return false, err
	}
	return s.hasSnapshot(ctx, lp, path, tag)
}

func (s *Service) hasSnapshot(ctx context.Context, lp *localPool, path, tag string) (bool, error) {
	info, err := call(ctx, lp.work, infoDeadline+callDeadline, func() (*imageInfo, error) { return s.img.info(ctx, path, formatQcow2) })
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(info.Snapshots, func(i snapshotInfo) bool { return i.Name == tag }), nil
}

// backingFile is a file that a volume keeps its differences to.
type backingFile struct{ path, format string }

// honest refuses a volume whose header names other files than the database: a
// QEMU that was taken over can write there, and qemu-img, which may open every file
// of the host, would. It returns what the volume is a linked clone of, nil if it is
// none.
func (s *Service) honest(ctx context.Context, v *configdb.View, lp *localPool, path, project, name string) (*backingFile, error) {
	vol, err := configdb.Volumes.Find(v, project, name)
	if err != nil {
		return nil, err
	}
	var back *backingFile
	want := ""
	if vol.Spec.Image != "" {
		img, err := configdb.Images.Find(v, project, vol.Spec.Image)
		if err != nil {
			return nil, err
		}
		pool, err := configdb.Pools.Find(v, "", img.Spec.Pool)
		if err != nil {
			return nil, err
		}
		want = backingRef(img.Meta.ID, img.Status.Format)
		back = &backingFile{imagePath(s.poolPath(pool), img.Meta.ID, img.Status.Format), img.Status.Format}
	}
	named, err := call(ctx, lp.work, callDeadline, func() (string, error) {
		f, err := os.Open(path)
		if err != nil {
			return "", err
		}
		defer f.Close()
		return backingOf(f)
	})
	if err == nil && named != want {
		err = api.Errorf(api.CodeRefused, "it names %q as its backing file, and it was made with %q", clip(named), want)
	}
	if api.CodeOf(err) == api.CodeRefused {
		err = api.Errorf(api.CodeRefused, "the header of volume %q is not what Muster wrote: %w; most likely its vm's QEMU was taken over: do not trust that vm", name, err)
	}
	return back, err
}

// resolveQcow2 is Resolve for what needs a qcow2 file.
func (s *Service) resolveQcow2(v *configdb.View, project, name string) (path string, lp *localPool, err error) {
	path, format, err := s.Resolve(v, project, name)
	if err != nil {
		return "", nil, err
	}
	if format != formatQcow2 {
		return "", nil, api.Errorf(api.CodeRefused, "volume %q has the format %s; only qcow2 volumes have snapshots", name, format)
	}
	vol, err := configdb.Volumes.Find(v, project, name)
	if err != nil {
		return "", nil, err
	}
	_, lp, err = s.readyPool(v, vol.Spec.Pool)
	return path, lp, err
}

func (s *Service) changeSnapshot(ctx context.Context, v *configdb.View, project, name, tag, flag string) error {
	path, lp, err := s.resolveQcow2(v, project, name)
	if err != nil {
		return err
	}
	if _, err := s.honest(ctx, v, lp, path, project, name); err != nil {
		return err
	}
	has, err := s.hasSnapshot(ctx, lp, path, tag)
	var exit *exitError
	switch {
	case errors.As(err, &exit) && exit.locked():
		return api.Errorf(api.CodeConflict, "volume %q is in use by another process: %w", name, err)
	case err != nil:
		return diskError(lp, "read the snapshots of volume "+name, err)
	case flag == flagApply && !has:
		return api.Errorf(api.CodeNotFound, "volume %q has no snapshot %q in its file", name, tag)
	case flag == flagCreate && has, flag == flagDelete && !has:
		return nil
	}
	err = s.tool(ctx, lp, snapshotDeadline, func(ctx context.Context) error {
		_, err := s.img.run(ctx, snapshotDeadline, 0, "snapshot", flag, tag, fileArg(path))
		return err
	})
	return diskError(lp, "change the snapshots of volume "+name, err)
}
