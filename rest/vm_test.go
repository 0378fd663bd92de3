// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

func TestCreateVMMakesVolumesBindingAndTask(t *testing.T) {
	f := newFixture(t)
	body := vmBody("web1", api.VMDisk{Image: "tiny"}, api.VMDisk{Size: 64 * api.MiB})
	body["spec"].(map[string]any)["ha"] = "restart"
	a := f.do(call{method: "POST", path: "vms", body: body, role: api.RoleOperator})
	r := want[vmReply](t, a, http.StatusAccepted)
	if a.header.Get("Location") != base+"tasks/"+r.Task.Meta.ID || a.header.Get(headerNode) != "m1" || a.header.Get(headerRevision) != fmt.Sprint(r.Revision) {
		t.Errorf("headers %v", a.header)
	}
	if r.Task.Spec.Action != api.ActionVMCreate || r.Task.Spec.TargetID != r.Object.Meta.ID || r.Task.Spec.Actor != "operator" || r.Task.Spec.TargetEpoch != 1 || r.Task.Spec.Deadline.IsZero() {
		t.Errorf("task %+v", r.Task.Spec)
	}
	wantDisks := []api.VMDisk{{Volume: "web1-disk0", Slot: 1}, {Volume: "web1-disk1", Slot: 2}}
	if !slices.Equal(r.Object.Spec.Disks, wantDisks) || r.Object.Status.Phase != api.VMCreating || r.Object.Status.Epoch != 1 {
		t.Errorf("vm %+v", r.Object)
	}
	b := f.binding(r.Object.Meta.ID)
	if b.Spec.Epoch != 1 || !b.Spec.Protected || b.Spec.Node != r.Object.Status.Node || b.Meta.Name != "web1" {
		t.Errorf("binding %+v", b)
	}
	v := f.db.Local()
	vol, err := configdb.Volumes.Find(v, "", "web1-disk0")
	if err != nil {
		t.Fatal(err)
	}
	if vol.Spec != (api.VolumeSpec{Pool: "shared", Image: "tiny", Node: b.Spec.Node}) || vol.Meta.Owner != "vm/"+r.Object.Meta.ID || vol.Status.Phase != api.StoragePending {
		t.Errorf("volume %+v", vol)
	}
	if refs := configdb.Volumes.Referrers(v, vol.Meta.ID); !slices.Equal(refs, []string{"vm/" + r.Object.Meta.ID}) {
		t.Errorf("volume referrers %v", refs)
	}
	img, _ := configdb.Images.Find(v, "", "tiny")
	if refs := configdb.Images.Referrers(v, img.Meta.ID); !slices.Equal(refs, []string{"volume/" + vol.Meta.ID}) {
		t.Errorf("image referrers %v", refs)
	}
	wantAsked := []api.VMDisk{{Pool: "shared", Image: "tiny"}, {Pool: "local", Size: 64 * api.MiB}}
	if !slices.Equal(f.placer.asked, wantAsked) {
		t.Errorf("placer was asked for %v", f.placer.asked)
	}
}

