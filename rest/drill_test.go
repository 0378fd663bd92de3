// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// canary makes a running VM that may be drilled.
func (f *fixture) canary(name string) string {
	f.t.Helper()
	vm := f.movableVM(name, api.VMDisk{Size: api.GiB, Pool: "shared"})
	f.setCanary(vm.Meta.ID, func(vm *api.VM, b *api.Binding) {
		vm.Spec.HA, vm.Spec.Recovery, b.Spec.Protected = api.HARestart, &api.VMRecovery{Drill: api.DrillManual}, true
	})
	return vm.Meta.ID
}

func (f *fixture) setCanary(id string, change func(*api.VM, *api.Binding)) {
	f.t.Helper()
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		vm, err := configdb.VMs.Get(v, id)
		if err != nil {
			return err
		}
		b, err := configdb.Bindings.Get(v, id)
		if err != nil {
			return err
		}
		change(&vm, &b)
		if err := configdb.VMs.UpdateSpec(v, tx, &vm); err != nil {
			return err
		}
		if err := configdb.VMs.UpdateStatus(v, tx, &vm); err != nil {
			return err
		}
		return configdb.Bindings.UpdateSpec(v, tx, &b)
	})
}

func (f *fixture) drillOf(id string) api.Drill {
	f.t.Helper()
	d, err := configdb.Drills.Get(f.db.Local(), id)
	if err != nil {
		f.t.Fatal(err)
	}
	return d
}

func TestADrillBeginsWithItsTask(t *testing.T) {
	f := newFixture(t)
	id := f.canary("web1")
	r := want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/drill", role: api.RoleOperator}), http.StatusAccepted)
	d, b := f.drillOf(id), f.binding(id)
	if r.Task.Spec.Action != api.ActionVMDrill || d.Spec.TaskID != r.Task.Meta.ID || d.Spec.NodeID != b.Spec.NodeID || d.Spec.Epoch != 1 || d.Spec.Due != nil || d.Status.Phase != api.TaskPending {
		t.Fatalf("%+v, %+v", r.Task.Spec, d)
	}
	// Nothing else works on the VM meanwhile.
	for _, c := range []call{
		{method: "POST", path: "vms/web1/drill"}, {method: "POST", path: "vms/web1/migrate"},
		{method: "PATCH", path: "vms/web1", body: `{"spec":{"cpus":2}}`},
	} {
		wantRefusal(t, f.do(c), "is being drilled; wait for task "+d.Spec.TaskID)
	}
	want[vmReply](t, f.do(call{method: "POST", path: "tasks/" + d.Spec.TaskID + "/cancel", role: api.RoleOperator}), http.StatusAccepted)
	if !f.drillOf(id).Spec.Cancel {
		t.Error("it is not cancelled")
	}
	// The next one keeps when a drill succeeded last.
	at := time.Now().UTC()
	set := func(change func(s *api.DrillStatus)) {
		f.txn(func(v *configdb.View, tx *configdb.Txn) error {
			d, err := configdb.Drills.Get(v, id)
			if err != nil {
				return err
			}
			change(&d.Status)
			return configdb.Drills.UpdateStatus(v, tx, &d)
		})
	}
	set(func(s *api.DrillStatus) { s.Phase, s.SucceededAt, s.Epoch = api.TaskSucceeded, &at, 2 })
	want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/drill"}), http.StatusAccepted)
	d = f.drillOf(id)
	if s := d.Status; s.SucceededAt == nil || !s.SucceededAt.Equal(at) || s.Epoch != 0 || d.Spec.Cancel {
		t.Errorf("%+v", d)
	}
	set(func(s *api.DrillStatus) { s.Epoch, s.Node = 2, "m2" })
	wantRefusal(t, f.do(call{method: "POST", path: "tasks/" + d.Spec.TaskID + "/cancel"}), "is bound to node m2 already")
}

func TestADrillIsRefused(t *testing.T) {
	for words, change := range map[string]func(f *fixture, id string){
		"not protected": func(f *fixture, id string) {
			f.setCanary(id, func(vm *api.VM, _ *api.Binding) { vm.Spec.HA = api.HANone })
		},
		"not meant for drills": func(f *fixture, id string) {
			f.setCanary(id, func(vm *api.VM, _ *api.Binding) { vm.Spec.Recovery.Drill = "" })
		},
		"does not protect": func(f *fixture, id string) {
			f.setCanary(id, func(_ *api.VM, b *api.Binding) { b.Spec.Protected = false })
		},
		"only a running vm": func(f *fixture, id string) {
			f.setCanary(id, func(vm *api.VM, _ *api.Binding) { vm.Status.Phase = api.VMStarting })
		},
		"is in maintenance":            func(f *fixture, _ string) { f.setNode("m2", func(n *api.Node) { n.Spec.Maintenance = true }) },
		"would not restart if 2 nodes": func(f *fixture, _ string) { f.ha.broken = true },
		"is lost":                      func(f *fixture, _ string) { f.setNode("m2", func(n *api.Node) { n.Status.Phase = api.NodeLost }) },
		"stopping":                     func(f *fixture, _ string) { f.setNode("m2", func(n *api.Node) { n.Status.Stopping = true }) },
		"is being suspended; wait": func(f *fixture, id string) {
			f.txn(func(_ *configdb.View, tx *configdb.Txn) error {
				op := api.Operation{Meta: api.NewMeta(api.KindOperation, "", "web1"), Spec: api.OperationSpec{Action: api.ActionVMSuspend, TaskID: "t"}}
				op.Meta.ID = id
				return configdb.Operations.CreateUnnamed(tx, &op)
			})
		},
	} {
		t.Run(words, func(t *testing.T) {
			f := newFixture(t)
			id := f.canary("web1")
			change(f, id)
			wantRefusal(t, f.do(call{method: "POST", path: "vms/web1/drill"}), words)
			if _, err := configdb.Drills.Get(f.db.Local(), id); err == nil {
				t.Error("there is a drill all the same")
			}
		})
	}
}

// wantRefusal is a refusal that says something.
func wantRefusal(t *testing.T, a answer, words string) {
	t.Helper()
	if p := wantProblem(t, a, http.StatusConflict, api.CodeRefused, ""); !strings.Contains(p.Detail, words) {
		t.Errorf("%q does not say %q", p.Detail, words)
	}
}
