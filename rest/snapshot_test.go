// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// readyDisks does what the storage module does to all volumes.
func (f *fixture) readyDisks() {
	f.t.Helper()
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		all, err := configdb.Volumes.List(v)
		for i := range all {
			all[i].Status.Phase, all[i].Status.Format, all[i].Status.Size = api.StorageReady, "qcow2", max(all[i].Spec.Size, 64*api.MiB)
			if err := configdb.Volumes.UpdateStatus(v, tx, &all[i]); err != nil {
				return err
			}
		}
		return err
	})
}

func (f *fixture) findVM(name string) api.VM {
	f.t.Helper()
	vm, err := configdb.VMs.Find(f.db.Local(), "", name)
	if err != nil {
		f.t.Fatal(err)
	}
	return vm
}

func (f *fixture) reportNamed(name string, phase api.VMPhase) {
	f.report(f.findVM(name).Meta.ID, phase)
}

// endOperation does what the task service does with the operation of a VM.
func (f *fixture) endOperation(name string) {
	f.t.Helper()
	id := f.findVM(name).Meta.ID
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		op, err := configdb.Operations.Get(v, id)
		if err != nil {
			return api.IgnoreNotFound(err)
		}
		configdb.Operations.DeleteUnnamed(tx, &op)
		return nil
	})
}

// takenSnapshot makes a VM have a snapshot of what it is now.
func (f *fixture) takenSnapshot(vmName, name string) api.Snapshot {
	f.t.Helper()
	vm := f.findVM(vmName)
	var snap api.Snapshot
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		var err error
		if snap, err = configdb.FindSnapshot(v, &vm.Meta, name); err != nil {
			snap = api.Snapshot{Meta: api.NewMeta(api.KindSnapshot, "", name), Spec: api.SnapshotSpec{VM: vmName, VMID: vm.Meta.ID}}
			if err := configdb.CreateSnapshot(tx, &snap); err != nil {
				return err
			}
		}
		now := time.Now().UTC()
		snap.Status = api.SnapshotStatus{Phase: api.SnapshotReady, Tag: api.SnapshotTag(snap.Meta.ID), Hardware: vm.Spec.Hardware(), Power: api.PowerStopped, TakenAt: &now, Current: true}
		for _, d := range vm.Spec.Disks {
			vol, err := configdb.Volumes.Find(v, "", d.Volume)
			if err != nil {
				return err
			}
			snap.Status.Disks = append(snap.Status.Disks, api.SnapshotDisk{Volume: d.Volume, VolumeID: vol.Meta.ID, Slot: d.Slot, Size: max(vol.Status.Size, vol.Spec.Size)})
		}
		if snap.Meta.Revision == 0 {
			return nil // the next turn has it
		}
		return configdb.Snapshots.UpdateStatus(v, tx, &snap)
	})
	if got, _ := configdb.Snapshots.Get(f.db.Local(), snap.Meta.ID); got.Status.Phase != api.SnapshotReady {
		return f.takenSnapshot(vmName, name)
	}
	return snap
}

type snapshotReply struct {
	Task   api.Task     `json:"task"`
	Object api.Snapshot `json:"object"`
}

