// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// driver is what the type of a pool decides: how the content of one pool of this node
// is made, looked at and removed, and how QEMU opens it. DESIGN.md has the rules. What
// names a volume or an image is its ID; whose it is, and what it should be, is the
// caller's to know. Snapshots and moves are of files, see snapshot.go and move.go.
type driver interface {
	// check looks whether the pool can be used here. What is wrong with it is a
	// verdict, not an error.
	check(ctx context.Context, v *configdb.View, pool *api.Pool, st api.PoolState) (verdict, error)
	// leave removes what this module put beside the user's data, when the pool was
	// deleted.
	leave(ctx context.Context) error
	// free is how many bytes are left for an image that is being received.
	free(ctx context.Context) (int64, error)
	volumeDriver
	imageDriver
}

// volumeDriver makes volumes and says how QEMU opens them.
type volumeDriver interface {
	// createVolume makes a volume as planned, complete or not at all, or takes the
	// one that an earlier attempt made. Another one is refused.
	createVolume(ctx context.Context, id string, p volumePlan) error
	// volumeFormat is what such a volume is for QEMU.
	volumeFormat(p volumePlan) string
	// removeVolume is no error if there is none.
	removeVolume(ctx context.Context, id string) error
	// volumeSize is what a guest sees, also of a volume that a QEMU has open.
	volumeSize(ctx context.Context, v *configdb.View, vol *api.Volume) (int64, error)
	// growVolume enlarges one that no QEMU has open.
	growVolume(ctx context.Context, id string, to int64) error
	// volumePath is the absolute path of a file, or in its place a name that QEMU's
	// driver opens (internal/rbdname).
	volumePath(id string) string
	// grantVolume makes a volume one user's, and lets the group readers reach it.
	grantVolume(ctx context.Context, id string, uid, gid, readers int) error
}

// imageDriver keeps images.
type imageDriver interface {
	// placeImage makes an image of an inspected file, and returns what it is now and
	// how many bytes it takes.
	placeImage(ctx context.Context, id string, found inspected) (inspected, int64, error)
	// removeImage is no error if there is none.
	removeImage(ctx context.Context, id string) error
	// imagePath is like volumePath.
	imagePath(id, format string) string
	// grantImage lets the group readers reach an image.
	grantImage(ctx context.Context, id, format string, readers int) error
}

// driverOf makes the driver of a pool.
func (s *Service) driverOf(pool *api.Pool, lp *localPool) driver {
	if pool.Spec.Type == api.PoolRBD {
		return newRBDDriver(s, pool, lp)
	}
	return &dirDriver{s: s, lp: lp}
}
