// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

func qemuIO(t *testing.T, path, what string) string {
	t.Helper()
	out, err := exec.Command("qemu-io", "-f", "qcow2", "-c", what, path).CombinedOutput()
	if err != nil {
		t.Fatalf("qemu-io (install qemu-utils): %v: %s", err, out)
	}
	return string(out)
}

func TestInternalSnapshotsOfAVolume(t *testing.T) {
	k, h, _ := local(t)
	vol := k.volume("v", api.VolumeSpec{Size: api.MiB, Node: "m1"})
	k.untilVolume(vol.Meta.ID, api.StorageReady)
	v := k.db.Local()
	path, _, err := h.Resolve(v, "", "v")
	if err != nil {
		t.Fatal(err)
	}
	do := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	qemuIO(t, path, "write -P 1 0 64k")
	do("create", h.CreateSnapshot(t.Context(), v, "", "v", "a"))
	qemuIO(t, path, "write -P 2 0 64k")
	do("create again", h.CreateSnapshot(t.Context(), v, "", "v", "a")) // stays what it was
	has, err := h.HasSnapshot(t.Context(), v, "", "v", "a")
	if err != nil || !has {
		t.Fatal(has, err)
	}
	do("apply", h.ApplySnapshot(t.Context(), v, "", "v", "a"))
	if out := qemuIO(t, path, "read -P 1 0 64k"); strings.Contains(out, "failed") {
		t.Error(out)
	}
	do("delete", h.DeleteSnapshot(t.Context(), v, "", "v", "a"))
	do("delete again", h.DeleteSnapshot(t.Context(), v, "", "v", "a"))
	if err := h.ApplySnapshot(t.Context(), v, "", "v", "a"); api.CodeOf(err) != api.CodeNotFound || !strings.Contains(err.Error(), `"v"`) {
		t.Errorf("apply of none: %v", err)
	}
	if err := h.CreateSnapshot(t.Context(), v, "", "none", "a"); api.CodeOf(err) != api.CodeNotFound {
		t.Errorf("of no volume: %v", err)
	}
}

// What another process has open is not touched, and the error says so.
func TestASnapshotOfAnOpenVolumeIsRefused(t *testing.T) {
	k, h, _ := local(t)
	vol := k.volume("v", api.VolumeSpec{Size: api.MiB, Node: "m1"})
	k.untilVolume(vol.Meta.ID, api.StorageReady)
	path, _, err := h.Resolve(k.db.Local(), "", "v")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("qemu-io", "-f", "qcow2", path)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out := &clipped{most: 4096}
	cmd.Stdout = out
	if err := cmd.Start(); err != nil {
		t.Fatalf("qemu-io (install qemu-utils): %v", err)
	}
	defer func() { _ = in.Close(); _ = cmd.Wait() }()
	end := time.Now().Add(patience)
	for {
		err = h.CreateSnapshot(t.Context(), k.db.Local(), "", "v", "a")
		if api.CodeOf(err) == api.CodeConflict && err != nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("never refused: %v", err)
		}
		// qemu-io had not opened it yet: the snapshot is there, or is in the way.
		if err := h.DeleteSnapshot(t.Context(), k.db.Local(), "", "v", "a"); err != nil && api.CodeOf(err) != api.CodeConflict {
			t.Fatal(err)
		}
	}
	if !strings.Contains(err.Error(), "in use by another process") {
		t.Error(err)
	}
}

// taken makes the object of a snapshot with one disk.
func (k *kit) taken(vol api.Volume, phase api.SnapshotPhase) api.Snapshot {
	k.t.Helper()
	s := api.Snapshot{Meta: api.NewMeta(api.KindSnapshot, "", "s"), Spec: api.SnapshotSpec{VM: "web1", VMID: api.NewID()}}
	s.Status = api.SnapshotStatus{Phase: phase, Tag: api.SnapshotTag(s.Meta.ID), Disks: []api.SnapshotDisk{{Volume: vol.Meta.Name, VolumeID: vol.Meta.ID, Slot: 1}}}
	k.txn(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.CreateSnapshot(tx, &s) })
	return s
}

