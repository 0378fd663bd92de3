// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"fmt"
	"os"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/uefi"
)

// What a VM's machine remembers is a volume, too: UEFI variables are a qcow2
// file, so that snapshots go into it as into disks, and a TPM's state is the
// file that swtpm writes, at first an empty one. Both have the name and the
// place of any volume; only root may read them.

// contentPlan is the plan for a volume that is no disk.
func (s *Service) contentPlan(content api.VolumeContent) (volumePlan, error) {
	p := volumePlan{content: content}
	if content == api.ContentTPM {
		return p, nil
	}
	f, err := s.template(content)
	if err != nil {
		return p, pendingError{err.Error()} // somebody may install it
	}
	p.size = f.VarsSize
	return p, nil
}

// template is the firmware of this node whose variables the volume begins with.
func (s *Service) template(content api.VolumeContent) (uefi.Firmware, error) {
	return uefi.Find(s.cfg.FirmwareDirs, content == api.ContentUEFISecure, 0)
}

// format of the file.
func (p volumePlan) format() string {
	if p.content == api.ContentTPM {
		return formatRaw
	}
	return formatQcow2
}

// fill makes the file of a volume at a path where there is none.
func (s *Service) fill(ctx context.Context, path string, p volumePlan) error {
	switch p.content {
	case "":
		return s.img.create(ctx, path, p.backing, p.backingFormat, p.size)
	case api.ContentTPM:
		f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return fmt.Errorf("make the state of a TPM: %w", err)
		}
		return f.Close()
	}
	f, err := s.template(p.content)
	if err != nil {
		return err
	}
	return s.img.convert(ctx, f.Vars, formatRaw, path)
}

// ResolveImage returns the absolute path and the format of an image that this
// node may open now.
func (s *Service) ResolveImage(v *configdb.View, project, name string) (path, format string, err error) {
	img, err := configdb.Images.Find(v, project, name)
	if err != nil {
		return "", "", err
	}
	pool, err := configdb.Pools.Find(v, "", img.Spec.Pool)
	if err != nil {
		return "", "", fmt.Errorf("image %q: %w", img.Meta.Name, err)
	}
	switch {
	case img.Meta.Deleting():
		return "", "", api.Errorf(api.CodeRefused, "image %q is being deleted", img.Meta.Name)
	case img.Status.Phase != api.StorageReady:
		return "", "", api.Errorf(api.CodeRefused, "image %q is not ready: it is %s", img.Meta.Name, img.Status.Phase)
	case pool.Spec.Type == api.PoolDir && img.Spec.Node != s.cfg.NodeName:
		return "", "", api.Errorf(api.CodeRefused, "image %q is in the pool %q of node %s, not of node %s", img.Meta.Name, pool.Meta.Name, img.Spec.Node, s.cfg.NodeName)
	}
	if err := s.poolUsable(v, pool); err != nil {
		return "", "", fmt.Errorf("image %q: %w", img.Meta.Name, err)
	}
	return s.driver(pool).imagePath(img.Meta.ID, img.Status.Format), img.Status.Format, nil
}