func TestCreateVMRefusesBadInput(t *testing.T) {
	f := newFixture(t)
	long := strings.Repeat("a", 60)
	tests := []struct {
		name, body string
		status     int
		code       api.Code
		field      string
	}{
		{"no JSON", `{"meta":`, 400, api.CodeInvalid, ""},
		{"text", `hello`, 400, api.CodeInvalid, ""},
		{"empty body", ``, 400, api.CodeInvalid, ""},
		{"an array", `[]`, 422, api.CodeInvalid, ""},
		{"two values", `{"meta":{"name":"a"}} {}`, 400, api.CodeInvalid, ""},
		{"unknown field", `{"meta":{"name":"a"},"spec":{"cpuz":1}}`, 422, api.CodeInvalid, "spec.cpuz"},
		{"unknown top field", `{"metadata":{"name":"a"}}`, 422, api.CodeInvalid, "metadata"},
		{"unknown disk field", `{"meta":{"name":"a"},"spec":{"disks":[{"size":1},{"seize":2}]}}`, 422, api.CodeInvalid, "spec.disks[1].seize"},
		{"wrong type", `{"meta":{"name":"a"},"spec":{"cpus":"two"}}`, 422, api.CodeInvalid, "spec.cpus"},
		{"wrong type of a size", `{"meta":{"name":"a"},"spec":{"memory":true}}`, 422, api.CodeInvalid, "spec.memory"},
		{"size is no size", `{"meta":{"name":"a"},"spec":{"memory":"lots"}}`, 422, api.CodeInvalid, "spec.memory"},
		{"absurd memory", `{"meta":{"name":"a"},"spec":{"memory":"900T"}}`, 422, api.CodeInvalid, "spec.memory"},
		{"memory beyond numbers", `{"meta":{"name":"a"},"spec":{"memory":"99999999999T"}}`, 422, api.CodeInvalid, "spec.memory"},
		{"negative memory", `{"meta":{"name":"a"},"spec":{"memory":-1}}`, 422, api.CodeInvalid, "spec.memory"},
		{"absurd cpus", `{"meta":{"name":"a"},"spec":{"cpus":100000}}`, 422, api.CodeInvalid, "spec.cpus"},
		{"absurd disk", `{"meta":{"name":"a"},"spec":{"disks":[{"size":"9000T"}]}}`, 422, api.CodeInvalid, "spec.disks[0].size"},
		{"empty disk", `{"meta":{"name":"a"},"spec":{"disks":[{}]}}`, 422, api.CodeInvalid, "spec.disks[0]"},
		{"name with ../", `{"meta":{"name":"../../etc/passwd"}}`, 422, api.CodeInvalid, "meta.name"},
		{"no name", `{"spec":{}}`, 422, api.CodeInvalid, "meta.name"},
		{"project with ../", `{"meta":{"name":"a","project":"../x"}}`, 422, api.CodeInvalid, "meta.project"},
		{"volume with ../", `{"meta":{"name":"a"},"spec":{"disks":[{"volume":"../x"}]}}`, 422, api.CodeInvalid, "spec.disks[0].volume"},
		{"wrong kind", `{"meta":{"name":"a","kind":"image"}}`, 422, api.CodeInvalid, "meta.kind"},
		{"name too long for its volumes", `{"meta":{"name":"` + long + `"},"spec":{"disks":[{"size":"64M"}]}}`, 422, api.CodeInvalid, "meta.name"},
		{"born paused", `{"meta":{"name":"a"},"spec":{"power":"paused"}}`, 422, api.CodeInvalid, "spec.power"},
		{"no such image", `{"meta":{"name":"a"},"spec":{"disks":[{"image":"nope"}]}}`, 404, api.CodeNotFound, "spec.disks[0].image"},
		{"no such pool", `{"meta":{"name":"a"},"spec":{"disks":[{"pool":"nope","size":"64M"}]}}`, 404, api.CodeNotFound, "spec.disks[0].pool"},
		{"no such volume", `{"meta":{"name":"a"},"spec":{"disks":[{"volume":"nope"}]}}`, 404, api.CodeNotFound, "spec.disks[0].volume"},
		{"volume and image", `{"meta":{"name":"a"},"spec":{"disks":[{"volume":"v","image":"tiny"}]}}`, 422, api.CodeInvalid, "spec.disks[0]"},
		{"smaller than the image", `{"meta":{"name":"a"},"spec":{"disks":[{"image":"tiny","size":"1M"}]}}`, 422, api.CodeInvalid, "spec.disks[0].size"},
		{"clone in another pool", `{"meta":{"name":"a"},"spec":{"disks":[{"image":"tiny","pool":"local"}]}}`, 409, api.CodeRefused, "spec.disks[0].pool"},
		{"too large", `{"meta":{"name":"` + strings.Repeat("a", 2<<20) + `"}}`, 413, api.CodeTooLarge, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := f.db.Local().Revision()
			wantProblem(t, f.do(call{method: "POST", path: "vms", body: tt.body}), tt.status, tt.code, tt.field)
			if now := f.db.Local().Revision(); now != before {
				t.Errorf("something was written: revision %d, was %d", now, before)
			}
		})
	}
}