func TestSnapshotsAreOperations(t *testing.T) {
	f := newFixture(t)
	f.newVM("web1", api.VMStopped, api.VMDisk{Size: api.GiB})
	f.readyDisks()
	path := "vms/web1/snapshots"
	r := want[snapshotReply](t, f.do(call{method: "POST", path: path, body: `{"name":"a","description":"first"}`, role: api.RoleOperator}), http.StatusAccepted)
	if r.Task.Spec.Action != api.ActionVMSnapshot || r.Task.Spec.TargetKind != api.KindVM || r.Object.Spec.VM != "web1" || r.Object.Status.Phase != api.SnapshotCreating || r.Object.Meta.Owner != "vm/"+f.findVM("web1").Meta.ID {
		t.Errorf("%+v", r)
	}
	op, err := configdb.Operations.Get(f.db.Local(), f.findVM("web1").Meta.ID)
	if err != nil || op.Spec.SnapshotID != r.Object.Meta.ID || op.Spec.TaskID != r.Task.Meta.ID || op.Spec.Epoch != 1 {
		t.Fatalf("%+v, %v", op, err)
	}
	for _, c := range []call{
		{method: "POST", path: path, body: `{"name":"b"}`}, {method: "POST", path: path + "/a/revert"}, {method: "DELETE", path: path + "/a"},
		{method: "POST", path: "vms/web1/start"}, {method: "DELETE", path: "vms/web1"},
	} {
		a := f.do(c)
		if a.status != http.StatusConflict || !strings.Contains(string(a.body), "snapshot") {
			t.Errorf("%s %s during a snapshot: %d %s", c.method, c.path, a.status, a.body)
		}
	}
	wantProblem(t, f.do(call{method: "POST", path: path, body: `{"name":"a"}`}), http.StatusConflict, api.CodeExists, "")
	f.endOperation("web1")
	// A snapshot that nobody works on any more was interrupted.
	got := want[api.Snapshot](t, f.do(call{method: "GET", path: path + "/a", role: api.RoleViewer}), http.StatusOK)
	if got.Status.Phase != api.SnapshotFailed || !strings.Contains(got.Status.Message, "muster vm snapshot rm web1 a") {
		t.Errorf("%+v", got.Status)
	}
	f.takenSnapshot("web1", "a")
	b := want[snapshotReply](t, f.do(call{method: "POST", path: path, body: `{"name":"b"}`}), http.StatusAccepted)
	if b.Object.Spec.Parent != "a" {
		t.Errorf("parent %q", b.Object.Spec.Parent)
	}
	l := want[List[api.Snapshot]](t, f.do(call{method: "GET", path: path, role: api.RoleViewer}), http.StatusOK)
	all := want[List[api.Snapshot]](t, f.do(call{method: "GET", path: "snapshots?fields=spec.vm=web1", role: api.RoleViewer}), http.StatusOK)
	if len(l.Items) != 2 || len(all.Items) != 2 || l.Items[0].Meta.Name != "a" {
		t.Errorf("%+v, %+v", l, all)
	}
	want[api.Snapshot](t, f.do(call{method: "GET", path: "snapshots/" + b.Object.Meta.ID}), http.StatusOK)
}

func TestSnapshotsOfOtherVMsMayHaveTheSameName(t *testing.T) {
	f := newFixture(t)
	for _, vm := range []string{"web1", "web2"} {
		f.newVM(vm, api.VMStopped, api.VMDisk{Size: api.GiB})
		f.readyDisks()
		want[snapshotReply](t, f.do(call{method: "POST", path: "vms/" + vm + "/snapshots", body: `{"name":"a"}`}), http.StatusAccepted)
	}
	wantProblem(t, f.do(call{method: "GET", path: "vms/web1/snapshots/none"}), http.StatusNotFound, api.CodeNotFound, "")
	other, err := configdb.FindSnapshot(f.db.Local(), &api.Meta{ID: f.findVM("web2").Meta.ID}, "a")
	if err != nil {
		t.Fatal(err)
	}
	wantProblem(t, f.do(call{method: "GET", path: "vms/web1/snapshots/" + other.Meta.ID}), http.StatusNotFound, api.CodeNotFound, "")
}

