// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// imageOf adds an image that is to be made of a volume, as a request does.
func (k *kit) imageOf(name, pool string, vol api.Volume, snapshot string) api.Image {
	k.t.Helper()
	img := api.Image{Meta: api.NewMeta(api.KindImage, "", name), Spec: api.ImageSpec{Pool: pool, Node: vol.Spec.Node, SourceVolume: vol.Meta.Name, SourceSnapshot: snapshot}}
	if err := img.Prepare(); err != nil {
		k.t.Fatal(err)
	}
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		p, err := configdb.Pools.Find(v, "", pool)
		if err != nil {
			return err
		}
		configdb.Pools.Refer(tx, p.Meta.ID, api.KindImage, img.Meta.ID)
		if snapshot == "" {
			configdb.Volumes.Refer(tx, vol.Meta.ID, api.KindImage, img.Meta.ID)
		}
		return configdb.Images.Create(tx, &img)
	})
	return img
}

// written makes a linked clone of an image, with something of its own in it.
func (k *kit) written(h *host, name string) (vol api.Volume, path string) {
	k.t.Helper()
	k.upload(h, "base-"+name, "local", "8M")
	vol = k.volume(name, api.VolumeSpec{Image: "base-" + name, Node: h.cfg.NodeName})
	vol = k.untilVolume(vol.Meta.ID, api.StorageReady)
	path, _, err := h.Resolve(k.db.Local(), "", name)
	if err != nil {
		k.t.Fatal(err)
	}
	qemuIO(k.t, path, "write -P 7 2M 64k")
	return vol, path
}

func sameContent(t *testing.T, a, b string) {
	t.Helper()
	if out, err := exec.Command("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", a, b).CombinedOutput(); err != nil {
		t.Errorf("%s and %s: %v: %s", a, b, err, out)
	}
}

func TestAnImageIsMadeOfAVolumeOfNoVM(t *testing.T) {
	k, h, root := local(t)
	other := k.pool("other", api.PoolSpec{Type: api.PoolShared, Path: serviceDir(t)})
	k.untilReady(other, "m1")
	vol, path := k.written(h, "src")
	for _, pool := range []string{"local", "other"} {
		img := k.imageOf("template-"+pool, pool, vol, "")
		got := k.untilImage(img.Meta.ID, api.StorageReady)
		file := imageFileOf(t, h, got.Meta.Name)
		sameContent(t, path, file)
		st := got.Status
		if st.VirtualSize != 8*api.MiB || st.Format != "qcow2" || st.SHA256 != sum(read(t, file)) || st.Size == 0 || st.Progress != 100 {
			t.Errorf("%+v", st)
		}
		info, err := h.img.info(t.Context(), file, "qcow2")
		if err != nil || info.Backing != "" || len(info.Snapshots) != 0 {
			t.Errorf("it is not independent: %+v, %v", info, err)
		}
		if mode, _ := os.Stat(file); mode.Mode().Perm() != 0o444 {
			t.Errorf("mode %v", mode.Mode())
		}
		k.until("the volume is let go of", func(v *configdb.View) bool { return len(configdb.Volumes.Referrers(v, vol.Meta.ID)) == 0 })
		_, err = h.Upload(t.Context(), img.Meta.ID, bytes.NewReader([]byte("x")), 1, "")
		wantCode(t, err, api.CodeRefused, "copied from volume src")
	}
	// Clones of it do not need what it was made of.
	k.deleteVolume(vol.Meta.ID)
	k.untilGone(configdb.Volumes.SpecKey(vol.Meta.ID))
	clone := k.volume("clone", api.VolumeSpec{Image: "template-local", Node: "m1"})
	k.untilVolume(clone.Meta.ID, api.StorageReady)
	if left := files(t, root, "tmp"); len(left) > 0 {
		t.Errorf("left in tmp: %v", left)
	}
}

func TestAnImageIsMadeOfASnapshot(t *testing.T) {
	k, h, root := local(t)
	vol, path := k.written(h, "src")
	snap := k.taken(vol, api.SnapshotCreating)
	img := k.imageOf("template", "local", vol, snap.Meta.ID)
	if got := k.untilImage(img.Meta.ID, api.StoragePending); !strings.Contains(got.Status.Message, "waiting for snapshot") && got.Status.Message != "" {
		t.Errorf("%+v", got.Status)
	}
	if by, busy := configdb.CopyOf(k.db.Local(), snap.Meta.ID); !busy || by != "image template" {
		t.Errorf("nobody knows that the snapshot is to be copied: %q", by)
	}
	if err := h.CreateSnapshot(t.Context(), k.db.Local(), "", "src", snap.Status.Tag); err != nil {
		t.Fatal(err)
	}
	qemuIO(t, path, "write -P 9 2M 64k") // is not in it
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		s, err := configdb.Snapshots.Get(v, snap.Meta.ID)
		if err != nil {
			return err
		}
		s.Status.Phase = api.SnapshotReady
		return configdb.Snapshots.UpdateStatus(v, tx, &s)
	})
	k.untilImage(img.Meta.ID, api.StorageReady)
	if out := qemuIO(t, imageFileOf(t, h, "template"), "read -P 7 2M 64k"); strings.Contains(out, "failed") {
		t.Error(out)
	}
	if _, busy := configdb.CopyOf(k.db.Local(), snap.Meta.ID); busy {
		t.Error("the snapshot is kept for nothing")
	}
	gone := k.imageOf("none", "local", vol, api.NewID())
	if got := k.untilImage(gone.Meta.ID, api.StorageFailed); !strings.Contains(got.Status.Message, "is gone, or could not be taken") {
		t.Errorf("%+v", got.Status)
	}
	if left := files(t, root, "tmp"); len(left) > 0 {
		t.Errorf("left in tmp: %v", left)
	}
}

