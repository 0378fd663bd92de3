// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// wishSize does what rest does.
func (k *kit) wishSize(id string, size api.Size) {
	k.t.Helper()
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		vol, err := configdb.Volumes.Get(v, id)
		if err != nil {
			return err
		}
		vol.Spec.Size = size
		return configdb.Volumes.UpdateSpec(v, tx, &vol)
	})
}

func TestAVolumeGrowsAndAQEMUThatHasItDoesTheWork(t *testing.T) {
	k, h, _ := local(t)
	vol := k.volume("v", api.VolumeSpec{Size: 8 * api.MiB, Node: "m1"})
	k.untilVolume(vol.Meta.ID, api.StorageReady)
	path, _, err := h.Resolve(k.db.Local(), "", "v")
	if err != nil {
		t.Fatal(err)
	}
	grown := func(size api.Size) {
		t.Helper()
		k.until("enlarged", func(v *configdb.View) bool {
			now, err := configdb.Volumes.Get(v, vol.Meta.ID)
			return err == nil && now.Status.Size == size && now.Status.ObservedGeneration == now.Meta.Generation && now.Status.Message == ""
		})
		if info, err := h.img.info(t.Context(), path, "qcow2"); err != nil || info.VirtualSize != int64(size) {
			t.Errorf("%+v, %v", info, err)
		}
	}
	k.wishSize(vol.Meta.ID, 16*api.MiB)
	grown(16 * api.MiB)

	vm := api.VM{Meta: api.NewMeta(api.KindVM, "", "web1"), Spec: api.VMSpec{Power: api.PowerRunning, Disks: []api.VMDisk{{Volume: "v"}}}}
	k.txn(func(_ *configdb.View, tx *configdb.Txn) error {
		configdb.Volumes.Refer(tx, vol.Meta.ID, api.KindVM, vm.Meta.ID)
		return configdb.VMs.Create(tx, &vm)
	})
	k.wishSize(vol.Meta.ID, 32*api.MiB)
	k.until("left to QEMU", func(v *configdb.View) bool {
		now, err := configdb.Volumes.Get(v, vol.Meta.ID)
		return err == nil && strings.Contains(now.Status.Message, "its vm enlarges it") && now.Status.Size == 16*api.MiB
	})
	if err := h.img.grow(t.Context(), path, int64(32*api.MiB)); err != nil { // as block_resize does
		t.Fatal(err)
	}
	grown(32 * api.MiB)
}

func TestSizeOfAHeader(t *testing.T) {
	for _, c := range []struct {
		size string
		want api.Size
	}{{"1M", api.MiB}, {"256T", 256 * api.TiB}} {
		path := filepath.Join(t.TempDir(), "v.qcow2")
		qemu(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path, c.size)
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if got, err := sizeIn(f); err != nil || got != int64(c.want) {
			t.Errorf("%s: %d, %v", c.size, got, err)
		}
	}
	if _, err := sizeIn(strings.NewReader(strings.Repeat("\xff", 104))); api.CodeOf(err) != api.CodeRefused {
		t.Errorf("an absurd size: %v", err)
	}
}
