// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"os"
	"testing"

	"github.com/muster-vm/muster/api"
)

// After the restore of an older backup the file of a volume may be on another node
// than the database says. A migration to that node wrote over it.
func TestACopyDoesNotReplaceAFileThatNobodyMarked(t *testing.T) {
	k := newKit(t, "m1", "m2")
	k.start("m1", "m2")
	pool := k.pool("local", api.PoolSpec{Type: api.PoolDir})
	k.untilReady(pool, "m1", "m2")
	vol := k.volume("data", api.VolumeSpec{Pool: "local", Node: "m1", Size: api.MiB})
	k.untilVolume(vol.Meta.ID, api.StorageReady)
	k.moving(api.NewID(), vol.Meta.ID, true)
	path := volumePath(k.nodes["m2"].dir+"/pool", vol.Meta.ID)
	if err := os.WriteFile(path, []byte("the last copy"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, err := k.nodes["m2"].MakeCopy(t.Context(), k.db.Local(), vol.Meta.ID)
	wantCode(t, err, api.CodeRefused, path, "move it away")
	if got := string(read(t, path)); got != "the last copy" || there(path+copyMark) {
		t.Errorf("it holds %q; marked %v", got, there(path+copyMark))
	}
}
