// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"fmt"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
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
	err = s.driver(pool).grantVolume(ctx, vol.Meta.ID, uid, gid, readers)
	if err != nil {
		return api.Errorf(api.CodeRefused, "volume %q cannot be opened by its vm: %w", vol.Meta.Name, err)
	}
	return nil
}

// GrantImage lets a group reach an image's file.
func (s *Service) GrantImage(ctx context.Context, v *configdb.View, project, name string, readers int) error {
	if _, _, err := s.ResolveImage(v, project, name); err != nil {
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
	err = s.driverIn(lp).grantImage(ctx, img.Meta.ID, img.Status.Format, readers)
	if err != nil {
		return api.Errorf(api.CodeRefused, "image %q cannot be opened by the vm: %w", name, err)
	}
	return nil
}

// volumeMode: the file of one VM.
const volumeMode = 0o600
