// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// machineBody is a new VM with fields of its machine.
func machineBody(name, fields string) string {
	return fmt.Sprintf(`{"meta":{"name":%q},"spec":{"cpus":2,"memory":"256M","disks":[{"image":"tiny"}]%s}}`, name, fields)
}

func (f *fixture) volume(name string) (api.Volume, bool) {
	vol, err := configdb.Volumes.Find(f.db.Local(), "", name)
	return vol, err == nil
}

func TestCreateVMMakesTheStateOfItsMachine(t *testing.T) {
	f := newFixture(t)
	a := f.do(call{method: "POST", path: "vms", body: machineBody("web1", `,"firmware":{"type":"uefi","secureBoot":true,"volume":"mine"},"tpm":{"volume":"mine"},"vsock":{},"cdroms":[{"image":"tiny"},{}]`), role: api.RoleOperator})
	vm := want[vmReply](t, a, http.StatusAccepted).Object
	s := vm.Spec
	if s.Firmware.Volume != "web1-uefi" || s.TPM.Volume != "web1-tpm" || s.Vsock.CID < api.MinVsockCID {
		t.Errorf("spec %+v", s)
	}
	owner := "vm/" + vm.Meta.ID
	for name, content := range map[string]api.VolumeContent{"web1-uefi": api.ContentUEFISecure, "web1-tpm": api.ContentTPM} {
		vol, ok := f.volume(name)
		if !ok || vol.Spec.Content != content || vol.Spec.Pool != "shared" || vol.Meta.Owner != owner || vol.Spec.Node != f.binding(vm.Meta.ID).Spec.Node {
			t.Errorf("%s: %+v", name, vol)
		}
		// Nobody else gets it as a disk.
		body := vmBody("thief", api.VMDisk{Volume: name})
		wantProblem(t, f.do(call{method: "POST", path: "vms", body: body, role: api.RoleOperator}), http.StatusConflict, api.CodeRefused, "spec.disks[0].volume")
	}
	img, _ := configdb.Images.Find(f.db.Local(), "", "tiny")
	if refs := configdb.Images.Referrers(f.db.Local(), img.Meta.ID); !slices.Contains(refs, owner) {
		t.Errorf("the image in the drive can be deleted: %v", refs)
	}
	taken := fmt.Sprintf(`,"vsock":{"cid":%d}`, s.Vsock.CID)
	wantProblem(t, f.do(call{method: "POST", path: "vms", body: machineBody("web2", taken), role: api.RoleOperator}), http.StatusConflict, api.CodeRefused, "spec.vsock.cid")
}

func TestExtraArgumentsAreForAdministrators(t *testing.T) {
	f := newFixture(t)
	body := machineBody("web1", `,"extraArgs":["-device","edu,secret=x"]`)
	wantProblem(t, f.do(call{method: "POST", path: "vms", body: body, role: api.RoleOperator}), http.StatusForbidden, api.CodeForbidden, "spec.extraArgs")
	want[vmReply](t, f.do(call{method: "POST", path: "vms", body: body, role: api.RoleAdministrator}), http.StatusAccepted)
	f.stopped("web1")
	clear := `{"spec":{"extraArgs":null}}`
	wantProblem(t, f.do(call{method: "PATCH", path: "vms/web1", body: clear, role: api.RoleOperator}), http.StatusForbidden, api.CodeForbidden, "spec.extraArgs")
	// An operator may change the rest of such a VM.
	want[api.VM](t, f.do(call{method: "PATCH", path: "vms/web1", body: `{"spec":{"memory":"128M"}}`, role: api.RoleOperator}), http.StatusOK)
	f.stopped("web1")
	want[api.VM](t, f.do(call{method: "PATCH", path: "vms/web1", body: `{"spec":{"extraArgs":["-global","a=b"]}}`, role: api.RoleAdministrator}), http.StatusOK)
	events, err := configdb.Events.List(f.db.Local())
	if err != nil {
		t.Fatal(err)
	}
	var texts []string
	for i := range events {
		texts = append(texts, events[i].Spec.Message)
	}
	all := strings.Join(texts, "\n")
	if !strings.Contains(all, "spec.extraArgs: -device") || !strings.Contains(all, "spec.extraArgs: -global") || strings.Contains(all, "secret") || strings.Contains(all, "a=b") {
		t.Errorf("audit trail:\n%s", all)
	}
}

// stopped lets the owner say that a VM is stopped.
func (f *fixture) stopped(name string) {
	f.t.Helper()
	vm, err := configdb.VMs.Find(f.db.Local(), "", name)
	if err != nil {
		f.t.Fatal(err)
	}
	f.report(vm.Meta.ID, api.VMStopped)
}

