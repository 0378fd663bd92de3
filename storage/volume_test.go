// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// upload makes a ready image.
func (k *kit) upload(h *host, name, pool, size string) api.Image {
	k.t.Helper()
	b := content(k.t, size)
	img := k.image(name, api.ImageSpec{Pool: pool, Node: h.cfg.NodeName})
	if _, err := h.Upload(k.t.Context(), img.Meta.ID, bytes.NewReader(b), int64(len(b)), ""); err != nil {
		k.t.Fatal(err)
	}
	return img
}

func TestVolumeLife(t *testing.T) {
	k, h, root := local(t)
	img := k.upload(h, "tiny", "local", "8M")
	clone := k.volume("clone", api.VolumeSpec{Image: "tiny", Node: "m1"})
	empty := k.volume("empty", api.VolumeSpec{Size: api.GiB, Node: "m1"})
	larger := k.volume("larger", api.VolumeSpec{Image: "tiny", Size: 64 * api.MiB, Node: "m1"})
	for _, c := range []struct {
		vol     api.Volume
		size    api.Size
		backing string
	}{{clone, 8 * api.MiB, "../images/" + img.Meta.ID + ".qcow2"}, {empty, api.GiB, ""}, {larger, 64 * api.MiB, "../images/" + img.Meta.ID + ".qcow2"}} {
		got := k.untilVolume(c.vol.Meta.ID, api.StorageReady)
		if got.Status.Size != c.size || got.Status.Format != "qcow2" {
			t.Errorf("%s: status %+v", c.vol.Meta.Name, got.Status)
		}
		path, format, err := h.Resolve(k.db.Local(), "", c.vol.Meta.Name)
		if err != nil || format != "qcow2" || path != filepath.Join(root, "volumes", c.vol.Meta.ID+".qcow2") {
			t.Fatalf("resolve: %s %s %v", path, format, err)
		}
		info, err := h.img.info(t.Context(), path, "qcow2")
		if err != nil || info.VirtualSize != int64(c.size) || info.Backing != c.backing {
			t.Errorf("%s: %+v, %v", c.vol.Meta.Name, info, err)
		}
	}
	// The image waits for its clones, also when the wish to delete it came in.
	k.deleteImage(img.Meta.ID)
	if got := k.untilImage(img.Meta.ID, api.StorageDeleting); !strings.Contains(got.Status.Message, "waiting for volume/") {
		t.Errorf("message %q", got.Status.Message)
	}
	for _, v := range []api.Volume{clone, empty, larger} {
		k.deleteVolume(v.Meta.ID)
		k.untilGone(configdb.Volumes.SpecKey(v.Meta.ID))
	}
	k.untilGone(configdb.Images.SpecKey(img.Meta.ID))
	if left := slices.Concat(files(t, root, "tmp"), files(t, root, "images"), files(t, root, "volumes")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if !k.db.Local().Empty(configdb.Root + "ref/") {
		t.Error("references are left")
	}
	if _, _, err := h.Resolve(k.db.Local(), "", "clone"); api.CodeOf(err) != api.CodeNotFound {
		t.Errorf("resolve of a deleted volume: %v", err)
	}
}

func TestVolumeInUseIsKept(t *testing.T) {
	k, _, root := local(t)
	vol := k.volume("v", api.VolumeSpec{Size: api.MiB, Node: "m1"})
	k.untilVolume(vol.Meta.ID, api.StorageReady)
	k.txn(func(_ *configdb.View, tx *configdb.Txn) error {
		configdb.Volumes.Refer(tx, vol.Meta.ID, api.KindVM, "x")
		return nil
	})
	k.deleteVolume(vol.Meta.ID)
	got := k.untilVolume(vol.Meta.ID, api.StorageDeleting)
	if !strings.Contains(got.Status.Message, "waiting for vm/x") || len(files(t, root, "volumes")) != 1 {
		t.Errorf("message %q, files %v", got.Status.Message, files(t, root, "volumes"))
	}
	k.txn(func(_ *configdb.View, tx *configdb.Txn) error {
		configdb.Volumes.Release(tx, vol.Meta.ID, api.KindVM, "x")
		return nil
	})
	k.untilGone(configdb.Volumes.SpecKey(vol.Meta.ID))
	if left := files(t, root, "volumes"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestVolumeRefusals(t *testing.T) {
	k, h, root := local(t)
	p2 := k.pool("second", api.PoolSpec{Type: api.PoolDir, Path: filepath.Join(serviceDir(t), "a:b,c")})
	k.untilReady(p2, "m1")
	k.upload(h, "tiny", "local", "8M")
	for i, c := range []struct {
		spec api.VolumeSpec
		says string
	}{
		{api.VolumeSpec{Image: "tiny", Pool: "second", Node: "m1"}, "choose that pool"},
		{api.VolumeSpec{Image: "tiny", Size: api.MiB, Node: "m1"}, "less than the 8 MiB"},
		{api.VolumeSpec{Image: "nope", Node: "m1"}, "\"nope\" does not exist"},
	} {
		vol := k.volume("v"+string(rune('a'+i)), c.spec)
		if got := k.untilVolume(vol.Meta.ID, api.StorageFailed); !strings.Contains(got.Status.Message, c.says) {
			t.Errorf("message %q does not say %q", got.Status.Message, c.says)
		}
		if _, _, err := h.Resolve(k.db.Local(), "", vol.Meta.Name); api.CodeOf(err) != api.CodeRefused {
			t.Errorf("resolve: %v", err)
		}
	}
	// A path with ':' and ',' is a path.
	vol := k.volume("odd", api.VolumeSpec{Pool: "second", Size: api.MiB, Node: "m1"})
	k.untilVolume(vol.Meta.ID, api.StorageReady)
	// A clone waits for an image that is still to come.
	img := k.image("later", api.ImageSpec{Node: "m1"})
	vol = k.volume("waits", api.VolumeSpec{Image: "later", Node: "m1"})
	if got := k.untilVolume(vol.Meta.ID, api.StoragePending); got.Status.Message == "" {
		k.until("a message", func(v *configdb.View) bool {
			o, err := configdb.Volumes.Get(v, vol.Meta.ID)
			return err == nil && strings.Contains(o.Status.Message, "waiting for image \"later\"")
		})
	}
	b := content(t, "8M")
	if _, err := h.Upload(t.Context(), img.Meta.ID, bytes.NewReader(b), int64(len(b)), ""); err != nil {
		t.Fatal(err)
	}
	k.untilVolume(vol.Meta.ID, api.StorageReady)
	if left := files(t, root, "tmp"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestMissingQemuImgIsSaid(t *testing.T) {
	k := newKit(t, "m1")
	p := k.pool("local", api.PoolSpec{Type: api.PoolDir})
	cfg := k.config("m1")
	cfg.QemuImg = filepath.Join(t.TempDir(), "qemu-img")
	k.nodes["m1"].Service = New(cfg)
	k.start("m1")
	k.untilReady(p, "m1")
	vol := k.volume("v", api.VolumeSpec{Size: api.MiB, Node: "m1"})
	got := k.untilVolume(vol.Meta.ID, api.StorageFailed)
	if !strings.Contains(got.Status.Message, "install the package qemu-utils") || got.Status.Conditions[0].Reason != "Unsupported" {
		t.Errorf("status %+v", got.Status)
	}
	// It goes on as soon as the program is there.
	real, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, cfg.QemuImg); err != nil {
		t.Fatal(err)
	}
	k.untilVolume(vol.Meta.ID, api.StorageReady)
}

func TestVolumeNeverReplacesAFile(t *testing.T) {
	k := newKit(t, "m1")
	p := k.pool("local", api.PoolSpec{Type: api.PoolDir})
	k.start("m1")
	k.untilReady(p, "m1")
	h := k.nodes["m1"]
	h.stop()
	root := filepath.Join(h.dir, "pool")
	used := k.volume("used", api.VolumeSpec{Size: api.MiB, Node: "m1"})
	left := k.volume("left", api.VolumeSpec{Size: api.MiB, Node: "m1"})
	if err := os.WriteFile(volumePath(root, used.Meta.ID), []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	qemu(t, "create", "-f", "qcow2", volumePath(root, left.Meta.ID), "1M") // an attempt whose report was lost
	k.restart("m1", nil)
	if got := k.untilVolume(used.Meta.ID, api.StorageFailed); !strings.Contains(got.Status.Message, "move it away") {
		t.Errorf("message %q", got.Status.Message)
	}
	if got := read(t, volumePath(root, used.Meta.ID)); string(got) != "precious" {
		t.Errorf("the file is now %q", got)
	}
	k.untilVolume(left.Meta.ID, api.StorageReady)
}

func TestReassign(t *testing.T) {
	k := newKit(t, "m1", "m2", "m3")
	shared := serviceDir(t)
	nfs := k.pool("nfs", api.PoolSpec{Type: api.PoolShared, Path: shared})
	dir := k.pool("local", api.PoolSpec{Type: api.PoolDir})
	k.start("m1", "m2", "m3")
	k.untilReady(nfs, "m1", "m2", "m3")
	k.untilReady(dir, "m1", "m2", "m3")
	h := k.nodes["m1"]
	img := k.upload(h, "tiny", "nfs", "8M")
	used := k.volume("used", api.VolumeSpec{Pool: "nfs", Image: "tiny", Node: "m1"})
	own := k.volume("own", api.VolumeSpec{Size: api.MiB, Node: "m1"})
	k.untilVolume(used.Meta.ID, api.StorageReady)
	k.untilVolume(own.Meta.ID, api.StorageReady)
	h.stop()
	pending := k.volume("pending", api.VolumeSpec{Pool: "nfs", Image: "tiny", Node: "m1"})
	k.deleteVolume(own.Meta.ID)
	k.setPhase("m1", api.NodeLost)
	k.db.SetTerm(7)
	m2 := k.nodes["m2"]
	if err := m2.Reassign(t.Context(), 6); err != nil { // of an old term: nothing happens
		t.Fatal(err)
	}
	if got := k.untilVolume(pending.Meta.ID, ""); got.Spec.Node != "m1" {
		t.Errorf("an old leader moved it to %s", got.Spec.Node)
	}
	if err := m2.Reassign(t.Context(), 7); err != nil {
		t.Fatal(err)
	}
	k.untilVolume(pending.Meta.ID, api.StorageReady)
	if got := k.untilVolume(used.Meta.ID, api.StorageReady); got.Spec.Node != "m1" {
		t.Errorf("a ready volume was moved to %s", got.Spec.Node)
	}
	for _, v := range []api.Volume{pending, used} {
		k.deleteVolume(v.Meta.ID)
	}
	if err := m2.Reassign(t.Context(), 7); err != nil {
		t.Fatal(err)
	}
	k.untilGone(configdb.Volumes.SpecKey(used.Meta.ID))
	k.untilGone(configdb.Volumes.SpecKey(pending.Meta.ID))
	k.deleteImage(img.Meta.ID)
	if err := m2.Reassign(t.Context(), 7); err != nil {
		t.Fatal(err)
	}
	k.untilGone(configdb.Images.SpecKey(img.Meta.ID))
	if left := slices.Concat(files(t, shared, "images"), files(t, shared, "volumes")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	// The lost node's own volume goes only when the node is removed.
	k.untilVolume(own.Meta.ID, api.StorageReady)
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Find(v, "", "m1")
		configdb.Nodes.Delete(tx, &n)
		return err
	})
	if err := m2.Reassign(t.Context(), 7); err != nil {
		t.Fatal(err)
	}
	k.untilGone(configdb.Volumes.SpecKey(own.Meta.ID))
	k.untilGone(configdb.PoolStates.SpecKey(nfs.Meta.ID + "." + h.id))
	rev := k.db.Local().Revision()
	if err := m2.Reassign(t.Context(), 7); err != nil || k.db.Local().Revision() != rev {
		t.Errorf("a pass with nothing to do wrote something (%v)", err)
	}
}

func TestHungCallsHaveDeadlinesAndBounds(t *testing.T) {
	l := newLane("pool \"nfs\" at /x", 2)
	stuck := make(chan struct{})
	for range 2 {
		err := l.do(t.Context(), time.Millisecond, func() error { <-stuck; return nil })
		wantCode(t, err, api.CodeTimeout, "nfs", "has not answered")
	}
	err := l.do(t.Context(), time.Millisecond, func() error { t.Error("a third call was let in"); return nil })
	wantCode(t, err, api.CodeTimeout)
	if !l.hangs(time.Millisecond) {
		t.Error("the lane is free though both calls hang")
	}
	if l.hangs(time.Minute) {
		t.Error("calls that have not had a minute hang for one")
	}
	close(stuck)
	if err := l.do(t.Context(), patience, func() error { return errors.New("mine") }); err == nil || err.Error() != "mine" {
		t.Errorf("after the hang: %v", err)
	}
	if l.hangs(0) {
		t.Error("the lane hangs though its calls have ended")
	}
}

// Work whose context has ended is over for its caller, who may give the volume away: so is
// the program, unless it cannot be killed.
func TestAProgramIsGoneWhenItsWorkIs(t *testing.T) {
	s, lp := &Service{}, &localPool{work: newLane("p", 1)}
	ctx, cancel := context.WithCancel(t.Context())
	var gone atomic.Bool
	err := s.tool(ctx, lp, time.Minute, func(ctx context.Context) error {
		cancel()
		<-ctx.Done()
		time.Sleep(50 * time.Millisecond) // it is killed, and dies
		gone.Store(true)
		return errors.New("signal: killed")
	})
	if !gone.Load() || !errors.Is(err, context.Canceled) {
		t.Errorf("gone %v, %v", gone.Load(), err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	stuck := make(chan struct{})
	defer close(stuck)
	err = s.tool(ctx, lp, time.Minute, func(context.Context) error {
		cancel()
		<-stuck
		return nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("one that cannot be killed: %v", err)
	}
}

func TestACallThatPanicsIsAnErrorAndGivesItsPlaceBack(t *testing.T) {
	l := newLane("pool \"p\" at /x", 1)
	for range 3 {
		if err := l.do(t.Context(), time.Minute, func() error { panic("a bug") }); err == nil || !strings.Contains(err.Error(), "a bug") {
			t.Fatalf("error %v", err)
		}
	}
}
