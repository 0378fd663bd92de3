// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/rbdname"
)

// rbdDriver keeps a pool in a Ceph cluster. A volume is an image of RBD, volume-<ID>,
// raw; an image of Muster is one, too, image-<ID>, with the protected snapshot that its
// clones are of. What is not complete has a name with tmp- and the ID of its node.
// The pool's directory on this host is only where images are received and examined.
type rbdDriver struct {
	s    *Service
	lp   *localPool
	name string
	spec api.CephSpec
	cmd  cephCmd
}

const (
	rbdVolume = "volume-"
	rbdImage  = "image-"
	rbdTmp    = "tmp-"
	// rbdSnapshot of an image is what its clones are of.
	rbdSnapshot = "muster"
	// rbdFeatures of every image: exclusive-lock says who writes (the storage guard
	// locks him out), object-map and fast-diff make removing and measuring quick.
	rbdFeatures = "layering,exclusive-lock,object-map,fast-diff,deep-flatten"
	// secretID names the secret in the commands of this module, which have one each.
	secretID = "key"
)

func newRBDDriver(s *Service, pool *api.Pool, lp *localPool) *rbdDriver {
	d := &rbdDriver{s: s, lp: lp, name: pool.Meta.Name}
	if pool.Spec.Ceph != nil {
		d.spec = *pool.Spec.Ceph
	}
	id, sealed := pool.Meta.ID, d.spec.SealedKey
	d.cmd = cephCmd{spec: d.spec, key: func() ([]byte, error) { return s.openKey(id, d.name, sealed) }}
	return d
}

// openKey opens the cephx key of a pool.
func (s *Service) openKey(id, name string, sealed []byte) ([]byte, error) {
	if len(sealed) == 0 || s.cfg.OpenKey == nil {
		return nil, api.Errorf(api.CodeRefused, "pool %q has no cephx key; set spec.ceph.key", name)
	}
	key, err := s.cfg.OpenKey(api.KeyLabel(id), sealed)
	if err != nil {
		return nil, api.Errorf(api.CodeInternal, "the cephx key of pool %q cannot be opened: %w; set it again", name, err)
	}
	return key, nil
}

// PoolKey is the secret that QEMU needs to open what is in a pool, by the pool's ID
// (rbdname.Name.Key).
func (s *Service) PoolKey(v *configdb.View, id string) ([]byte, error) {
	pool, err := configdb.Pools.Get(v, id)
	if err != nil {
		return nil, err
	}
	if pool.Spec.Ceph == nil {
		return nil, api.Errorf(api.CodeRefused, "pool %q has no key", pool.Meta.Name)
	}
	return s.openKey(id, pool.Meta.Name, pool.Spec.Ceph.SealedKey)
}

func (d *rbdDriver) nameOf(image, snapshot string) string {
	return rbdname.Name{
		Monitors: d.spec.Monitors, User: d.spec.User, Key: d.lp.id, Pool: d.spec.Pool, Namespace: d.spec.Namespace, Image: image, Snapshot: snapshot,
	}.String()
}

func (d *rbdDriver) volumePath(id string) string    { return d.nameOf(rbdVolume+id, "") }
func (d *rbdDriver) imagePath(id, _ string) string  { return d.nameOf(rbdImage+id, rbdSnapshot) }
func (d *rbdDriver) volumeFormat(volumePlan) string { return formatRaw }
func (d *rbdDriver) at(image string) string         { return d.in() + image }

func (d *rbdDriver) leave(ctx context.Context) error {
	err := os.RemoveAll(d.lp.path)
	if d.lp.swept { // else it was never usable here
		err = errors.Join(err, d.removeNotes(ctx))
	}
	return err
}

func (d *rbdDriver) grantVolume(context.Context, string, int, int, int) error {
	return nil // who has the key may open it
}

func (d *rbdDriver) grantImage(context.Context, string, string, int) error { return nil }

// in is the place of images as the commands name it.
func (d *rbdDriver) in() string {
	if d.spec.Namespace == "" {
		return d.spec.Pool + "/"
	}
	return d.spec.Pool + "/" + d.spec.Namespace + "/"
}

// rbd runs the command in the pool's lane: short ones share its slots with whatever
// else is done in the pool.
func (d *rbdDriver) rbd(ctx context.Context, args ...string) error {
	return d.lp.work.do(ctx, cephDeadline+callDeadline, func() error {
		_, err := d.cmd.run(ctx, cephDeadline, programRBD, args...)
		return err
	})
}