func TestVolumeIsAttachedToOneVMOnly(t *testing.T) {
	f := newFixture(t)
	r := f.do(call{method: "POST", path: "volumes", body: `{"meta":{"name":"data"},"spec":{"size":"64M"}}`})
	want[any](t, r, http.StatusAccepted)
	f.newVM("a", api.VMStopped, api.VMDisk{Volume: "data"})
	p := wantProblem(t, f.do(call{method: "POST", path: "vms", body: vmBody("b", api.VMDisk{Volume: "data"})}), 409, api.CodeRefused, "")
	if !strings.Contains(p.Detail, "vm a") {
		t.Errorf("the detail does not name the vm: %s", p.Detail)
	}
	p = wantProblem(t, f.do(call{method: "DELETE", path: "volumes/data"}), 409, api.CodeRefused, "")
	if !strings.Contains(p.Detail, "vm a") {
		t.Errorf("the detail does not name the vm: %s", p.Detail)
	}
}

func TestConcurrentCreatesOfOneNameHaveOneWinner(t *testing.T) {
	f := newFixture(t)
	const clients = 16
	var wg sync.WaitGroup
	results := make([]answer, clients)
	for i := range clients {
		wg.Go(func() {
			node := []string{"m1", "m2"}[i%2]
			results[i], _ = f.try(call{method: "POST", path: "vms", node: node, body: vmBody("web1", api.VMDisk{Size: 64 * api.MiB})})
		})
	}
	wg.Wait()
	won := 0
	for _, a := range results {
		if a.status == http.StatusAccepted {
			won++
			continue
		}
		wantProblem(t, a, 409, api.CodeExists, "")
	}
	vols, _ := configdb.Volumes.List(f.db.Local())
	if won != 1 || len(vols) != 1 {
		t.Errorf("%d creates won and left %d volumes, want 1 and 1", won, len(vols))
	}
}

func TestConcurrentStartsNeverOverCommit(t *testing.T) {
	f := newFixture(t)
	const vms = 100
	for i := range vms {
		f.newVM(fmt.Sprintf("vm%d", i), api.VMStopped)
	}
	var wg sync.WaitGroup
	results := make([]answer, vms)
	for i := range vms {
		wg.Go(func() {
			node := []string{"m1", "m2"}[i%2]
			for range 30 { // a slow machine lets the deadline pass: nothing was changed then
				results[i], _ = f.try(call{method: "POST", path: fmt.Sprintf("vms/vm%d/start", i), node: node})
				if results[i].status != http.StatusGatewayTimeout {
					return
				}
			}
		})
	}
	wg.Wait()
	started := 0
	for i, a := range results {
		switch a.status {
		case http.StatusAccepted:
			started++
		case http.StatusConflict:
			wantProblem(t, a, 409, api.CodeUnplaceable, "")
		default:
			t.Errorf("start %d: %d %s", i, a.status, a.body)
		}
	}
	const fit = 16 // two nodes with 4 GiB for VMs of 512 MiB
	if started != fit {
		t.Errorf("%d VMs started, want %d", started, fit)
	}
	for node, id := range f.nodeIDs {
		if u := used(f.db.Local(), id, ""); u > f.placer.capacity {
			t.Errorf("node %s carries %s", node, u)
		}
	}
}