func TestTheMachineOfAStoppedVMIsChanged(t *testing.T) {
	f := newFixture(t)
	want[vmReply](t, f.do(call{method: "POST", path: "vms", body: machineBody("web1", ""), role: api.RoleOperator}), http.StatusAccepted)
	f.stopped("web1")
	patch := func(body string) call {
		return call{method: "PATCH", path: "vms/web1", body: body, role: api.RoleOperator}
	}
	set := func(body string) api.VM {
		t.Helper()
		return want[api.VM](t, f.do(patch(body)), http.StatusOK)
	}
	now := set(`{"spec":{"firmware":{"type":"uefi"},"tpm":{},"watchdog":{"action":"pause"},"cpu":{"model":"Haswell","cores":2}}}`)
	if now.Spec.Firmware.Volume != "web1-uefi" || now.Spec.TPM.Volume != "web1-tpm" || now.Spec.Watchdog.Action != api.WatchdogPause {
		t.Errorf("%+v", now.Spec)
	}
	if _, ok := f.volume("web1-uefi"); !ok {
		t.Error("no variables")
	}
	// Keys belong to the variables: Secure Boot is not switched under them.
	wantProblem(t, f.do(patch(`{"spec":{"firmware":{"secureBoot":true}}}`)), http.StatusConflict, api.CodeRefused, "")
	wantProblem(t, f.do(patch(`{"spec":{"tpm":{"volume":"other"}}}`)), http.StatusUnprocessableEntity, api.CodeInvalid, "spec.tpm.volume")
	wantProblem(t, f.do(patch(`{"spec":{"cpu":{"model":"Quantum"}}}`)), http.StatusUnprocessableEntity, api.CodeInvalid, "spec.cpu.model")
	wantProblem(t, f.do(patch(`{"spec":{"cpu":{"cores":3}}}`)), http.StatusUnprocessableEntity, api.CodeInvalid, "spec.cpu")
	now = set(`{"spec":{"firmware":{"type":"bios"},"tpm":null}}`)
	if now.Spec.TPM != nil || now.Spec.Firmware.Volume != "" {
		t.Errorf("%+v", now.Spec)
	}
	for _, name := range []string{"web1-uefi", "web1-tpm"} {
		if vol, ok := f.volume(name); !ok || !vol.Meta.Deleting() || len(configdb.Volumes.Referrers(f.db.Local(), vol.Meta.ID)) > 0 {
			t.Errorf("%s is not on its way out: %+v", name, vol.Meta)
		}
	}
}

// runsWith lets the owner of a VM say what it runs with.
func (f *fixture) runsWith(name string, change func(hw *api.VMSpec)) api.VM {
	f.t.Helper()
	var vm api.VM
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		var err error
		if vm, err = configdb.VMs.Find(v, "", name); err != nil {
			return err
		}
		vm.Status.Hardware = vm.Spec.PowerOn()
		if change != nil {
			change(vm.Status.Hardware)
		}
		return configdb.VMs.UpdateStatus(v, tx, &vm)
	})
	return f.report(vm.Meta.ID, api.VMRunning)
}

func TestTheMachineOfARunningVMChangesAtItsNextStart(t *testing.T) {
	f := newFixture(t)
	want[vmReply](t, f.do(call{method: "POST", path: "vms", body: machineBody("web1", `,"firmware":{"type":"uefi"},"vsock":{"cid":77},"cdroms":[{"image":"tiny"}]`), role: api.RoleOperator}), http.StatusAccepted)
	f.stopped("web1")
	want[any](t, f.do(call{method: "POST", path: "vms/web1/start", role: api.RoleOperator}), http.StatusAccepted)
	vm := f.runsWith("web1", nil)
	owner := "vm/" + vm.Meta.ID
	patch := func(body string) answer {
		return f.do(call{method: "PATCH", path: "vms/web1", body: body, role: api.RoleOperator})
	}
	a := patch(`{"spec":{"cpu":{"model":"Haswell"},"watchdog":{"action":"pause"},"tpm":{},"bootOrder":["cdrom0","disk0"],"vsock":{"cid":78},"machine":"q35"}}`)
	got := want[api.VM](t, a, http.StatusOK)
	if got.Spec.CPU.Model != "Haswell" || got.Spec.TPM.Volume != "web1-tpm" || got.Spec.Vsock.CID != 78 || got.Spec.Firmware.Volume != "web1-uefi" {
		t.Errorf("%+v", got.Spec)
	}
	task, err := configdb.Tasks.Get(f.db.Local(), a.header.Get(headerTask))
	if err != nil || task.Spec.Action != api.ActionVMChange {
		t.Errorf("task %+v, %v", task.Spec, err)
	}
	// Both addresses are the VM's until QEMU has let go of the one.
	for _, cid := range []uint32{77, 78} {
		if e, ok := f.db.Local().Get(configdb.VsockKey(cid)); !ok || string(e.Value) != vm.Meta.ID {
			t.Errorf("the address %d is not claimed", cid)
		}
	}
	// So is an image.
	want[api.VM](t, patch(`{"spec":{"cdroms":[{"bus":"sata"}]}}`), http.StatusOK)
	img, _ := configdb.Images.Find(f.db.Local(), "", "tiny")
	if refs := configdb.Images.Referrers(f.db.Local(), img.Meta.ID); !slices.Contains(refs, owner) {
		t.Errorf("the image that QEMU reads can be deleted: %v", refs)
	}
	want[api.VM](t, patch(`{"spec":{"cdroms":[{"bus":"sata","image":"tiny"}]}}`), http.StatusOK)
	want[api.VM](t, patch(`{"spec":{"vsock":{"cid":77}}}`), http.StatusOK)
	marks := 0
	for e := range f.db.Local().Scan(configdb.Root+"letgo/", "") {
		if marks++; !strings.HasSuffix(e.Key, "/vsock/78") {
			t.Errorf("the mark %s is left", e.Key)
		}
	}
	if marks != 1 {
		t.Errorf("%d marks, want that of the address that was not used", marks)
	}
	// What QEMU writes to is not deleted under it; what was to come is.
	for body, field := range map[string]string{
		`{"spec":{"firmware":{"type":"bios"}}}`: "spec.firmware",
		`{"spec":{"firmware":null}}`:            "spec.firmware",
	} {
		p := wantProblem(t, f.do(call{method: "PATCH", path: "vms/web1", body: body, role: api.RoleOperator}), http.StatusConflict, api.CodeRefused, field)
		if !strings.Contains(p.Detail, "web1-uefi") || !strings.Contains(p.Detail, "muster vm stop web1") {
			t.Error(p.Detail)
		}
	}
	want[api.VM](t, patch(`{"spec":{"tpm":null}}`), http.StatusOK)
	if vol, ok := f.volume("web1-tpm"); !ok || !vol.Meta.Deleting() {
		t.Errorf("the state of a TPM that never was stays: %+v", vol.Meta)
	}
	wantProblem(t, patch(`{"spec":{"cpu":{"model":"Quantum"}}}`), http.StatusUnprocessableEntity, api.CodeInvalid, "spec.cpu.model")
}