func TestSnapshotsRefuseBadInput(t *testing.T) {
	f := newFixture(t)
	f.newVM("empty", api.VMStopped)
	vm := f.newVM("web1", api.VMStopped, api.VMDisk{Size: api.GiB})
	notReady := f.do(call{method: "POST", path: "vms/web1/snapshots", body: `{"name":"a"}`})
	if notReady.status != http.StatusConflict || !strings.Contains(string(notReady.body), "not ready") {
		t.Errorf("%d %s", notReady.status, notReady.body)
	}
	f.readyDisks()
	for _, c := range []struct {
		path, body string
		status     int
		text       string
	}{
		{"vms/web1/snapshots", `{"name":"A b"}`, 422, "not a valid name"},
		{"vms/web1/snapshots", `{}`, 422, "is missing"},
		{"vms/web1/snapshots", `{"name":"a","memry":true}`, 422, "memry"},
		{"vms/web1/snapshots", `{"name":"a","description":"one\ntwo"}`, 422, "one line"},
		{"vms/web1/snapshots", `{"name":"a","memory":true}`, 409, "no memory to keep"},
		{"vms/empty/snapshots", `{"name":"a"}`, 409, "no disk"},
		{"vms/none/snapshots", `{"name":"a"}`, 404, "none"},
		{"vms/web1/snapshots/none/revert", ``, 404, "muster vm snapshot ls web1"},
		{"vms/web1/suspend", ``, 409, "only a running or paused"},
		{"vms/web1/start", `{"discardSuspend":true}`, 409, "not suspended"},
		{"vms/web1/pause", `{"discardSuspend":true}`, 422, "start and stop only"},
	} {
		a := f.do(call{method: "POST", path: c.path, body: c.body})
		if a.status != c.status || !strings.Contains(string(a.body), c.text) {
			t.Errorf("POST %s %s: %d %s", c.path, c.body, a.status, a.body)
		}
	}
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		vol, err := configdb.Volumes.Find(v, "", "web1-disk0")
		vol.Status.Format = "raw"
		if err != nil {
			return err
		}
		return configdb.Volumes.UpdateStatus(v, tx, &vol)
	})
	f.report(vm.Meta.ID, api.VMStopped)
	raw := f.do(call{method: "POST", path: "vms/web1/snapshots", body: `{"name":"a"}`})
	if raw.status != http.StatusConflict || !strings.Contains(string(raw.body), "only qcow2 volumes (those in pools of type dir and shared) have snapshots") {
		t.Errorf("%d %s", raw.status, raw.body)
	}
	if n := len(want[List[api.Snapshot]](t, f.do(call{method: "GET", path: "snapshots"}), http.StatusOK).Items); n != 0 {
		t.Errorf("%d snapshots of refused requests", n)
	}
}

func TestRevertAsksForForceAndForTheDisksOfThen(t *testing.T) {
	f := newFixture(t)
	f.newVM("web1", api.VMStopped, api.VMDisk{Size: api.GiB})
	f.readyDisks()
	f.takenSnapshot("web1", "a")
	f.do(call{method: "POST", path: "vms/web1/start"})
	f.reportNamed("web1", api.VMRunning)
	p := wantProblem(t, f.do(call{method: "POST", path: "vms/web1/snapshots/a/revert"}), http.StatusConflict, api.CodeRefused, "")
	if !strings.Contains(p.Detail, "--force") {
		t.Error(p.Detail)
	}
	want[snapshotReply](t, f.do(call{method: "POST", path: "vms/web1/snapshots/a/revert", body: `{"force":true}`}), http.StatusAccepted)
	if vm := f.findVM("web1"); vm.Spec.Power != api.PowerStopped || !vm.Spec.ForceStop {
		t.Errorf("%+v", vm.Spec)
	}
	f.endOperation("web1")
	f.reportNamed("web1", api.VMStopped)
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		vol, err := configdb.Volumes.Find(v, "", "web1-disk0")
		if err != nil {
			return err
		}
		vol.Status.Size = 2 * api.GiB
		return configdb.Volumes.UpdateStatus(v, tx, &vol)
	})
	p = wantProblem(t, f.do(call{method: "POST", path: "vms/web1/snapshots/a/revert"}), http.StatusConflict, api.CodeRefused, "")
	if !strings.Contains(p.Detail, "does not change the size") {
		t.Error(p.Detail)
	}
	// An interrupted revert keeps the VM from starting.
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		vm := f.findVM("web1")
		s, err := configdb.FindSnapshot(v, &vm.Meta, "a")
		if err != nil {
			return err
		}
		s.Status.Phase = api.SnapshotReverting
		return configdb.Snapshots.UpdateStatus(v, tx, &s)
	})
	for _, c := range []call{{method: "POST", path: "vms/web1/start"}, {method: "POST", path: "vms/web1/snapshots", body: `{"name":"b"}`}, {method: "DELETE", path: "vms/web1/snapshots/a"}} {
		if a := f.do(c); a.status != http.StatusConflict || !strings.Contains(string(a.body), "revert again") {
			t.Errorf("%s %s after an interrupted revert: %d %s", c.method, c.path, a.status, a.body)
		}
	}
}

