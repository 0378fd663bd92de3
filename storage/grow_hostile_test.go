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

// A QEMU that was taken over can write into the header of its volume that the data
// are in another file, any file of the host. qemu-img, which runs as root, would make
// that one larger when the volume is enlarged.
func TestEnlargingDoesNotFollowAHeaderToAnotherFile(t *testing.T) {
	k, h, _ := local(t)
	vol := k.volume("v", api.VolumeSpec{Size: 8 * api.MiB, Node: "m1"})
	k.untilVolume(vol.Meta.ID, api.StorageReady)
	path, _, err := h.Resolve(k.db.Local(), "", "v")
	if err != nil {
		t.Fatal(err)
	}
	victim, evil := filepath.Join(t.TempDir(), "victim"), filepath.Join(t.TempDir(), "evil.qcow2")
	qemu(t, "create", "-q", "-f", "qcow2", "-o", "data_file="+victim+",data_file_raw=on", evil, "8M")
	if err := os.WriteFile(path, read(t, evil), 0o600); err != nil {
		t.Fatal(err)
	}
	k.wishSize(vol.Meta.ID, 16*api.MiB)
	k.until("refused", func(v *configdb.View) bool {
		now, err := configdb.Volumes.Get(v, vol.Meta.ID)
		return err == nil && (strings.Contains(now.Status.Message, "is not what Muster wrote") || now.Status.Size == 16*api.MiB)
	})
	st, err := os.Stat(victim)
	if err != nil || st.Size() != int64(8*api.MiB) {
		t.Errorf("the other file now has %d bytes, %v", st.Size(), err)
	}
}