// rbdLong is rbd for what takes as long as the image is large.
func (d *rbdDriver) rbdLong(ctx context.Context, args ...string) error {
	_, err := d.cmd.run(ctx, cephLongDeadline, programRBD, args...)
	return err
}

// rbdInfo is what "rbd info" says.
type rbdInfo struct {
	Size   int64 `json:"size"`
	Parent *struct {
		Image    string `json:"image"`
		Snapshot string `json:"snapshot"`
	} `json:"parent"`
}

// info looks at an image; it is nil if there is none.
func (d *rbdDriver) info(ctx context.Context, image string) (*rbdInfo, error) {
	i, err := call(ctx, d.lp.work, cephDeadline+callDeadline, func() (*rbdInfo, error) {
		var i rbdInfo
		err := d.cmd.json(ctx, cephDeadline, &i, programRBD, "info", d.at(image))
		return &i, err
	})
	if errors.Is(err, syscall.ENOENT) {
		return nil, nil
	}
	return i, err
}

func bytesArg(n int64) string { return strconv.FormatInt(n, 10) + "B" }

// createVolume makes the image, or finds the one that an earlier attempt made.
func (d *rbdDriver) createVolume(ctx context.Context, id string, p volumePlan) error {
	switch {
	case p.content == api.ContentTPM:
		return api.Errorf(api.CodeRefused, "the state of a TPM is a file, and pool %q is of type rbd; choose a pool of type dir or shared for it", d.name)
	case p.source != nil:
		return api.Errorf(api.CodeRefused, "pool %q is of type rbd, where volumes are not copied to; make an image of the volume and a clone of that", d.name)
	}
	have, err := d.info(ctx, rbdVolume+id)
	if err != nil {
		return err
	}
	if have == nil {
		switch {
		case p.content != "":
			err = d.fill(ctx, id, p)
		case p.image != "":
			err = d.rbd(ctx, "clone", d.at(rbdImage+p.image)+"@"+rbdSnapshot, d.at(rbdVolume+id), "--image-feature", rbdFeatures)
		default:
			err = d.rbd(ctx, "create", d.at(rbdVolume+id), "--size", bytesArg(p.size), "--image-feature", rbdFeatures)
		}
		if err != nil && !errors.Is(err, syscall.EEXIST) { // else another executor was faster
			return err
		}
		if have, err = d.info(ctx, rbdVolume+id); err != nil {
			return err
		}
	}
	return d.adopt(ctx, id, have, p)
}

// adopt accepts an image of the volume's name only if it is what the plan would make,
// or a clone that has not got its size yet. The volume was never ready, so no guest has
// written to it.
func (d *rbdDriver) adopt(ctx context.Context, id string, have *rbdInfo, p volumePlan) error {
	parent := ""
	if have != nil && have.Parent != nil {
		parent = strings.TrimPrefix(have.Parent.Image, rbdImage)
	}
	switch {
	case have == nil || parent != p.image || have.Size > p.size || have.Size < p.size && parent == "":
		return api.Errorf(api.CodeRefused, "%s is there already and is not what this volume should be; rename it", d.at(rbdVolume+id))
	case have.Size < p.size:
		return d.growVolume(ctx, id, p.size)
	}
	return nil
}

// fill makes a volume with content: complete under another name, then renamed.
func (d *rbdDriver) fill(ctx context.Context, id string, p volumePlan) error {
	f, err := d.s.template(p.content)
	if err != nil {
		return err
	}
	tmp := d.tmpName(id)
	err = d.upload(ctx, tmp, f.Vars, formatRaw, p.size)
	if err == nil {
		err = d.rbd(ctx, "rename", d.at(tmp), d.at(rbdVolume+id))
	}
	if err != nil {
		d.drop(tmp)
	}
	return err
}

// tmpName is a new name for unfinished work of this node on an object.
func (d *rbdDriver) tmpName(id string) string {
	return rbdTmp + d.s.cfg.NodeID + "-" + id + "-" + rand.Text()[:8]
}

// upload makes an image of a file of this host.
func (d *rbdDriver) upload(ctx context.Context, image, path, format string, size int64) error {
	if err := d.rbd(ctx, "create", d.at(image), "--size", bytesArg(size), "--image-feature", rbdFeatures); err != nil {
		return err
	}
	key, err := d.cmd.keyFile()
	if err != nil {
		return err
	}
	defer key.Close()
	// Not through the lane: its slots are for short calls.
	return d.s.img.runWith(ctx, convertDeadline, 0, &clipped{most: maxOutput}, []*os.File{key},
		"convert", "--object", "secret,id="+secretID+",format=base64,file="+keyFD,
		"-n", "-f", format, "--target-image-opts", fileArg(path), d.options(image))
}