func TestStartKeepsTheBindingWithoutTheOwnersWord(t *testing.T) {
	tests := []struct {
		name   string
		spoil  func(vm *api.VM)
		moves  bool
		reason string
	}{
		{"owner says stopped", func(*api.VM) {}, true, ""},
		{"still stopping", func(vm *api.VM) { vm.Status.Phase = api.VMStopping }, false, ""},
		{"never looked at", func(vm *api.VM) { vm.Status.Phase = api.VMCreating }, false, ""},
		{"failed", func(vm *api.VM) { vm.Status.Phase = api.VMFailed }, false, ""},
		{"unknown", func(vm *api.VM) { vm.Status.Phase = api.VMUnknown }, false, ""},
		{"said about an older wish", func(vm *api.VM) { vm.Status.ObservedGeneration-- }, false, ""},
		{"said under another epoch", func(vm *api.VM) { vm.Status.Epoch++ }, false, ""},
		{"stopped but with a process", func(vm *api.VM) { vm.Status.PID = 5 }, false, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t)
			vm := f.newVM("web1", api.VMStopped)
			home := f.binding(vm.Meta.ID).Spec.Node
			f.txn(func(v *configdb.View, tx *configdb.Txn) error {
				got, err := configdb.VMs.Get(v, vm.Meta.ID)
				if err != nil {
					return err
				}
				tt.spoil(&got)
				return configdb.VMs.UpdateStatus(v, tx, &got)
			})
			f.placer.setFull(home, true)
			a := f.do(call{method: "POST", path: "vms/web1/start"})
			b := f.binding(vm.Meta.ID)
			if !tt.moves {
				wantProblem(t, a, 409, api.CodeUnplaceable, "")
				if b.Spec.Epoch != 1 || b.Spec.Node != home {
					t.Fatalf("the binding was changed: %+v", b.Spec)
				}
				// With room at home it starts there, under the same epoch.
				f.placer.setFull(home, false)
				want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/start"}), 202)
				if b = f.binding(vm.Meta.ID); b.Spec.Epoch != 1 || b.Spec.Node != home {
					t.Fatalf("the binding was changed: %+v", b.Spec)
				}
				return
			}
			r := want[vmReply](t, a, 202)
			if b.Spec.Epoch != 2 || b.Spec.Node == home || r.Task.Spec.TargetEpoch != 2 {
				t.Fatalf("binding %+v, task %+v", b.Spec, r.Task.Spec)
			}
			s := r.Object.Status
			if s.Phase != api.VMStarting || s.Node != b.Spec.Node || s.Epoch != 2 || s.ObservedGeneration >= r.Object.Meta.Generation {
				t.Fatalf("status was not handed over: %+v", s)
			}
		})
	}
}

func TestStartOnALostNode(t *testing.T) {
	f := newFixture(t)
	vm := f.newVM("web1", api.VMStopping)
	home := f.binding(vm.Meta.ID).Spec.Node
	f.setNodePhase(home, api.NodeLost)
	p := wantProblem(t, f.do(call{method: "POST", path: "vms/web1/start"}), 409, api.CodeRefused, "")
	if !strings.Contains(p.Detail, "lost") || f.binding(vm.Meta.ID).Spec.Epoch != 1 {
		t.Errorf("%s %+v", p.Detail, f.binding(vm.Meta.ID).Spec)
	}
	// The owner's word from before it was lost still holds.
	f.report(vm.Meta.ID, api.VMStopped)
	want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/start"}), 202)
	if b := f.binding(vm.Meta.ID); b.Spec.Epoch != 2 || b.Spec.Node == home {
		t.Errorf("binding %+v", b.Spec)
	}
}

func TestStartAdoptsTheHAPolicy(t *testing.T) {
	f := newFixture(t)
	vm := f.newVM("web1", api.VMStopped)
	want[api.VM](t, f.do(call{method: "PATCH", path: "vms/web1", body: `{"spec":{"ha":"restart"}}`}), 200)
	if f.binding(vm.Meta.ID).Spec.Protected {
		t.Fatal("a PATCH changed the binding")
	}
	// Not yet observed: the binding is left alone.
	f.report(vm.Meta.ID, api.VMStopped)
	want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/start"}), 202)
	if b := f.binding(vm.Meta.ID); !b.Spec.Protected || b.Spec.Epoch != 1 {
		t.Errorf("binding %+v", b.Spec)
	}
}