func TestAVolumeIsCopiedFromASnapshot(t *testing.T) {
	k, h, root := local(t)
	k.upload(h, "tiny", "local", "8M")
	src := k.volume("src", api.VolumeSpec{Image: "tiny", Node: "m1"})
	k.untilVolume(src.Meta.ID, api.StorageReady)
	path, _, err := h.Resolve(k.db.Local(), "", "src")
	if err != nil {
		t.Fatal(err)
	}
	snap := k.taken(src, api.SnapshotCreating)
	spec := api.VolumeSpec{Size: 8 * api.MiB, Node: "m1", SourceVolume: "src", SourceSnapshot: snap.Meta.ID}
	full := k.volume("full", spec)
	spec.Image = "tiny"
	linked := k.volume("linked", spec)
	got := k.untilVolume(full.Meta.ID, api.StoragePending)
	if !strings.Contains(got.Status.Message, "waiting for snapshot") {
		t.Errorf("%+v", got.Status)
	}
	qemuIO(t, path, "write -P 7 1M 64k")
	if err := h.CreateSnapshot(t.Context(), k.db.Local(), "", "src", snap.Status.Tag); err != nil {
		t.Fatal(err)
	}
	qemuIO(t, path, "write -P 9 1M 64k")
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		s, err := configdb.Snapshots.Get(v, snap.Meta.ID)
		s.Status.Phase = api.SnapshotReady
		if err != nil {
			return err
		}
		return configdb.Snapshots.UpdateStatus(v, tx, &s)
	})
	for vol, backed := range map[*api.Volume]bool{&full: false, &linked: true} {
		if got := k.untilVolume(vol.Meta.ID, api.StorageReady); got.Status.Size != 8*api.MiB {
			t.Errorf("%+v", got.Status)
		}
		copied, _, err := h.Resolve(k.db.Local(), "", vol.Meta.Name)
		if err != nil {
			t.Fatal(err)
		}
		if out := qemuIO(t, copied, "read -P 7 1M 64k"); strings.Contains(out, "failed") {
			t.Errorf("%s does not hold what the snapshot holds: %s", vol.Meta.Name, out)
		}
		info, err := h.img.info(t.Context(), copied, "qcow2")
		if err != nil || (info.Backing != "") != backed || len(info.Snapshots) != 0 {
			t.Errorf("%s: %+v, %v", vol.Meta.Name, info, err)
		}
	}
	if left := files(t, root, "tmp"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestACopyWithoutItsSourceFailsByName(t *testing.T) {
	k, _, root := local(t)
	src := k.volume("src", api.VolumeSpec{Size: api.MiB, Node: "m1"})
	k.untilVolume(src.Meta.ID, api.StorageReady)
	snap := k.taken(src, api.SnapshotReady) // but the file does not have it
	a := k.volume("a", api.VolumeSpec{Size: api.MiB, Node: "m1", SourceVolume: "src", SourceSnapshot: snap.Meta.ID})
	b := k.volume("b", api.VolumeSpec{Size: api.MiB, Node: "m1", SourceVolume: "other", SourceSnapshot: snap.Meta.ID})
	c := k.volume("c", api.VolumeSpec{Size: api.MiB, Node: "m1", SourceVolume: "src", SourceSnapshot: api.NewID()})
	for vol, text := range map[*api.Volume]string{&a: "snapshot", &b: "does not have volume", &c: "is gone, or could not be taken"} {
		if got := k.untilVolume(vol.Meta.ID, api.StorageFailed); !strings.Contains(got.Status.Message, text) {
			t.Errorf("%s: %+v", vol.Meta.Name, got.Status)
		}
	}
	if left := files(t, root, "tmp"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func FuzzProgress(f *testing.F) {
	f.Add([]byte("    (12.50/100%)\r    (99.00/100%)\r"))
	f.Add([]byte("(1e999/100%)(-3/100%)(100.00/100%)"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p := &progressReader{}
		for _, part := range [][]byte{b[:len(b)/2], b[len(b)/2:]} {
			if n, err := p.Write(part); n != len(part) || err != nil {
				t.Fatal(n, err)
			}
		}
		if got := p.percent(); got < 0 || got > 99 || len(p.rest) > maxProgressLine {
			t.Fatal(got, len(p.rest))
		}
	})
}

// A QEMU that was taken over can write what it likes into the header of its
// volume: nothing that the header names is opened.
func TestAVolumeThatNamesAnotherFileIsRefused(t *testing.T) {
	k, h, _ := local(t)
	k.upload(h, "tiny", "local", "8M")
	src := k.volume("src", api.VolumeSpec{Image: "tiny", Node: "m1"})
	k.untilVolume(src.Meta.ID, api.StorageReady)
	v := k.db.Local()
	path, _, err := h.Resolve(v, "", "src")
	if err != nil {
		t.Fatal(err)
	}
	snap := k.taken(src, api.SnapshotReady)
	if err := h.CreateSnapshot(t.Context(), v, "", "src", snap.Status.Tag); err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, bytes.Repeat([]byte("host"), 256<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", secret, "-F", "raw", path).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img: %v: %s", err, out)
	}
	for what, err := range map[string]error{
		"create": h.CreateSnapshot(t.Context(), v, "", "src", "b"),
		"apply":  h.ApplySnapshot(t.Context(), v, "", "src", snap.Status.Tag),
		"delete": h.DeleteSnapshot(t.Context(), v, "", "src", snap.Status.Tag),
	} {
		if api.CodeOf(err) != api.CodeRefused || !strings.Contains(err.Error(), "do not trust that vm") {
			t.Errorf("%s: %v", what, err)
		}
	}
	spec := api.VolumeSpec{Size: 8 * api.MiB, Node: "m1", SourceVolume: "src", SourceSnapshot: snap.Meta.ID}
	a := k.volume("a", spec)
	if got := k.untilVolume(a.Meta.ID, api.StorageFailed); !strings.Contains(got.Status.Message, "do not trust that vm") {
		t.Errorf("%+v", got.Status)
	}
	// Were it written after the look, it would not be believed either.
	source := qcow2Source(path, &backingFile{imageFileOf(t, h, "tiny"), "qcow2"})
	to := filepath.Join(t.TempDir(), "copy")
	if err := h.img.copyVolume(t.Context(), source, snap.Status.Tag, to, "", "", io.Discard); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(to); err != nil || bytes.Contains(b, []byte("hosthost")) {
		t.Error("the copy has what the host keeps secret", err)
	}
}

func imageFileOf(t *testing.T, h *host, name string) string {
	t.Helper()
	path, format, err := h.ResolveImage(h.cfg.DB.Local(), "", name)
	if err != nil || format != "qcow2" {
		t.Fatal(format, err)
	}
	return path
}

func FuzzBackingOf(f *testing.F) {
	head := make([]byte, 512)
	copy(head, "QFI\xfb\x00\x00\x00\x03")
	head[14], head[19] = 1, 4 // the name is at 256 and has 4 bytes
	copy(head[256:], "base")
	f.Add(head)
	f.Add([]byte("QFI\xfb"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if name, err := backingOf(bytes.NewReader(b)); len(name) > maxBackingName || err != nil && name != "" {
			t.Fatal(len(name), err)
		}
	})
}
