// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// local starts one node with the pool "local".
func local(t *testing.T) (*kit, *host, string) {
	k := newKit(t, "m1")
	p := k.pool(api.LocalPool, api.PoolSpec{Type: api.PoolDir})
	k.start("m1")
	k.untilReady(p, "m1")
	h := k.nodes["m1"]
	return k, h, filepath.Join(h.dir, "pool")
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

func TestUploadMakesAReadyImage(t *testing.T) {
	k, h, root := local(t)
	b := content(t, "8M")
	img := k.image("tiny", api.ImageSpec{SHA256: strings.ToUpper(sum(b))})
	got, err := h.Upload(t.Context(), img.Meta.ID, bytes.NewReader(b), int64(len(b)), sum(b))
	if err != nil {
		t.Fatal(err)
	}
	st := got.Status
	if st.Phase != api.StorageReady || st.Format != "qcow2" || st.VirtualSize != 8*api.MiB || st.SHA256 != sum(b) || st.Progress != 100 || st.Size == 0 {
		t.Errorf("status is %+v", st)
	}
	if got.Spec.Node != "m1" || st.ObservedGeneration != got.Meta.Generation {
		t.Errorf("node %q, observed %d of %d", got.Spec.Node, st.ObservedGeneration, got.Meta.Generation)
	}
	path := filepath.Join(root, "images", img.Meta.ID+".qcow2")
	if !bytes.Equal(read(t, path), b) {
		t.Error("the file is not what was uploaded")
	}
	if info, _ := os.Stat(path); info.Mode().Perm() != 0o444 {
		t.Errorf("mode is %v", info.Mode())
	}
	if left := files(t, root, "tmp"); len(left) > 0 {
		t.Errorf("left in tmp: %v", left)
	}
	_, err = h.Upload(t.Context(), img.Meta.ID, bytes.NewReader(b), int64(len(b)), "")
	wantCode(t, err, api.CodeRefused, "never changes")
}

func TestRawContentIsTakenAsRaw(t *testing.T) {
	k, h, root := local(t)
	b := make([]byte, 3<<20+100)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(b[:1<<20]) // random, then a hole, then a tail
	b[len(b)-1] = 1
	img := k.image("noise", api.ImageSpec{})
	got, err := h.Upload(t.Context(), img.Meta.ID, io.MultiReader(bytes.NewReader(b)), -1, "")
	if err != nil {
		t.Fatal(err)
	}
	if got.Status.Format != "raw" || got.Status.VirtualSize < api.Size(len(b)) {
		t.Errorf("status is %+v", got.Status)
	}
	if !bytes.Equal(read(t, imagePath(root, img.Meta.ID, "raw")), b) {
		t.Error("the file is not what was uploaded")
	}
}

// breaking ends with an error after its content.
type breaking struct {
	io.Reader
	err error
}

func (b breaking) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if errors.Is(err, io.EOF) {
		err = b.err
	}
	return n, err
}

func TestUploadThatEndsEarlyCanBeRepeated(t *testing.T) {
	k, h, root := local(t)
	b := content(t, "8M")
	half := int64(len(b) / 2)
	img := k.image("tiny", api.ImageSpec{})
	for name, r := range map[string]struct {
		r      io.Reader
		length int64
	}{
		"clean end":    {bytes.NewReader(b[:half]), int64(len(b))},
		"broken":       {breaking{bytes.NewReader(b[:half]), io.ErrUnexpectedEOF}, int64(len(b))},
		"broken chunk": {breaking{bytes.NewReader(b[:half]), io.ErrUnexpectedEOF}, -1},
	} {
		_, err := h.Upload(t.Context(), img.Meta.ID, r.r, r.length, "")
		wantCode(t, err, api.CodeIncomplete, fmt.Sprint(half))
		got := k.untilImage(img.Meta.ID, api.StoragePending)
		if !strings.Contains(got.Status.Message, "upload the content again") {
			t.Errorf("%s: message %q", name, got.Status.Message)
		}
		if left := append(files(t, root, "tmp"), files(t, root, "images")...); len(left) > 0 {
			t.Errorf("%s: left: %v", name, left)
		}
	}
	if _, err := h.Upload(t.Context(), img.Meta.ID, bytes.NewReader(b), int64(len(b)), ""); err != nil {
		t.Fatal(err)
	}
}