func TestPowerActions(t *testing.T) {
	type step struct {
		verb, body string
		status     int
		power      api.PowerState
		generation uint64
	}
	const newborn = 1
	tests := []struct {
		name  string
		power api.PowerState
		phase api.VMPhase
		steps []step
	}{
		{"stop a running VM", api.PowerRunning, api.VMRunning, []step{{"stop", "", 202, api.PowerStopped, 3}}},
		{"force hastens a stop", api.PowerRunning, api.VMRunning, []step{{"stop", "{}", 202, api.PowerStopped, 3}, {"stop", `{"force":true}`, 202, api.PowerStopped, 4}, {"stop", `{"force":true}`, 202, api.PowerStopped, 4}}},
		{"stop a stopped VM", api.PowerStopped, api.VMStopped, []step{{"stop", "", 202, api.PowerStopped, newborn}, {"stop", `{"force":true}`, 202, api.PowerStopped, newborn}}},
		{"start a running VM", api.PowerRunning, api.VMRunning, []step{{"start", "", 202, api.PowerRunning, 2}}},
		{"pause and resume", api.PowerRunning, api.VMRunning, []step{{"pause", "", 202, api.PowerPaused, 3}, {"pause", "", 202, api.PowerPaused, 3}, {"start", "", 409, "", 0}, {"reboot", "", 409, "", 0}, {"resume", "", 202, api.PowerRunning, 4}, {"resume", "", 202, api.PowerRunning, 4}}},
		{"reboot", api.PowerRunning, api.VMRunning, []step{{"reboot", "", 202, api.PowerRunning, 3}, {"reboot", "", 202, api.PowerRunning, 4}}},
		{"not while stopped", api.PowerStopped, api.VMStopped, []step{{"pause", "", 409, "", 0}, {"resume", "", 409, "", 0}, {"reboot", "", 409, "", 0}}},
		{"not resumed into a start", api.PowerRunning, api.VMRunning, []step{{"pause", "", 202, api.PowerPaused, 3}, {"fail", "", 0, "", 0}, {"resume", "", 409, "", 0}, {"pause", "", 409, "", 0}}},
		{"not while starting", api.PowerRunning, api.VMStarting, []step{{"pause", "", 409, "", 0}, {"reboot", "", 409, "", 0}}},
		{"force belongs to stop", api.PowerRunning, api.VMRunning, []step{{"start", `{"force":true}`, 422, "", 0}, {"stop", `{"hard":true}`, 422, "", 0}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t)
			vm := f.newVM("web1", api.VMStopped)
			if tt.power != api.PowerStopped {
				want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/start"}), 202)
			}
			f.report(vm.Meta.ID, tt.phase)
			for _, s := range tt.steps {
				if s.verb == "fail" {
					f.report(vm.Meta.ID, api.VMFailed)
					continue
				}
				a := f.do(call{method: "POST", path: "vms/web1/" + s.verb, body: s.body, role: api.RoleOperator})
				if a.status != s.status {
					t.Fatalf("%s: %d %s", s.verb, a.status, a.body)
				}
				if s.status != 202 {
					continue
				}
				r := want[vmReply](t, a, 202)
				if r.Object.Spec.Power != s.power || r.Object.Meta.Generation != s.generation || r.Task.Spec.TargetGeneration != s.generation {
					t.Fatalf("%s: power %s, generation %d, task generation %d", s.verb, r.Object.Spec.Power, r.Object.Meta.Generation, r.Task.Spec.TargetGeneration)
				}
				if s.verb == "reboot" && (r.Task.Spec.TargetReboots != r.Object.Spec.Reboots || r.Object.Spec.Reboots == 0) {
					t.Fatalf("reboots %d, task %d", r.Object.Spec.Reboots, r.Task.Spec.TargetReboots)
				}
			}
		})
	}
}

