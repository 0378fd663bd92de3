// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"errors"
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
	return s.hasSnapshot(ctx, v, lp, path, project, name, tag)
}

func (s *Service) hasSnapshot(ctx context.Context, v *configdb.View, lp *localPool, path, project, name, tag string) (bool, error) {
	info, err := call(ctx, lp.work, infoDeadline+callDeadline, func() (*imageInfo, error) { return s.img.info(ctx, path, formatQcow2) })
	if err != nil {
		return false, err
	}
	vol, err := configdb.Volumes.Find(v, project, name)
	if err != nil {
		return false, err
	}
	if _, err := s.honest(v, &vol, info); err != nil {
		return false, err
	}
	return slices.ContainsFunc(info.Snapshots, func(i snapshotInfo) bool { return i.Name == tag }), nil
}

// backingFile is a file that a volume keeps its differences to.
type backingFile struct{ path, format string }

// honest refuses a volume whose header names other files than the database: a
// QEMU that was taken over can write there, and qemu-img, which may read every file
// of the host, would open them. It returns what the volume is a linked clone of.
func (s *Service) honest(v *configdb.View, vol *api.Volume, info *imageInfo) (*backingFile, error) {
	var back *backingFile
	want := ""
	if vol.Spec.Image != "" {
		img, err := configdb.Images.Find(v, vol.Meta.Project, vol.Spec.Image)
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
	switch d := info.Specific; {
	case info.Backing != want:
		return nil, api.Errorf(api.CodeRefused, "the file of volume %q says that it is a clone of %q, and it was made as one of %q: somebody wrote to its header, most likely its vm's QEMU; do not trust that vm", vol.Meta.Name, clip(info.Backing), want)
	case d != nil && d.Data.DataFile != "":
		return nil, api.Errorf(api.CodeRefused, "the file of volume %q says that its data are in %q: somebody wrote to its header, most likely its vm's QEMU; do not trust that vm", vol.Meta.Name, clip(d.Data.DataFile))
	}
	return back, nil
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
	has, err := s.hasSnapshot(ctx, v, lp, path, project, name, tag)
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