func TestUploadChecksWhatWasAnnounced(t *testing.T) {
	k, h, root := local(t)
	b := content(t, "8M")
	other := sum([]byte("other"))
	img := k.image("a", api.ImageSpec{SHA256: other})
	_, err := h.Upload(t.Context(), img.Meta.ID, bytes.NewReader(b), int64(len(b)), "")
	wantCode(t, err, api.CodeChecksum, sum(b), other)
	_, err = h.Upload(t.Context(), img.Meta.ID, bytes.NewReader(b), int64(len(b)), sum(b))
	wantCode(t, err, api.CodeChecksum)
	img = k.image("b", api.ImageSpec{})
	_, err = h.Upload(t.Context(), img.Meta.ID, bytes.NewReader(b), int64(len(b)), other)
	wantCode(t, err, api.CodeChecksum)
	if got := k.untilImage(img.Meta.ID, api.StorageFailed); got.Status.Conditions[0].Reason != "Checksum" {
		t.Errorf("conditions %+v", got.Status.Conditions)
	}
	_, err = h.Upload(t.Context(), img.Meta.ID, bytes.NewReader(b), int64(len(b))-1, "")
	wantCode(t, err, api.CodeInvalid, "more than the announced")
	_, err = h.Upload(t.Context(), img.Meta.ID, bytes.NewReader(b), int64(len(b)), "../../etc")
	wantCode(t, err, api.CodeInvalid)
	_, err = h.Upload(t.Context(), img.Meta.ID, bytes.NewReader(nil), 0, "")
	wantCode(t, err, api.CodeInvalid, "empty")
	_, err = h.Upload(t.Context(), api.NewID(), bytes.NewReader(b), 1, "")
	wantCode(t, err, api.CodeNotFound)
	if left := append(files(t, root, "tmp"), files(t, root, "images")...); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if _, err := h.Upload(t.Context(), img.Meta.ID, bytes.NewReader(b), int64(len(b)), sum(b)); err != nil {
		t.Errorf("a failed upload cannot be repeated: %v", err)
	}
}

func TestSecondUploadOfOneImageIsRefused(t *testing.T) {
	k, h, _ := local(t)
	b := content(t, "8M")
	img := k.image("tiny", api.ImageSpec{})
	pr, pw := io.Pipe()
	first := make(chan error, 1)
	go func() {
		_, err := h.Upload(t.Context(), img.Meta.ID, pr, int64(len(b)), "")
		first <- err
	}()
	if _, err := pw.Write(b[:1]); err != nil { // the first one reads, so it has begun
		t.Fatal(err)
	}
	_, err := h.Upload(t.Context(), img.Meta.ID, bytes.NewReader(b), int64(len(b)), "")
	wantCode(t, err, api.CodeRefused, "another upload")
	if _, err := pw.Write(b[1:]); err != nil {
		t.Fatal(err)
	}
	pw.Close()
	if err := <-first; err != nil {
		t.Fatal(err)
	}
}

