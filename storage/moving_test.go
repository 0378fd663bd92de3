// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"os"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// moving writes or removes the operation that copies a volume.
func (k *kit) moving(vm, volume string, on bool) {
	k.t.Helper()
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		op, err := configdb.Operations.Get(v, vm)
		if !on {
			configdb.Operations.DeleteUnnamed(tx, &op)
			return err
		}
		op = api.Operation{Meta: api.NewMeta(api.KindOperation, "", "web1")}
		op.Meta.ID, op.Spec.Migration = vm, &api.MigrationSpec{Volumes: []string{volume}}
		return configdb.Operations.CreateUnnamed(tx, &op)
	})
}

func there(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// Whatever becomes of a migration, the file of the node that the volume names
// stays, and the other one goes.
func TestCopiesOfAMigrationAreSwept(t *testing.T) {
	for name, moves := range map[string]bool{"the volume has moved": true, "the volume stays": false} {
		t.Run(name, func(t *testing.T) {
			k := newKit(t, "m1", "m2")
			k.start("m1", "m2")
			pool := k.pool("local", api.PoolSpec{Type: api.PoolDir})
			k.untilReady(pool, "m1", "m2")
			vol := k.volume("data", api.VolumeSpec{Pool: "local", Node: "m1", Size: api.MiB})
			vol = k.untilVolume(vol.Meta.ID, api.StorageReady)
			stray := volumePath(k.nodes["m2"].dir+"/pool", api.NewID())
			if err := os.WriteFile(stray, []byte("nobody knows"), 0o600); err != nil {
				t.Fatal(err)
			}
			vm := api.NewID()
			k.moving(vm, vol.Meta.ID, true)
			path, format, err := k.nodes["m2"].MakeCopy(t.Context(), k.db.Local(), vol.Meta.ID)
			if err != nil || format != "qcow2" || !there(path) {
				t.Fatalf("%s, %s, %v", path, format, err)
			}
			if err := k.nodes["m1"].MarkCopied(t.Context(), k.db.Local(), vol.Meta.ID); err != nil {
				t.Fatal(err)
			}
			if _, _, err := k.nodes["m1"].MakeCopy(t.Context(), k.db.Local(), vol.Meta.ID); err == nil {
				t.Fatal("a copy over the volume itself")
			}
			here := volumePath(k.nodes["m1"].dir+"/pool", vol.Meta.ID)
			// A restart in the middle sweeps nothing.
			k.restart("m2", func(*Service) {})
			k.untilReady(pool, "m2")
			if moves {
				k.txn(func(v *configdb.View, tx *configdb.Txn) error {
					o, err := configdb.Volumes.Get(v, vol.Meta.ID)
					if err != nil {
						return err
					}
					o.Spec.Node = "m2"
					return configdb.Volumes.UpdateSpec(v, tx, &o)
				})
			}
			if !there(path) || !there(here) {
				t.Fatal("a file went while the operation was there")
			}
			k.moving(vm, vol.Meta.ID, false)
			end := time.Now().Add(patience)
			for there(path) != moves || there(here) == moves || there(path+copyMark) || there(here+copyMark) {
				if time.Now().After(end) { // files do not tell when they go
					t.Fatalf("left at the end: source %v, target %v, marks %v %v", there(here), there(path), there(here+copyMark), there(path+copyMark))
				}
				time.Sleep(10 * time.Millisecond)
			}
			if !there(stray) {
				t.Error("a file that nobody marked was removed")
			}
		})
	}
}
