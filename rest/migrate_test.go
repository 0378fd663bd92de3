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

// movableVM makes a VM whose owner has reported what it runs with.
func (f *fixture) movableVM(name string, disks ...api.VMDisk) api.VM {
	f.t.Helper()
	vm := f.runningVM(name, disks...)
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		o, err := configdb.VMs.Get(v, vm.Meta.ID)
		if err != nil {
			return err
		}
		o.Status.Hardware, vm = o.Spec.Hardware(), o
		return configdb.VMs.UpdateStatus(v, tx, &o)
	})
	return vm
}

// migrationTask returns the task of a VM's operation, "" if there is none.
func (f *fixture) migrationTask(name string) string {
	ops, err := configdb.Operations.List(f.db.Local())
	if err != nil {
		f.t.Fatal(err)
	}
	for _, op := range ops {
		if op.Spec.VM == name {
			return op.Spec.TaskID
		}
	}
	return ""
}

func TestMigrationBeginsAsOneOperation(t *testing.T) {
	f := newFixture(t)
	vm := f.movableVM("web1", api.VMDisk{Size: api.GiB, Pool: "shared"})
	b := f.binding(vm.Meta.ID)
	to := map[string]string{"m1": "m2", "m2": "m1"}[b.Spec.Node]
	a := f.do(call{method: "POST", path: "vms/web1/migrate", body: `{"bandwidth":"10M","maxDowntimeMillis":50}`, role: api.RoleOperator})
	r := want[vmReply](t, a, http.StatusAccepted)
	if r.Task.Spec.Action != api.ActionVMMigrate || r.Task.Spec.TargetEpoch != 1 {
		t.Errorf("task %+v", r.Task.Spec)
	}
	op, err := configdb.Operations.Get(f.db.Local(), vm.Meta.ID)
	if err != nil {
		t.Fatal(err)
	}
	m := op.Spec.Migration
	if op.Spec.TaskID != r.Task.Meta.ID || op.Spec.NodeID != b.Spec.NodeID || op.Spec.Epoch != 1 || m == nil || m.Node != to || m.Bandwidth != 10*api.MiB || m.MaxDowntimeMillis != 50 {
		t.Errorf("operation %+v, %+v", op.Spec, m)
	}
	arr, err := configdb.Arrivals.Get(f.db.Local(), vm.Meta.ID)
	if err != nil || arr.Spec != (api.ArrivalSpec{TaskID: op.Spec.TaskID, NodeID: f.nodeIDs[to], Epoch: 2}) || arr.Status.Phase != api.ArrivalPending {
		t.Errorf("arrival %+v, %v", arr, err)
	}
	if now := f.binding(vm.Meta.ID); now.Spec.Node != b.Spec.Node || now.Spec.Epoch != 1 {
		t.Errorf("the binding moved: %+v", now.Spec)
	}
	for _, path := range []string{"vms/web1/migrate", "vms/web1/stop", "vms/web1/reboot"} {
		p := wantProblem(t, f.do(call{method: "POST", path: path}), 409, api.CodeRefused, "")
		if !strings.Contains(p.Detail, "is being migrated") {
			t.Errorf("%s: %s", path, p.Detail)
		}
	}
	want[any](t, f.do(call{method: "POST", path: "tasks/" + r.Task.Meta.ID + "/cancel", role: api.RoleOperator}), http.StatusAccepted)
	if op, _ := configdb.Operations.Get(f.db.Local(), vm.Meta.ID); !op.Spec.Cancel {
		t.Error("the wish to cancel is not there")
	}
}

func TestMigrationIsRefusedAndNothingChanges(t *testing.T) {
	f := newFixture(t)
	vm := f.movableVM("web1", api.VMDisk{Size: api.GiB, Pool: "shared"})
	f.newVM("off", api.VMStopped)
	at := f.binding(vm.Meta.ID).Spec.Node
	other := map[string]string{"m1": "m2", "m2": "m1"}[at]
	set := func(node, accel, qemu string) {
		f.txn(func(v *configdb.View, tx *configdb.Txn) error {
			n, err := configdb.Nodes.Get(v, f.nodeIDs[node])
			if err != nil {
				return err
			}
			n.Status.Accelerator, n.Status.QEMUVersion = api.Accelerator(accel), qemu
			return configdb.Nodes.UpdateStatus(v, tx, &n)
		})
	}
	for _, c := range []struct {
		name, path, body string
		before           func()
		status           int
		code             api.Code
		field, says      string
	}{
		{"to itself", "vms/web1/migrate", `{"to":"` + at + `"}`, nil, 409, api.CodeRefused, "to", "already"},
		{"a bad name", "vms/web1/migrate", `{"to":"../x"}`, nil, 422, api.CodeInvalid, "to", "not a valid name"},
		{"an unknown field", "vms/web1/migrate", `{"node":"m2"}`, nil, 422, api.CodeInvalid, "node", ""},
		{"a downtime of nothing", "vms/web1/migrate", `{"maxDowntimeMillis":1}`, nil, 422, api.CodeInvalid, "maxDowntimeMillis", "10 to 60000"},
		{"a bandwidth of nothing", "vms/web1/migrate", `{"bandwidth":"1K"}`, nil, 422, api.CodeInvalid, "bandwidth", "1 MiB"},
		{"no such vm", "vms/nope/migrate", ``, nil, 404, api.CodeNotFound, "", ""},
		{"a stopped vm", "vms/off/migrate", ``, nil, 409, api.CodeRefused, "", "not running"},
		{"another QEMU", "vms/web1/migrate", ``, func() { set(at, "tcg", "7.2.0"); set(other, "tcg", "8.0.0") }, 409, api.CodeRefused, "to", "QEMU 7.2.0"},
		{"another accelerator", "vms/web1/migrate", ``, func() {
			f.txn(func(v *configdb.View, tx *configdb.Txn) error {
				o, err := configdb.VMs.Get(v, vm.Meta.ID)
				if err != nil {
					return err
				}
				o.Status.Accelerator = "tcg"
				return configdb.VMs.UpdateStatus(v, tx, &o)
			})
			set(other, "kvm", "7.2.0")
		}, 409, api.CodeRefused, "to", "runs with tcg"},
		{"no other node fits", "vms/web1/migrate", ``, func() { f.placer.setFull(other, true) }, 409, api.CodeUnplaceable, "", "no node fits"},
		{"its node is lost", "vms/web1/migrate", ``, func() { f.setNodePhase(at, api.NodeLost) }, 409, api.CodeRefused, "", "is lost"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.before != nil {
				c.before()
			}
			was := f.rev()
			p := wantProblem(t, f.do(call{method: "POST", path: c.path, body: c.body}), c.status, c.code, c.field)
			if !strings.Contains(p.Detail, c.says) {
				t.Errorf("%q does not say %q", p.Detail, c.says)
			}
			if f.rev() != was {
				t.Error("something was written")
			}
		})
	}
	wantProblem(t, f.do(call{method: "POST", path: "tasks/" + api.NewID() + "/cancel"}), 404, api.CodeNotFound, "")
}