func TestDeletionDuringAnUploadLeavesNothing(t *testing.T) {
	k, h, root := local(t)
	img := k.image("tiny", api.ImageSpec{})
	pr, pw := io.Pipe()
	done := make(chan error, 1)
	go func() {
		_, err := h.Upload(t.Context(), img.Meta.ID, pr, 4<<20, "")
		pr.Close()
		done <- err
	}()
	if _, err := pw.Write(make([]byte, chunkBytes)); err != nil {
		t.Fatal(err)
	}
	k.deleteImage(img.Meta.ID)
	_, _ = pw.Write(make([]byte, 4<<20-chunkBytes)) // fails when the upload gives up
	pw.Close()
	wantCode(t, <-done, api.CodeRefused, "deleted")
	k.untilGone(configdb.Images.SpecKey(img.Meta.ID))
	if left := append(files(t, root, "tmp"), files(t, root, "images")...); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestImportByPath(t *testing.T) {
	k, _, root := local(t)
	b := content(t, "8M")
	path := filepath.Join(t.TempDir(), "a:b,c.qcow2")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	img := k.image("tiny", api.ImageSpec{Path: path, Node: "m1", SHA256: sum(b)})
	got := k.untilImage(img.Meta.ID, api.StorageReady)
	if got.Status.Format != "qcow2" || got.Status.SHA256 != sum(b) {
		t.Errorf("status is %+v", got.Status)
	}
	k.deleteImage(img.Meta.ID)
	k.untilGone(configdb.Images.SpecKey(img.Meta.ID))
	k.untilGone(configdb.Images.NameKey("default", "tiny"))
	if left := files(t, root, "images"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if !k.db.Local().Empty(configdb.Root + "ref/") {
		t.Error("references are left")
	}
}

func TestImportByPathRefusesWhatIsNoImage(t *testing.T) {
	k, _, _ := local(t)
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct{ path, word string }{
		{"/nowhere/at/all", "no file /nowhere/at/all on node m1"}, {fifo, "not a regular file"},
		{"/dev/zero", "not a regular file"}, {t.TempDir(), "not a regular file"}, {empty, "empty"},
	} {
		img := k.image(fmt.Sprintf("i%d", i), api.ImageSpec{Path: c.path, Node: "m1"})
		if got := k.untilImage(img.Meta.ID, api.StorageFailed); !strings.Contains(got.Status.Message, c.word) {
			t.Errorf("%s: message %q", c.path, got.Status.Message)
		}
	}
}

func TestInterruptedUploadIsNoticedAfterRestart(t *testing.T) {
	k, h, root := local(t)
	img := k.image("tiny", api.ImageSpec{Node: "m1"})
	k.untilImage(img.Meta.ID, api.StoragePending)
	h.stop()
	// As a daemon that was killed in the middle leaves it:
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		o, err := configdb.Images.Get(v, img.Meta.ID)
		o.Status.Phase, o.Status.Progress = api.StorageImporting, 40
		return errors.Join(err, configdb.Images.UpdateStatus(v, tx, &o))
	})
	left, foreign := filepath.Join(root, "tmp", h.id+".x.y"), filepath.Join(root, "tmp", api.NewID()+".x.y")
	for _, p := range []string{left, foreign} {
		if err := os.WriteFile(p, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	k.restart("m1", nil)
	got := k.untilImage(img.Meta.ID, api.StoragePending)
	if !strings.Contains(got.Status.Message, "interrupted") || got.Status.Progress != 0 {
		t.Errorf("status is %+v", got.Status)
	}
	b := content(t, "8M")
	k.until("upload possible", func(*configdb.View) bool {
		_, err := h.Upload(t.Context(), img.Meta.ID, bytes.NewReader(b), int64(len(b)), "")
		return err == nil
	})
	if names := files(t, root, "tmp"); len(names) != 1 || names[0] != filepath.Base(foreign) {
		t.Errorf("tmp has %v", names)
	}
}

func TestFullDiskIsSaidAndLeavesNothing(t *testing.T) {
	k := newKit(t, "m1")
	root := smallDisk(t, "4m")
	p := k.pool("small", api.PoolSpec{Type: api.PoolDir, Path: root})
	k.start("m1")
	k.untilReady(p, "m1")
	h := k.nodes["m1"]
	img := k.image("big", api.ImageSpec{Pool: "small"})
	noise := make([]byte, 8<<20)
	_, _ = rand.NewChaCha8([32]byte{2}).Read(noise)
	for _, length := range []int64{-1, int64(len(noise))} {
		_, err := h.Upload(t.Context(), img.Meta.ID, bytes.NewReader(noise), length, "")
		wantCode(t, err, api.CodeStorageFull, "small", root)
		k.untilImage(img.Meta.ID, api.StoragePending)
		if left := append(files(t, root, "tmp"), files(t, root, "images")...); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	}
	// A volume on the disk that is filled to the brim, then freed.
	fill := filepath.Join(root, "volumes", "fill")
	if err := os.WriteFile(fill, noise, 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("filling the disk: %v", err)
	}
	vol := k.volume("v", api.VolumeSpec{Pool: "small", Size: api.GiB, Node: "m1"})
	got := k.untilVolume(vol.Meta.ID, api.StorageFailed)
	if c := got.Status.Conditions[0]; c.Reason != "StorageFull" || !strings.Contains(got.Status.Message, "full") {
		t.Errorf("status is %+v", got.Status)
	}
	if left := files(t, root, "tmp"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	k.untilVolume(vol.Meta.ID, api.StorageReady) // the back-off tries again
}

// smallDisk mounts a file system of its own.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatalf("mount a small file system (this test needs root): %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}