// What a guest's QEMU may have written into the header is not believed.
func TestNoImageIsMadeOfAVolumeThatNamesAnotherFile(t *testing.T) {
	k, h, root := local(t)
	vol, path := k.written(h, "src")
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, bytes.Repeat([]byte("host"), 256<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	qemu(t, "rebase", "-u", "-f", "qcow2", "-b", secret, "-F", "raw", path)
	img := k.imageOf("template", "local", vol, "")
	if got := k.untilImage(img.Meta.ID, api.StorageFailed); !strings.Contains(got.Status.Message, "do not trust that vm") {
		t.Errorf("%+v", got.Status)
	}
	if left := files(t, root, "tmp"); len(left) > 0 || len(files(t, root, "images")) != 1 {
		t.Errorf("left: %v, %v", left, files(t, root, "images"))
	}
	k.until("the volume is let go of", func(v *configdb.View) bool { return len(configdb.Volumes.Referrers(v, vol.Meta.ID)) == 0 })
	k.deleteImage(img.Meta.ID)
	k.untilGone(configdb.Images.SpecKey(img.Meta.ID))
}

// A full pool is said, and the image is made when there is space.
func TestAnImageOfAVolumeWaitsForSpace(t *testing.T) {
	k, h, _ := local(t)
	root := smallDisk(t, "8m")
	small := k.pool("small", api.PoolSpec{Type: api.PoolDir, Path: root})
	k.untilReady(small, "m1")
	vol, path := k.written(h, "src")
	noise := make([]byte, 3<<20) // twice in the pool at first, and once in the volume
	_, _ = rand.NewChaCha8([32]byte{3}).Read(noise)
	raw := filepath.Join(t.TempDir(), "noise")
	fill := filepath.Join(root, "volumes", "fill")
	for f, b := range map[string][]byte{raw: noise, fill: append(noise, noise...)} {
		if err := os.WriteFile(f, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	qemuIO(t, path, "write -s "+raw+" 3M 3M")
	img := k.imageOf("template", "small", vol, "")
	got := k.untilImage(img.Meta.ID, api.StorageFailed)
	if c := got.Status.Conditions[0]; c.Reason != "StorageFull" || !strings.Contains(got.Status.Message, "choose another pool") {
		t.Errorf("%+v", got.Status)
	}
	if left := append(files(t, root, "tmp"), files(t, root, "images")...); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	k.untilImage(img.Meta.ID, api.StorageReady) // the back-off tries again
}

// An image that is deleted while it is copied goes, with what there is of it.
func TestAnImageThatIsDeletedWhileItIsCopiedGoes(t *testing.T) {
	k, h, root := local(t)
	vol, _ := k.written(h, "src")
	for range maxCopies { // it waits for its turn, so that it is deleted before
		if !h.copies.tryTake() {
			t.Fatal("no turn is free")
		}
	}
	img := k.imageOf("template", "local", vol, "")
	k.until("it waits", func(v *configdb.View) bool {
		o, err := configdb.Images.Get(v, img.Meta.ID)
		return err == nil && strings.Contains(o.Status.Message, "copies 2 volumes already")
	})
	k.deleteImage(img.Meta.ID)
	k.untilGone(configdb.Images.SpecKey(img.Meta.ID))
	if refs := configdb.Volumes.Referrers(k.db.Local(), vol.Meta.ID); len(refs) > 0 {
		t.Errorf("the volume is held by %v", refs)
	}
	for range maxCopies {
		h.copies.give()
	}
	// One that is copied already: it is told by the look that follows every copy.
	f := follower{wanted: imageWanted(img.Meta.ID)}
	err := h.followed(t.Context(), f, func(ctx context.Context, _ *progressReader) error {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(patience):
			return nil
		}
	})
	if !errors.Is(err, errUnwanted) {
		t.Errorf("a copy of nothing went on: %v", err)
	}
	if left := files(t, root, "tmp"); len(left) > 0 {
		t.Errorf("left in tmp: %v", left)
	}
}