// options are an image as qemu-img opens it (QAPI BlockdevOptionsRbd).
func (d *rbdDriver) options(image string) string {
	n, err := rbdname.Parse(d.nameOf(image, ""))
	if err != nil {
		return "" // cannot be: nameOf made it, and qemu-img would refuse it
	}
	return n.Options(secretID)
}

// drop removes unfinished work, also when the context is over.
func (d *rbdDriver) drop(image string) {
	err := d.rbd(context.Background(), "rm", "--no-progress", d.at(image))
	if err != nil && !errors.Is(err, syscall.ENOENT) {
		d.s.log.Warn("an unfinished image stays until the next start", "pool", d.name, "image", image, "err", err)
	}
}

func (d *rbdDriver) removeVolume(ctx context.Context, id string) error {
	err := d.rbdLong(ctx, "rm", "--no-progress", d.at(rbdVolume+id))
	switch {
	case errors.Is(err, syscall.ENOENT):
		return nil
	case errors.Is(err, syscall.ENOTEMPTY):
		return api.Errorf(api.CodeRefused, "%s has snapshots, which Muster has not made; remove them with: rbd snap purge %s", d.at(rbdVolume+id), d.at(rbdVolume+id))
	case errors.Is(err, syscall.EBUSY):
		return fmt.Errorf("a client of Ceph still has %s open, or ended without a word less than 30 s ago: %w", d.at(rbdVolume+id), err)
	}
	return err
}

func (d *rbdDriver) volumeSize(ctx context.Context, _ *configdb.View, vol *api.Volume) (int64, error) {
	i, err := d.info(ctx, rbdVolume+vol.Meta.ID)
	if err == nil && i == nil {
		err = api.Errorf(api.CodeNotFound, "%s is not there any more", d.at(rbdVolume+vol.Meta.ID))
	}
	if err != nil {
		return 0, err
	}
	return i.Size, nil
}

// growVolume never makes one smaller: rbd refuses that.
func (d *rbdDriver) growVolume(ctx context.Context, id string, to int64) error {
	return d.rbd(ctx, "resize", "--no-progress", "--size", bytesArg(to), d.at(rbdVolume+id))
}

// placeImage copies an inspected file into the cluster once; clones share it from there.
func (d *rbdDriver) placeImage(ctx context.Context, id string, found inspected) (inspected, int64, error) {
	if err := d.removeImage(ctx, id); err != nil {
		return found, 0, err
	}
	var st syscall.Stat_t
	if err := syscall.Stat(found.path, &st); err != nil {
		return found, 0, err
	}
	tmp := d.tmpName(id)
	err := d.upload(ctx, tmp, found.path, found.format, found.virtualSize)
	if err == nil {
		err = d.rbd(ctx, "rename", d.at(tmp), d.at(rbdImage+id))
	}
	if err != nil {
		d.drop(tmp)
		return found, 0, err
	}
	err = d.rbd(ctx, "snap", "create", "--no-progress", d.at(rbdImage+id)+"@"+rbdSnapshot)
	if err == nil {
		err = d.rbd(ctx, "snap", "protect", d.at(rbdImage+id)+"@"+rbdSnapshot)
	}
	found.format = formatRaw
	return found, st.Blocks * 512, err
}

// removeImage is refused by Ceph as long as there are clones.
func (d *rbdDriver) removeImage(ctx context.Context, id string) error {
	have, err := d.info(ctx, rbdImage+id)
	if err != nil || have == nil {
		return err
	}
	snap := d.at(rbdImage+id) + "@" + rbdSnapshot
	err = d.rbd(ctx, "snap", "unprotect", snap)
	if errors.Is(err, syscall.EBUSY) {
		return api.Errorf(api.CodeRefused, "%s has clones; see: rbd children %s", snap, snap)
	}
	if err != nil && !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.EINVAL) { // no snapshot; not protected
		return err
	}
	if err := d.rbd(ctx, "snap", "rm", "--no-progress", snap); err != nil && !errors.Is(err, syscall.ENOENT) {
		return err
	}
	if err := d.rbdLong(ctx, "rm", "--no-progress", d.at(rbdImage+id)); err != nil && !errors.Is(err, syscall.ENOENT) {
		return err
	}
	return nil
}
