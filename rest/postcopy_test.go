// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"net/http"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// A node whose kernel does not allow post-copy is refused by name, with the remedy,
// by the plan and by the request; a VM with disks that move is, too.
func TestPostCopyNeedsATargetThatCanDoIt(t *testing.T) {
	f := newFixture(t)
	vm := f.movableVM("web1", api.VMDisk{Size: api.GiB, Pool: "shared"})
	at := f.binding(vm.Meta.ID).Spec.Node
	other := map[string]string{"m1": "m2", "m2": "m1"}[at]
	facts := api.NodeFacts{Meta: api.NewMeta(api.KindNodeFacts, "", other), Spec: api.NodeFactsSpec{NodeID: f.nodeIDs[other]}}
	facts.Meta.ID = f.nodeIDs[other]
	refused := func(says string) {
		t.Helper()
		for _, c := range []call{{method: "GET", path: "vms/web1/migration/plan?postCopy=true&target=" + other}, {method: "POST", path: "vms/web1/migrate", body: `{"postCopy": true, "to": "` + other + `"}`}} {
			p := wantProblem(t, f.do(c), 409, api.CodeUnplaceable, "")
			if !strings.Contains(p.Detail, says) || !strings.Contains(p.Detail, other) {
				t.Errorf("%s: %q does not say %q of %s", c.method, p.Detail, says, other)
			}
		}
	}
	refused("it is not known whether it can do post-copy")
	facts.Status = api.NodeFactsStatus{Node: other, Missing: map[api.HostFeature]string{api.FeaturePostCopy: "sysctl vm.unprivileged_userfaultfd=1"}}
	f.txn(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.NodeFacts.CreateUnnamed(tx, &facts) })
	refused("sysctl vm.unprivileged_userfaultfd=1")
	wantProblem(t, f.do(call{method: "POST", path: "vms/web1/migrate", body: `{"postCopy": true, "channels": 2}`}), 422, api.CodeInvalid, "channels")

	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		o, err := configdb.NodeFacts.Get(v, f.nodeIDs[other])
		o.Status.Missing = nil
		if err == nil {
			err = configdb.NodeFacts.UpdateStatus(v, tx, &o)
		}
		return err
	})
	want[TaskReply](t, f.do(call{method: "POST", path: "vms/web1/migrate", body: `{"postCopy": true}`}), http.StatusAccepted)
	if op, err := configdb.Operations.Get(f.db.Local(), vm.Meta.ID); err != nil || !op.Spec.Migration.PostCopy {
		t.Errorf("%+v, %v", op.Spec.Migration, err)
	}
}
