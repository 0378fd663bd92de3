// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// emptyVolume makes a volume that is ready.
func (f *fixture) emptyVolume(name string) api.Volume {
	f.t.Helper()
	want[any](f.t, f.do(call{method: "POST", path: "volumes", body: `{"meta":{"name":"` + name + `"},"spec":{"size":"64M"}}`}), http.StatusAccepted)
	v, err := configdb.Volumes.Find(f.db.Local(), "", name)
	if err != nil {
		f.t.Fatal(err)
	}
	return v
}

// runningVM makes a VM that is meant to run and does.
func (f *fixture) runningVM(name string, disks ...api.VMDisk) api.VM {
	f.t.Helper()
	vm := f.newVM(name, api.VMStopped, disks...)
	want[any](f.t, f.do(call{method: "POST", path: "vms/" + name + "/start"}), http.StatusAccepted)
	return f.report(vm.Meta.ID, api.VMRunning)
}

func (f *fixture) users(vol api.Volume) []string {
	return configdb.Volumes.Referrers(f.db.Local(), vol.Meta.ID)
}

func TestADiskIsAttachedToARunningVM(t *testing.T) {
	f := newFixture(t)
	vm := f.runningVM("web1")
	data := f.emptyVolume("data")
	a := f.do(call{method: "PATCH", path: "vms/web1", body: `{"spec":{"disks":[{"volume":"data"},{"size":"64M"}]}}`})
	got := want[api.VM](t, a, http.StatusOK)
	if !slices.Equal(got.Spec.Disks, []api.VMDisk{{Volume: "data", Slot: 1}, {Volume: "web1-disk0", Slot: 2}}) {
		t.Fatalf("%+v", got.Spec.Disks)
	}
	task, err := configdb.Tasks.Get(f.db.Local(), a.header.Get(headerTask))
	if err != nil || task.Spec.Action != api.ActionVMChange || task.Spec.TargetGeneration != got.Meta.Generation {
		t.Errorf("task %+v, %v", task.Spec, err)
	}
	made, err := configdb.Volumes.Find(f.db.Local(), "", "web1-disk0")
	if err != nil || made.Spec.Node != f.binding(vm.Meta.ID).Spec.Node || made.Meta.Owner != "vm/"+vm.Meta.ID {
		t.Errorf("%+v %v", made, err)
	}
	if !slices.Equal(f.users(data), []string{"vm/" + vm.Meta.ID}) {
		t.Errorf("users %v", f.users(data))
	}
	f.newVM("b", api.VMStopped)
	p := wantProblem(t, f.do(call{method: "PATCH", path: "vms/b", body: `{"spec":{"disks":[{"volume":"data"}]}}`}), 409, api.CodeRefused, "")
	if !strings.Contains(p.Detail, "vm web1") {
		t.Error(p.Detail)
	}

	// Taken out, it stays the VM's until its QEMU has let go; put back, as well.
	want[api.VM](t, f.do(call{method: "PATCH", path: "vms/web1", body: `{"spec":{"disks":[{"volume":"web1-disk0"}]}}`}), http.StatusOK)
	wantProblem(t, f.do(call{method: "PATCH", path: "vms/b", body: `{"spec":{"disks":[{"volume":"data"}]}}`}), 409, api.CodeRefused, "")
	got = want[api.VM](t, f.do(call{method: "PATCH", path: "vms/web1", body: `{"spec":{"disks":[{"volume":"web1-disk0"},{"volume":"data"}]}}`}), http.StatusOK)
	if len(f.users(data)) != 1 || len(got.Spec.Disks) != 2 {
		t.Errorf("users %v, %+v", f.users(data), got.Spec.Disks)
	}
	marks := 0
	for range f.db.Local().Scan(configdb.Root+"detach/", "") {
		marks++
	}
	if marks != 0 {
		t.Errorf("%d marks are left", marks)
	}
}

func TestADiskOfAVMAtRestIsFreeAtOnce(t *testing.T) {
	f := newFixture(t)
	data := f.emptyVolume("data")
	f.newVM("a", api.VMStopped, api.VMDisk{Volume: "data"})
	want[api.VM](t, f.do(call{method: "PATCH", path: "vms/a", body: `{"spec":{"disks":[]}}`}), http.StatusOK)
	if len(f.users(data)) != 0 {
		t.Fatalf("users %v", f.users(data))
	}
	f.runningVM("b")
	want[api.VM](t, f.do(call{method: "PATCH", path: "vms/b", body: `{"spec":{"disks":[{"volume":"data"}]}}`}), http.StatusOK)
}

func TestALiveChangeThatCannotBeIsRefusedAndChangesNothing(t *testing.T) {
	f := newFixture(t)
	f.emptyVolume("data")
	f.emptyVolume("other")
	f.runningVM("web1", api.VMDisk{Volume: "data"})
	for name, tt := range map[string]struct {
		body   string
		status int
		code   api.Code
		field  string
	}{
		"more memory than any node has": {`{"spec":{"memory":"7T"}}`, 409, api.CodeUnplaceable, ""},
		"a taken slot":                  {`{"spec":{"disks":[{"volume":"data"},{"volume":"other","slot":1}]}}`, 422, api.CodeInvalid, "spec.disks[1].slot"},
		"a slot given twice":            {`{"spec":{"disks":[{"volume":"data","slot":2},{"volume":"other","slot":2}]}}`, 422, api.CodeInvalid, "spec.disks[1].slot"},
		"a slot beyond":                 {`{"spec":{"disks":[{"volume":"data"},{"volume":"other","slot":25}]}}`, 422, api.CodeInvalid, "spec.disks[1].slot"},
		"a volume twice":                {`{"spec":{"disks":[{"volume":"data"},{"volume":"data"}]}}`, 422, api.CodeInvalid, "spec.disks[1].volume"},
		"no such volume":                {`{"spec":{"disks":[{"volume":"data"},{"volume":"nope"}]}}`, 404, api.CodeNotFound, "spec.disks[1].volume"},
		"no such network":               {`{"spec":{"nics":[{"network":"nope"}]}}`, 404, api.CodeNotFound, "spec.nics[0].network"},
		"fewer places than cpus":        {`{"spec":{"cpus":4,"maxCPUs":2}}`, 422, api.CodeInvalid, "spec.maxCPUs"},
		"less room than memory":         {`{"spec":{"memory":"1G","maxMemory":"512M"}}`, 422, api.CodeInvalid, "spec.maxMemory"},
		"what the node finds out":       {`{"spec":{"boot":{"memory":1,"maxMemory":1,"maxCPUs":1,"diskPorts":1,"nicPorts":1}}}`, 422, api.CodeInvalid, "spec.boot"},
		"an odd link":                   {`{"spec":{"nics":[{"network":"lab","link":"loose"}]}}`, 422, api.CodeInvalid, "spec.nics[0].link"},
	} {
		before := f.db.Local().Revision()
		wantProblem(t, f.do(call{method: "PATCH", path: "vms/web1", body: tt.body}), tt.status, tt.code, tt.field)
		if now := f.db.Local().Revision(); now != before {
			t.Errorf("%s: something was written", name)
		}
	}
}

func TestMemoryOfARunningVMIsReserved(t *testing.T) {
	f := newFixture(t)
	vm := f.runningVM("web1")
	want[api.VM](t, f.do(call{method: "PATCH", path: "vms/web1", body: `{"spec":{"memory":"1G","cpus":2}}`}), http.StatusOK)
	if _, ok := f.db.Local().Get("test/reserve/" + f.binding(vm.Meta.ID).Spec.NodeID); !ok {
		t.Error("nothing was reserved")
	}
}
