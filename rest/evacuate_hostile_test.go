// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"net/http"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// The word of a user who stops a VM that an evacuation has just shut down reaches the
// evacuation; that of one who stops another VM leaves nothing behind.
func TestStopIsKnownToTheEvacuation(t *testing.T) {
	f := newFixture(t)
	shut, other := f.newVM("shut", api.VMStopped), f.newVM("other", api.VMStopped)
	ev := api.Evacuation{Meta: api.NewMeta(api.KindEvacuation, "", "m1"), Spec: api.EvacuationSpec{TaskID: api.NewID(), Node: "m1", Level: api.EvacuateStop, Parallel: 1}}
	ev.Status.Stopped = []string{shut.Meta.ID}
	f.txn(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Evacuations.CreateUnnamed(tx, &ev) })
	for _, name := range []string{"shut", "other"} {
		want[any](t, f.do(call{method: "POST", path: "vms/" + name + "/stop"}), http.StatusAccepted)
	}
	marked := func(id string) (was bool) {
		f.txn(func(v *configdb.View, tx *configdb.Txn) error { was = configdb.StaysStopped(v, tx, id); return nil })
		return was
	}
	if !marked(shut.Meta.ID) || marked(other.Meta.ID) {
		t.Error("the wrong one is to stay stopped")
	}
}