// What is added to a running VM is looked at with the machine that runs: a node that
// could not make the next one may well add a disk to this one.
func TestAPendingMachineDoesNotKeepADiskAway(t *testing.T) {
	f := newFixture(t)
	f.runningVM("web1")
	f.runsWith("web1", nil)
	f.emptyVolume("data")
	want[api.VM](t, f.do(call{method: "PATCH", path: "vms/web1", body: `{"spec":{"hostDevices":[{"node":"elsewhere","usb":"046d:c52b"}]}}`}), http.StatusOK)
	want[api.VM](t, f.do(call{method: "PATCH", path: "vms/web1", body: `{"spec":{"disks":[{"volume":"data"}]}}`}), http.StatusOK)
	if last := f.placer.last.Spec; len(last.Disks) != 1 || len(last.HostDevices) != 0 {
		t.Errorf("the placement was asked about the machine of the next start: %+v", last)
	}
	// A VM does not leave behind what it is to get.
	data, _ := configdb.Volumes.Find(f.db.Local(), "", "data")
	f.runsWith("web1", func(hw *api.VMSpec) { hw.Disks, hw.HostDevices = nil, nil })
	p := wantProblem(t, f.do(call{method: "POST", path: "vms/web1/migrate", body: `{}`, role: api.RoleOperator}), 409, api.CodeRefused, "")
	if !strings.Contains(p.Detail, "gets volume data at its next start") {
		t.Error(p.Detail, data.Spec.Pool)
	}
}

func TestTheNodeOfAVMTellsItsQEMU(t *testing.T) {
	f := newFixture(t)
	vm := f.newVM("web1", api.VMRunning)
	for _, node := range []string{"m1", "m2"} { // whoever is asked
		out := want[api.VMQEMU](t, f.do(call{method: "GET", path: "vms/web1/qemu?log=3", node: node, role: api.RoleOperator}), http.StatusOK)
		if out.Node != vm.Status.Node || len(out.Log) != 3 || !slices.Contains(out.Argv, vm.Meta.ID) {
			t.Errorf("%s: %+v", node, out)
		}
	}
	wantProblem(t, f.do(call{method: "GET", path: "vms/web1/qemu", role: api.RoleViewer}), http.StatusForbidden, api.CodeForbidden, "")
	wantProblem(t, f.do(call{method: "GET", path: "vms/web1/qemu?log=1000", role: api.RoleOperator}), http.StatusUnprocessableEntity, api.CodeInvalid, "log")
}

func TestFactsOfANode(t *testing.T) {
	f := newFixture(t)
	wantProblem(t, f.do(call{method: "GET", path: "nodes/m1/facts", role: api.RoleViewer}), http.StatusNotFound, api.CodeNotFound, "")
	facts := api.NodeFacts{Meta: api.NewMeta(api.KindNodeFacts, "", "m1"), Spec: api.NodeFactsSpec{NodeID: f.nodeIDs["m1"]}, Status: api.NodeFactsStatus{Node: "m1", QEMUVersion: "7.2.22"}}
	facts.Meta.ID = f.nodeIDs["m1"]
	f.txn(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.NodeFacts.CreateUnnamed(tx, &facts) })
	if got := want[api.NodeFacts](t, f.do(call{method: "GET", path: "nodes/m1/facts", role: api.RoleViewer}), http.StatusOK); got.Status.QEMUVersion != "7.2.22" {
		t.Errorf("%+v", got)
	}
}