// suspended makes a VM what a suspend makes it.
func (f *fixture) suspended(name string) api.VM {
	f.t.Helper()
	vm := f.newVM(name, api.VMStopped, api.VMDisk{Size: api.GiB})
	f.readyDisks()
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		now, err := configdb.VMs.Get(v, vm.Meta.ID)
		if err != nil {
			return err
		}
		now.Spec.Power = api.PowerSuspended
		st := api.SavedState{Meta: api.NewMeta(api.KindSavedState, "", name), Spec: api.SavedStateSpec{Tag: api.SuspendTag, Hardware: now.Spec.Hardware()}}
		st.Meta.ID = vm.Meta.ID
		if err := configdb.SavedStates.CreateUnnamed(tx, &st); err != nil {
			return err
		}
		return configdb.VMs.UpdateSpec(v, tx, &now)
	})
	return f.report(vm.Meta.ID, api.VMSuspended)
}

func TestASuspendedVMKeepsItsMemory(t *testing.T) {
	f := newFixture(t)
	vm := f.suspended("web1")
	for _, c := range []call{
		{method: "POST", path: "vms/web1/stop"}, {method: "POST", path: "vms/web1/stop", body: `{"force":true}`}, {method: "POST", path: "vms/web1/reboot"},
		{method: "POST", path: "vms/web1/pause"}, {method: "POST", path: "vms/web1/suspend"}, {method: "POST", path: "vms/web1/snapshots", body: `{"name":"a"}`},
		{method: "PATCH", path: "vms/web1", body: `{"spec":{"cpus":4}}`}, {method: "PATCH", path: "vms/web1", body: `{"spec":{"power":"stopped"}}`}, {method: "DELETE", path: "vms/web1"},
	} {
		if a := f.do(c); a.status != http.StatusConflict || !strings.Contains(string(a.body), "suspended") {
			t.Errorf("%s %s %v: %d %s", c.method, c.path, c.body, a.status, a.body)
		}
	}
	if now := f.findVM("web1"); now.Meta.Revision != vm.Meta.Revision {
		t.Fatal("a refused request changed it")
	}
	want[api.VM](t, f.do(call{method: "PATCH", path: "vms/web1", body: `{"meta":{"labels":{"a":"b"}}}`}), http.StatusOK)
	f.report(vm.Meta.ID, api.VMSuspended)
	want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/resume"}), http.StatusAccepted)
	if st, err := configdb.SavedStates.Get(f.db.Local(), vm.Meta.ID); err != nil || st.Spec.Discard || f.findVM("web1").Spec.Power != api.PowerRunning {
		t.Errorf("%+v, %v", st, err)
	}
	f.suspended("web2")
	want[vmReply](t, f.do(call{method: "POST", path: "vms/web2/start", body: `{"discardSuspend":true}`}), http.StatusAccepted)
	if st, err := configdb.SavedStates.Get(f.db.Local(), f.findVM("web2").Meta.ID); err != nil || !st.Spec.Discard {
		t.Errorf("%+v, %v", st, err)
	}
	// Told to stop while the memory is loaded: it stays suspended.
	want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/stop", body: `{"force":true}`}), http.StatusAccepted)
	if now := f.findVM("web1"); now.Spec.Power != api.PowerSuspended {
		t.Errorf("%+v", now.Spec)
	}
	f.suspended("web3")
	want[vmReply](t, f.do(call{method: "POST", path: "vms/web3/stop", body: `{"discardSuspend":true}`}), http.StatusAccepted)
	if now := f.findVM("web3"); now.Spec.Power != api.PowerStopped {
		t.Errorf("%+v", now.Spec)
	}
	wantProblem(t, f.do(call{method: "POST", path: "vms", body: `{"meta":{"name":"x"},"spec":{"power":"suspended"}}`}), 422, api.CodeInvalid, "spec.power")
	wantProblem(t, f.do(call{method: "PATCH", path: "vms/web3", body: `{"spec":{"power":"suspended"}}`}), 422, api.CodeInvalid, "spec.power")
}

