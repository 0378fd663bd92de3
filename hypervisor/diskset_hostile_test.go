// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// Tags were removed from the files of disks that a QEMU had open that did not answer at
// the moment, or that another VM had got since; only the images' locks were in the way.
func TestDisksInUseAreNotTouched(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	other := e.createNamed("other", e.node, api.VMSpec{Power: api.PowerStopped})
	vol := api.Volume{Meta: api.NewMeta(api.KindVolume, "", "shared")}
	tx := &configdb.Txn{}
	must(t, configdb.Volumes.Create(tx, &vol))
	e.commit(tx)
	tx = &configdb.Txn{}
	configdb.Volumes.Refer(tx, vol.Meta.ID, api.KindVM, id)
	e.commit(tx)
	disks := []api.SnapshotDisk{{Volume: "shared", VolumeID: vol.Meta.ID}}
	for name, c := range map[string]struct {
		in      *instance
		touched bool
	}{
		"its QEMU does not answer":          {&instance{id: id}, false},
		"its QEMU says that it is not open": {e.h.instance(id), true},
		"another VM has it":                 {&instance{id: other}, false},
	} {
		t.Run(name, func(t *testing.T) {
			most := time.Second
			if c.touched {
				most = patience
			}
			ctx, cancel := context.WithTimeout(t.Context(), most)
			defer cancel()
			touched := false
			err := (&diskSet{h: e.h, in: c.in, epoch: e.binding(c.in.id).Spec.Epoch, disks: disks}).offline(ctx, disks, func(*configdb.View, string) error { touched = true; return nil })
			if touched != c.touched || (err == nil) != c.touched {
				t.Errorf("touched %v, %v", touched, err)
			}
		})
	}
}
