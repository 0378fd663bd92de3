// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/access"
)

// Grant makes a volume's file, which Resolve found, that of one user and lets his
// group readers reach it. Images need no grant: they are files that nobody writes
// to and everybody who reaches them may read, and only readers reach them.
//
// Which files those are is said by the database alone. The header of a volume, which
// names its backing file, was written by a QEMU that may have been taken over.
func (s *Service) Grant(ctx context.Context, v *configdb.View, project, name string, uid, gid, readers int) error {
	vol, err := configdb.Volumes.Find(v, project, name)
	if err != nil {
		return err
	}
	pool, err := configdb.Pools.Find(v, "", vol.Spec.Pool)
	if err != nil {
		return fmt.Errorf("volume %q: %w", vol.Meta.Name, err)
	}
	lp := s.local(pool)
	path := volumePath(lp.path, vol.Meta.ID)
	err = lp.work.do(ctx, callDeadline, func() error {
		changed, err := access.OpenWay(filepath.Dir(path), readers)
		if len(changed) > 0 {
			s.log.Info("the VMs' group may search directories on the way to a pool", "pool", pool.Meta.Name, "group", readers, "directories", changed)
		}
		if err != nil {
			return err
		}
		return access.Give(path, uid, gid, volumeMode)
	})
	if err != nil {
		return api.Errorf(api.CodeRefused, "volume %q cannot be opened by its vm: %w", vol.Meta.Name, err)
	}
	return nil
}

// GrantImage lets a group reach an image's file.
func (s *Service) GrantImage(ctx context.Context, v *configdb.View, project, name string, readers int) error {
	path, _, err := s.ResolveImage(v, project, name)
	if err != nil {
		return err
	}
	img, err := configdb.Images.Find(v, project, name)
	if err != nil {
		return err
	}
	_, lp, err := s.readyPool(v, img.Spec.Pool)
	if err != nil {
		return err
	}
	err = lp.work.do(ctx, callDeadline, func() error {
		_, err := access.OpenWay(filepath.Dir(path), readers)
		return err
	})
	if err != nil {
		return api.Errorf(api.CodeRefused, "image %q cannot be opened by the vm: %w", name, err)
	}
	return nil
}

// volumeMode: the file of one VM.
const volumeMode = 0o600