func TestPatchVM(t *testing.T) {
	f := newFixture(t)
	vm := f.newVM("web1", api.VMStopped, api.VMDisk{Size: 64 * api.MiB})
	got := want[api.VM](t, f.do(call{method: "PATCH", path: "vms/web1", body: `{"meta":{"labels":{"tier":"web"}},"spec":{"cpus":2,"memory":"1G"}}`,
		header: map[string]string{"Content-Type": "application/merge-patch+json"}}), 200)
	if got.Spec.CPUs != 2 || got.Spec.Memory != api.GiB || got.Meta.Labels["tier"] != "web" || len(got.Spec.Disks) != 1 {
		t.Fatalf("%+v", got)
	}
	got = want[api.VM](t, f.do(call{method: "PATCH", path: "vms/web1", body: `{"meta":{"labels":{"tier":null}}}`}), 200)
	if len(got.Meta.Labels) != 0 {
		t.Fatalf("label was not removed: %v", got.Meta.Labels)
	}
	tests := []struct {
		name, body string
		status     int
		code       api.Code
		field      string
	}{
		{"status", `{"status":{"phase":"running"}}`, 422, api.CodeInvalid, "status"},
		{"name", `{"meta":{"name":"other"}}`, 422, api.CodeInvalid, "meta"},
		{"unknown field", `{"spec":{"cpuz":3}}`, 422, api.CodeInvalid, "spec.cpuz"},
		{"no object", `3`, 422, api.CodeInvalid, ""},
		{"reboots", `{"spec":{"reboots":9}}`, 422, api.CodeInvalid, "spec.reboots"},
		{"paused from stopped", `{"spec":{"power":"paused"}}`, 409, api.CodeRefused, ""},
		{"absurd", `{"spec":{"cpus":-4}}`, 422, api.CodeInvalid, "spec.cpus"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			wantProblem(t, f.do(call{method: "PATCH", path: "vms/web1", body: tt.body}), tt.status, tt.code, tt.field)
		})
	}
	wantProblem(t, f.do(call{method: "PATCH", path: "vms/web1", body: `{}`, header: map[string]string{"Content-Type": "application/json-patch+json"}}), 422, api.CodeInvalid, "Content-Type")

	f.report(vm.Meta.ID, api.VMStopped)
	a := f.do(call{method: "PATCH", path: "vms/web1", body: `{"spec":{"power":"running"}}`})
	got = want[api.VM](t, a, 200)
	if got.Spec.Power != api.PowerRunning || a.header.Get(headerTask) == "" {
		t.Fatalf("power %s, task %q", got.Spec.Power, a.header.Get(headerTask))
	}
	f.report(vm.Meta.ID, api.VMRunning)
	if got = want[api.VM](t, f.do(call{method: "PATCH", path: "vms/web1", body: `{"spec":{"cpus":4}}`}), 200); got.Spec.CPUs != 4 {
		t.Error(got.Spec.CPUs)
	}
	want[api.VM](t, f.do(call{method: "PATCH", path: "vms/web1", body: `{"spec":{"ha":"restart"}}`}), 200)
}

func TestPutVMAndIfMatch(t *testing.T) {
	f := newFixture(t)
	f.newVM("web1", api.VMStopped)
	a := f.do(call{method: "GET", path: "vms/web1"})
	vm := want[api.VM](t, a, 200)
	tag := a.header.Get("ETag")
	if tag != fmt.Sprintf("%q", fmt.Sprint(vm.Meta.Revision)) {
		t.Fatalf("ETag %s of revision %d", tag, vm.Meta.Revision)
	}
	vm.Meta.Labels = map[string]string{"a": "b"}
	vm.Spec.CPUs = 3
	put := call{method: "PUT", path: "vms/web1", body: vm, header: map[string]string{"If-Match": tag}}
	a = f.do(put)
	if got := want[api.VM](t, a, 200); got.Spec.CPUs != 3 || a.header.Get("ETag") == tag {
		t.Fatalf("%+v %s", got.Spec, a.header.Get("ETag"))
	}
	wantProblem(t, f.do(put), 412, api.CodeConflict, "")
	wantProblem(t, f.do(call{method: "DELETE", path: "vms/web1", header: map[string]string{"If-Match": tag}}), 412, api.CodeConflict, "")
	wantProblem(t, f.do(call{method: "PATCH", path: "vms/web1", body: `{}`, header: map[string]string{"If-Match": tag}}), 412, api.CodeConflict, "")
	wantProblem(t, f.do(call{method: "PATCH", path: "vms/web1", body: `{}`, header: map[string]string{"If-Match": "17"}}), 422, api.CodeInvalid, "If-Match")
	vm.Meta.Name = "web2"
	wantProblem(t, f.do(call{method: "PUT", path: "vms/web1", body: vm}), 422, api.CodeInvalid, "meta.name")
}