// A suspended VM may start on another node, on the owner's word that it does not
// run.
func TestASuspendedVMMayMove(t *testing.T) {
	f := newFixture(t)
	vm := f.suspended("web1")
	was := f.binding(vm.Meta.ID).Spec
	f.placer.setFull(was.Node, true)
	want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/resume"}), http.StatusAccepted)
	now := f.binding(vm.Meta.ID).Spec
	if now.Node == was.Node || now.Epoch != was.Epoch+1 {
		t.Errorf("%+v, was %+v", now, was)
	}
	if _, err := configdb.SavedStates.Get(f.db.Local(), vm.Meta.ID); err != nil {
		t.Error(fmt.Errorf("its memory is forgotten: %w", err))
	}
}

func TestACloneIsItself(t *testing.T) {
	f := newFixture(t)
	r := want[vmReply](t, f.do(call{method: "POST", path: "vms", body: `{"meta":{"name":"web1","labels":{"env":"prod"}},"spec":{"cpus":3,"memory":"512M","disks":[{"image":"tiny"},{"size":"1G","pool":"shared"}]}}`}), http.StatusAccepted)
	f.report(r.Object.Meta.ID, api.VMStopped)
	f.readyDisks()
	got := want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/clone", body: `{"name":"web2"}`, role: api.RoleOperator}), http.StatusAccepted)
	vm := got.Object
	if got.Task.Spec.Action != api.ActionVMClone || vm.Meta.ID == r.Object.Meta.ID || vm.Meta.Labels["env"] != "prod" || vm.Spec.CPUs != 3 || vm.Spec.Power != api.PowerStopped || len(vm.Spec.Disks) != 2 {
		t.Fatalf("%+v %+v", got.Task.Spec, vm)
	}
	v := f.db.Local()
	op, err := configdb.Operations.Get(v, r.Object.Meta.ID)
	if err != nil || op.Spec.Action != api.ActionVMSnapshot {
		t.Fatalf("no snapshot is taken of the source: %+v, %v", op, err)
	}
	snap, err := configdb.Snapshots.Get(v, op.Spec.SnapshotID)
	if err != nil || !snap.Spec.Temporary {
		t.Errorf("%+v, %v", snap, err)
	}
	for i, image := range []string{"tiny", ""} {
		vol, err := configdb.Volumes.Find(v, "", fmt.Sprintf("web2-disk%d", i))
		if err != nil {
			t.Fatal(err)
		}
		if vol.Spec.SourceVolume != fmt.Sprintf("web1-disk%d", i) || vol.Spec.SourceSnapshot != snap.Meta.ID || vol.Spec.Image != image || vol.Meta.Owner != "vm/"+vm.Meta.ID || vol.Spec.Pool != "shared" {
			t.Errorf("%+v", vol)
		}
	}
	if _, busy := configdb.CopyOf(v, snap.Meta.ID); !busy {
		t.Error("nobody knows that the snapshot is being copied")
	}
	f.endOperation("web1")
	f.takenSnapshot("web1", snap.Meta.Name)
	p := wantProblem(t, f.do(call{method: "DELETE", path: "vms/web1/snapshots/" + snap.Meta.Name}), http.StatusConflict, api.CodeRefused, "")
	if !strings.Contains(p.Detail, "is being copied") {
		t.Error(p.Detail)
	}
	full := want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/clone", body: `{"name":"web3","snapshot":"` + snap.Meta.Name + `","full":true,"start":true}`}), http.StatusAccepted)
	vol, err := configdb.Volumes.Find(f.db.Local(), "", "web3-disk0")
	if err != nil || vol.Spec.Image != "" || full.Object.Spec.Power != api.PowerRunning {
		t.Errorf("%+v, %v", vol, err)
	}
}

