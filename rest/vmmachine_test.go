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
	// A running VM keeps its machine.
	f.stopped("web1")
	want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/start", role: api.RoleOperator}), http.StatusAccepted)
	p := wantProblem(t, f.do(patch(`{"spec":{"watchdog":null}}`)), http.StatusConflict, api.CodeRefused, "")
	if !strings.Contains(p.Detail, "watchdog") {
		t.Error(p.Detail)
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