func TestDeleteVM(t *testing.T) {
	f := newFixture(t)
	vm := f.newVM("web1", api.VMStopped)
	want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/start"}), 202)
	f.report(vm.Meta.ID, api.VMRunning)
	wantProblem(t, f.do(call{method: "DELETE", path: "vms/web1"}), 409, api.CodeRefused, "")
	wantProblem(t, f.do(call{method: "DELETE", path: "vms/web1?force=perhaps"}), 422, api.CodeInvalid, "force")
	r := want[vmReply](t, f.do(call{method: "DELETE", path: "vms/web1?force=true", role: api.RoleOperator}), 202)
	if r.Object.Meta.DeletingAt == nil || r.Object.Spec.Power != api.PowerStopped || !r.Object.Spec.ForceStop || r.Task.Spec.Action != api.ActionVMDelete {
		t.Fatalf("%+v", r)
	}
	wantProblem(t, f.do(call{method: "POST", path: "vms/web1/start"}), 409, api.CodeRefused, "")
	wantProblem(t, f.do(call{method: "PATCH", path: "vms/web1", body: `{"spec":{"ha":"none"}}`}), 409, api.CodeRefused, "")
	want[vmReply](t, f.do(call{method: "DELETE", path: "vms/web1"}), 202) // again is no error
	wantProblem(t, f.do(call{method: "DELETE", path: "vms/nope"}), 404, api.CodeNotFound, "")
}

func TestWaitForATask(t *testing.T) {
	f := newFixture(t)
	f.newVM("web1", api.VMStopped)
	r := want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/stop?wait=10ms"}), 202)
	wantProblem(t, f.do(call{method: "POST", path: "vms/web1/stop?wait=301s"}), 422, api.CodeInvalid, "wait")
	wantProblem(t, f.do(call{method: "POST", path: "vms/web1/stop?wait=soon"}), 422, api.CodeInvalid, "wait")
	done := make(chan answer)
	go func() {
		a, _ := f.try(call{method: "GET", path: "tasks/" + r.Task.Meta.ID + "?wait=60s"})
		done <- a
	}()
	f.endTask(r.Task.Meta.ID, api.TaskSucceeded)
	if task := want[api.Task](t, <-done, 200); task.Status.Phase != api.TaskSucceeded {
		t.Fatalf("%+v", task.Status)
	}
	// The reply to the request itself waits, too.
	go func() {
		a, _ := f.try(call{method: "POST", path: "vms/web1/stop?wait=60s", header: map[string]string{headerIdemKey: "w"}})
		done <- a
	}()
	id := f.awaitTask(func(task api.Task) bool {
		return task.Spec.Action == api.ActionVMStop && task.Meta.ID != r.Task.Meta.ID
	})
	f.endTask(id, api.TaskFailed)
	if r := want[vmReply](t, <-done, 200); r.Task.Status.Phase != api.TaskFailed || r.Task.Meta.ID != id {
		t.Fatalf("%+v", r.Task)
	}
}

// awaitTask follows the store until a task is as wished.
func (f *fixture) awaitTask(ok func(api.Task) bool) string {
	f.t.Helper()
	deadline := time.After(20 * time.Second)
	w := f.db.Watch(configdb.Tasks.SpecPrefix(), 0)
	for {
		tasks, _ := configdb.Tasks.List(f.db.Local())
		for _, task := range tasks {
			if ok(task) {
				return task.Meta.ID
			}
		}
		select {
		case <-deadline:
			f.t.Fatal("no such task")
		default:
		}
		if _, err := w.Next(f.t.Context()); err != nil {
			f.t.Fatal(err)
		}
	}
}