func TestACloneHasItsOwnAddresses(t *testing.T) {
	f := newFixture(t)
	want[api.Network](t, f.do(call{method: "POST", path: "networks", body: `{"meta":{"name":"lab"},"spec":{"type":"vxlan","vni":7}}`}), http.StatusCreated)
	want[api.IPPool](t, f.do(call{method: "POST", path: "ippools", body: `{"meta":{"name":"lab"},"spec":{"network":"lab","cidr":"10.0.0.0/24"}}`}), http.StatusCreated)
	r := want[vmReply](t, f.do(call{method: "POST", path: "vms", body: `{"meta":{"name":"web1"},"spec":{"disks":[{"size":"1G"}],"nics":[{"network":"lab"}]}}`}), http.StatusAccepted)
	f.report(r.Object.Meta.ID, api.VMStopped)
	f.readyDisks()
	vm := want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/clone", body: `{"name":"web2"}`}), http.StatusAccepted).Object
	was, now := r.Object.Spec.NICs[0], vm.Spec.NICs[0]
	if now.MAC == "" || now.MAC == was.MAC || now.Address == "" || now.Address == was.Address || now.Slot != was.Slot {
		t.Errorf("%+v, the source has %+v", now, was)
	}
}

func TestCloneRefusesBadInput(t *testing.T) {
	f := newFixture(t)
	f.newVM("empty", api.VMStopped)
	f.newVM("web1", api.VMStopped, api.VMDisk{Size: api.GiB})
	f.readyDisks()
	for _, c := range []struct {
		path, body string
		status     int
		text       string
	}{
		{"vms/web1/clone", `{}`, 422, "is missing"},
		{"vms/web1/clone", `{"name":"web1"}`, 409, "exists already"},
		{"vms/web1/clone", `{"name":"x","snapshot":"none"}`, 404, "no snapshot"},
		{"vms/empty/clone", `{"name":"x"}`, 409, "no disks to copy"},
		{"vms/web1/clone", `{"name":"` + strings.Repeat("a", 60) + `"}`, 422, "too long"},
		{"vms/none/clone", `{"name":"x"}`, 404, "none"},
		{"volumes", `{"meta":{"name":"x"},"spec":{"size":"1G","sourceVolume":"web1-disk0"}}`, 422, "cloned"},
	} {
		a := f.do(call{method: "POST", path: c.path, body: c.body})
		if a.status != c.status || !strings.Contains(string(a.body), c.text) {
			t.Errorf("POST %s %s: %d %s", c.path, c.body, a.status, a.body)
		}
	}
	if _, err := configdb.Operations.Get(f.db.Local(), f.findVM("web1").Meta.ID); err == nil {
		t.Error("a refused clone began a snapshot")
	}
}

// Below the feature level nothing is kept that an older node would not respect.
func TestSnapshotsWaitForTheFeatureLevel(t *testing.T) {
	f := newFixture(t)
	f.newVM("web1", api.VMStopped, api.VMDisk{Size: api.GiB})
	f.readyDisks()
	f.takenSnapshot("web1", "a")
	f.do(call{method: "POST", path: "vms/web1/start"})
	f.reportNamed("web1", api.VMRunning)
	c := api.Cluster{Meta: api.NewMeta(api.KindCluster, "", "prod"), Spec: api.ClusterSpec{Life: 1, FeatureLevel: 1}}
	f.txn(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Clusters.Create(tx, &c) })
	calls := []call{
		{method: "POST", path: "vms/web1/snapshots", body: `{"name":"b"}`},
		{method: "POST", path: "vms/web1/snapshots/a/revert", body: `{"force":true}`},
		{method: "POST", path: "vms/web1/suspend"},
		{method: "POST", path: "vms/web1/clone", body: `{"name":"web2","snapshot":"a"}`},
	}
	for _, c := range calls {
		p := wantProblem(t, f.do(c), http.StatusConflict, api.CodeRefused, "")
		if !strings.Contains(p.Detail, "feature level 2, and the cluster is at 1") {
			t.Errorf("%s: %+v", c.path, p)
		}
	}
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		now, err := configdb.Clusters.Get(v, c.Meta.ID)
		if err != nil {
			return err
		}
		now.Spec.FeatureLevel = 2
		return configdb.Clusters.UpdateSpec(v, tx, &now)
	})
	for _, c := range []call{calls[0], calls[3], calls[2]} {
		if a := f.do(c); a.status != http.StatusAccepted {
			t.Errorf("%s: %d %s", c.path, a.status, a.body)
		}
		f.endOperation("web1")
	}
}

