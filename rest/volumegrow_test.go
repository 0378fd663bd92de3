// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

func TestAVolumeGrowsAndNeverShrinks(t *testing.T) {
	f := newFixture(t)
	vol := f.emptyVolume("data")
	size := func(s string) string { return `{"spec":{"size":"` + s + `"}}` }
	wantProblem(t, f.do(call{method: "PATCH", path: "volumes/data", body: size("128M")}), 409, api.CodeRefused, "") // it is being made
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		now, err := configdb.Volumes.Get(v, vol.Meta.ID)
		now.Status.Phase, now.Status.Size = api.StorageReady, 64*api.MiB
		if err != nil {
			return err
		}
		return configdb.Volumes.UpdateStatus(v, tx, &now)
	})
	wantProblem(t, f.do(call{method: "PATCH", path: "volumes/data", body: size("32M")}), 422, api.CodeInvalid, "spec.size")
	wantProblem(t, f.do(call{method: "PATCH", path: "volumes/data", body: `{"spec":{"size":"128M","pool":"shared"}}`}), 409, api.CodeRefused, "")
	a := f.do(call{method: "PATCH", path: "volumes/data", body: size("128M")})
	got := want[api.Volume](t, a, 200)
	task, err := configdb.Tasks.Get(f.db.Local(), a.header.Get(headerTask))
	if got.Spec.Size != 128*api.MiB || err != nil || task.Spec.Action != api.ActionVolumeResize || task.Spec.TargetGeneration != got.Meta.Generation {
		t.Errorf("%+v, task %+v, %v", got.Spec, task.Spec, err)
	}
	if a := f.do(call{method: "PATCH", path: "volumes/data", body: size("128M")}); a.status != 200 || a.header.Get(headerTask) != "" {
		t.Errorf("the same again: %d, task %q", a.status, a.header.Get(headerTask))
	}
}
