// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

func withRecovery(name string, recovery map[string]any) map[string]any {
	body := vmBody(name, api.VMDisk{Size: 64 * api.MiB})
	body["spec"].(map[string]any)["recovery"] = recovery
	return body
}

func TestAPolicyForAWatchdogNeedsOne(t *testing.T) {
	f := newFixture(t)
	a := f.do(call{method: "POST", path: "vms", body: withRecovery("web1", map[string]any{"onWatchdog": "restart"}), role: api.RoleOperator})
	if a.status != http.StatusUnprocessableEntity || !strings.Contains(string(a.body), "has no watchdog") {
		t.Fatal(a.status, string(a.body))
	}
	body := withRecovery("web1", map[string]any{"onWatchdog": "pause"})
	body["spec"].(map[string]any)["watchdog"] = map[string]any{"action": "reset"}
	a = f.do(call{method: "POST", path: "vms", body: body, role: api.RoleOperator})
	if a.status != http.StatusUnprocessableEntity || !strings.Contains(string(a.body), "leaves nothing to look at") {
		t.Fatal(a.status, string(a.body))
	}
	body["spec"].(map[string]any)["watchdog"] = map[string]any{"action": "pause"}
	if a = f.do(call{method: "POST", path: "vms", body: body, role: api.RoleOperator}); a.status != http.StatusAccepted {
		t.Fatal(a.status, string(a.body))
	}
}

func TestVMsToWaitForAreChecked(t *testing.T) {
	f := newFixture(t)
	create := func(name string, recovery map[string]any, status int, says string) {
		t.Helper()
		a := f.do(call{method: "POST", path: "vms", body: withRecovery(name, recovery), role: api.RoleOperator})
		if a.status != status || !strings.Contains(string(a.body), says) {
			t.Fatalf("%s %v: %d %s", name, recovery, a.status, a.body)
		}
	}
	change := func(name string, recovery map[string]any, status int, says string) {
		t.Helper()
		a := f.do(call{method: "PATCH", path: "vms/" + name, body: map[string]any{"spec": map[string]any{"recovery": recovery}}, role: api.RoleOperator})
		if a.status != status || !strings.Contains(string(a.body), says) {
			t.Fatalf("%s %v: %d %s", name, recovery, a.status, a.body)
		}
	}
	after := func(names ...string) map[string]any { return map[string]any{"after": names} }
	create("db1", nil, http.StatusAccepted, "")
	create("app1", after("nobody"), http.StatusNotFound, "spec.recovery.after[0]")
	create("app1", after("app1"), http.StatusUnprocessableEntity, "is the vm itself")
	create("app1", after("db1", "db1"), http.StatusUnprocessableEntity, "a second time")
	create("app1", map[string]any{"after": []string{"db1"}, "afterCondition": "perfect"}, http.StatusUnprocessableEntity, "started or healthy")
	create("app1", after("db1"), http.StatusAccepted, "")
	create("web1", after("app1"), http.StatusAccepted, "")
	change("db1", after("web1"), http.StatusUnprocessableEntity, "db1 → web1 → app1 → db1")
	// One that has gone does not stand in the way of other changes.
	f.do(call{method: "DELETE", path: "vms/db1", role: api.RoleOperator})
	change("app1", map[string]any{"priority": "high"}, http.StatusOK, "")
}

func TestAStartByHandDoesNotWait(t *testing.T) {
	f := newFixture(t)
	f.do(call{method: "POST", path: "vms", body: vmBody("web1", api.VMDisk{Size: 64 * api.MiB}), role: api.RoleOperator})
	v := f.db.Local()
	vm, err := configdb.VMs.Find(v, "", "web1")
	if err != nil {
		t.Fatal(err)
	}
	vm.Spec.Power = api.PowerRunning
	vm.Status.Phase, vm.Status.Awaits = api.VMStarting, &api.VMAwaits{Epoch: 1, VMs: []string{"db1"}}
	tx := &configdb.Txn{}
	if err := errors.Join(configdb.VMs.UpdateSpec(v, tx, &vm), configdb.VMs.UpdateStatus(v, tx, &vm)); err != nil {
		t.Fatal(err)
	}
	if _, err := f.db.Txn(t.Context(), tx); err != nil {
		t.Fatal(err)
	}
	a := f.do(call{method: "POST", path: "vms/web1/start", role: api.RoleOperator})
	if vm, err = configdb.VMs.Find(f.db.Local(), "", "web1"); err != nil || a.status != http.StatusAccepted || vm.Status.Awaits != nil {
		t.Fatal(a.status, string(a.body), vm.Status, err)
	}
}