// What QEMU cannot save, and what would not fit together, is refused by name.
func TestMachinesThatCannotBeSaved(t *testing.T) {
	f := newFixture(t)
	f.newVM("web1", api.VMStopped, api.VMDisk{Size: api.GiB})
	f.readyDisks()
	f.do(call{method: "POST", path: "vms/web1/start"})
	f.reportNamed("web1", api.VMRunning)
	set := func(change func(s *api.VMSpec)) {
		f.txn(func(v *configdb.View, tx *configdb.Txn) error {
			vm := f.findVM("web1")
			vm = vm.Clone()
			change(&vm.Spec)
			return configdb.VMs.UpdateSpec(v, tx, &vm)
		})
		f.reportNamed("web1", api.VMRunning)
	}
	refused := func(path, body, text string) {
		t.Helper()
		if p := wantProblem(t, f.do(call{method: "POST", path: path, body: body}), http.StatusConflict, api.CodeRefused, ""); !strings.Contains(p.Detail, text) {
			t.Errorf("%s: %+v", path, p)
		}
	}
	set(func(s *api.VMSpec) { s.HostDevices = []api.VMHostDevice{{Node: "m1", PCI: "0000:01:00.0"}} })
	refused("vms/web1/suspend", "", "0000:01:00.0")
	refused("vms/web1/snapshots", `{"name":"a","memory":true}`, "0000:01:00.0")
	set(func(s *api.VMSpec) { s.HostDevices, s.TPM = nil, &api.VMTPM{} })
	refused("vms/web1/snapshots", `{"name":"a"}`, "has a TPM")
	want[snapshotReply](t, f.do(call{method: "POST", path: "vms/web1/snapshots", body: `{"name":"a","memory":true}`}), http.StatusAccepted)
}

// A copy is told who it is, and has the limits of its source.
func TestACloneIsToldItsOwnName(t *testing.T) {
	for hostname, own := range map[string]string{"": "", "web1": "", "web1.example.org": "web2.example.org"} {
		f := newFixture(t)
		f.newVM("web1", api.VMStopped, api.VMDisk{Size: api.GiB})
		f.readyDisks()
		f.txn(func(v *configdb.View, tx *configdb.Txn) error {
			vm := f.findVM("web1")
			vm = vm.Clone()
			vm.Spec.CloudInit = &api.CloudInit{Hostname: hostname, User: "ops", PasswordHash: "$6$s$h"}
			vm.Spec.Limits = &api.VMLimits{CPUMax: 50}
			return configdb.VMs.UpdateSpec(v, tx, &vm)
		})
		f.reportNamed("web1", api.VMStopped)
		want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/clone", body: `{"name":"web2"}`}), http.StatusAccepted)
		got := f.findVM("web2").Spec
		if c := got.CloudInit; c == nil || c.Hostname != own || c.User != "ops" || c.PasswordHash != "$6$s$h" || got.Limits == nil || got.Limits.CPUMax != 50 {
			t.Errorf("of %q: %+v %+v", hostname, got.CloudInit, got.Limits)
		}
		if c := f.findVM("web1").Spec.CloudInit; c.Hostname != hostname {
			t.Errorf("the source is %+v now", c)
		}
	}
}
