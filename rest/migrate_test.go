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
		{"another QEMU", "vms/web1/migrate", `{"to":"` + other + `"}`, func() { set(at, "tcg", "7.2.0"); set(other, "tcg", "8.0.0") }, 409, api.CodeUnplaceable, "", "it has QEMU 8.0.0"},
		{"another accelerator", "vms/web1/migrate", `{"to":"` + other + `"}`, func() {
			f.txn(func(v *configdb.View, tx *configdb.Txn) error {
				o, err := configdb.VMs.Get(v, vm.Meta.ID)
				if err != nil {
					return err
				}
				o.Status.Accelerator = "tcg"
				return configdb.VMs.UpdateStatus(v, tx, &o)
			})
			set(other, "kvm", "7.2.0")
		}, 409, api.CodeUnplaceable, "", "runs with tcg"},
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

// Each case changes what is known of a VM, or of its node, and takes it back.
func TestWhatKeepsAGuestFromMoving(t *testing.T) {
	f := newFixture(t)
	vm := f.movableVM("web1", api.VMDisk{Size: api.GiB, Pool: "local"})
	at := f.binding(vm.Meta.ID).Spec.Node
	other := map[string]string{"m1": "m2", "m2": "m1"}[at]
	vol, err := configdb.Volumes.Find(f.db.Local(), "", "web1-disk0")
	if err != nil {
		t.Fatal(err)
	}
	status := func(change func(*api.VM)) func() {
		return func() {
			f.txn(func(v *configdb.View, tx *configdb.Txn) error {
				o, err := configdb.VMs.Get(v, vm.Meta.ID)
				if err != nil {
					return err
				}
				o.Status.Hardware = o.Spec.Hardware()
				o.Status.Accelerator = ""
				change(&o)
				return configdb.VMs.UpdateStatus(v, tx, &o)
			})
		}
	}
	volume := func(size api.Size) func() {
		return func() {
			f.txn(func(v *configdb.View, tx *configdb.Txn) error {
				o, err := configdb.Volumes.Get(v, vol.Meta.ID)
				if err != nil {
					return err
				}
				o.Status.Phase, o.Status.Format, o.Status.Size = api.StorageReady, "qcow2", size
				return configdb.Volumes.UpdateStatus(v, tx, &o)
			})
		}
	}
	cpus := func(names ...string) {
		f.txn(func(v *configdb.View, tx *configdb.Txn) error {
			for i, node := range []string{at, other} {
				o := api.NodeFacts{Meta: api.NewMeta(api.KindNodeFacts, "", node), Spec: api.NodeFactsSpec{NodeID: f.nodeIDs[node]}}
				o.Meta.ID = f.nodeIDs[node]
				o.Status = api.NodeFactsStatus{Node: node, CPU: api.HostCPU{Vendor: "GenuineIntel", Name: names[i]}, GuestFeatures: []string{"aes", "avx2"}[:2-i]}
				if err := configdb.NodeFacts.CreateUnnamed(tx, &o); err != nil {
					return err
				}
				n, err := configdb.Nodes.Get(v, o.Meta.ID)
				if err != nil {
					return err
				}
				n.Status.Accelerator, n.Status.QEMUVersion = api.AccelKVM, "7.2.0"
				if err := configdb.Nodes.UpdateStatus(v, tx, &n); err != nil {
					return err
				}
			}
			return nil
		})
	}
	volume(api.GiB)()
	body := `{"to":"` + other + `","withStorage":true}`
	for _, c := range []struct {
		name   string
		before func()
		body   string
		code   api.Code
		says   string
	}{
		{"a TPM", status(func(vm *api.VM) { vm.Status.Hardware.TPM = &api.VMTPM{} }), body, api.CodeRefused, "TPM"},
		{"a device of the host", status(func(vm *api.VM) { vm.Status.Hardware.HostDevices = []api.VMHostDevice{{USB: "046d:c52b"}} }), body, api.CodeRefused, "devices of its host"},
		{"extra arguments", status(func(vm *api.VM) { vm.Status.Hardware.ExtraArgs = []string{"-s"} }), body, api.CodeRefused, "extraArgs"},
		{"a vsock", status(func(vm *api.VM) { vm.Status.Hardware.Vsock = &api.VMVsock{CID: 9} }), body, api.CodeRefused, "vsock"},
		{"disks that only its node has", status(func(*api.VM) {}), `{}`, api.CodeRefused, "--with-storage"},
		{"a disk that grows", volume(api.MiB), body, api.CodeRefused, "being enlarged"},
		{"a CPU of another kind", func() {
			volume(api.GiB)()
			status(func(vm *api.VM) { vm.Status.Accelerator = "kvm" })()
			cpus("Alder Lake", "Sapphire Rapids")
		}, body, api.CodeUnplaceable, "Sapphire Rapids"},
		{"a snapshot in the disk", func() {
			status(func(*api.VM) {})()
			f.txn(func(_ *configdb.View, tx *configdb.Txn) error {
				o := api.Snapshot{Meta: api.NewMeta(api.KindSnapshot, "", "before"), Spec: api.SnapshotSpec{VM: "web1", VMID: vm.Meta.ID}}
				o.Status = api.SnapshotStatus{Phase: api.SnapshotReady, Disks: []api.SnapshotDisk{{Volume: "web1-disk0", VolumeID: vol.Meta.ID, Slot: 1}}}
				return configdb.Snapshots.CreateUnnamed(tx, &o)
			})
		}, body, api.CodeRefused, "snapshot before of vm web1"},
		{"saved memory", func() {
			f.txn(func(_ *configdb.View, tx *configdb.Txn) error {
				o := api.SavedState{Meta: api.NewMeta(api.KindSavedState, "", "web1"), Spec: api.SavedStateSpec{Tag: api.SuspendTag, Hardware: vm.Spec.Hardware()}}
				o.Meta.ID = vm.Meta.ID
				return configdb.SavedStates.CreateUnnamed(tx, &o)
			})
		}, body, api.CodeRefused, "saved on disk"},
		{"an older node in the cluster", func() {
			f.txn(func(_ *configdb.View, tx *configdb.Txn) error {
				o := api.Cluster{Meta: api.NewMeta(api.KindCluster, "", "c"), Spec: api.ClusterSpec{Life: 1, FeatureLevel: 1}}
				return configdb.Clusters.Create(tx, &o)
			})
		}, body, api.CodeRefused, "feature level"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.before()
			was := f.rev()
			p := wantProblem(t, f.do(call{method: "POST", path: "vms/web1/migrate", body: c.body}), 409, c.code, map[bool]string{true: "withStorage"}[c.body == `{}`])
			if !strings.Contains(p.Detail, c.says) {
				t.Errorf("%q does not say %q", p.Detail, c.says)
			}
			if f.rev() != was {
				t.Error("something was written")
			}
		})
	}
}

func TestMigrationIsPlannedAndFollowed(t *testing.T) {
	f := newFixture(t)
	vm := f.movableVM("web1", api.VMDisk{Size: api.GiB, Pool: "shared"})
	at := f.binding(vm.Meta.ID).Spec.Node
	other := map[string]string{"m1": "m2", "m2": "m1"}[at]
	wantProblem(t, f.do(call{method: "GET", path: "vms/web1/migration"}), 404, api.CodeNotFound, "")
	was := f.rev()
	for _, node := range []string{at, other} { // one of them has to ask the other
		p := want[api.MigrationPlan](t, f.do(call{method: "GET", path: "vms/web1/migration/plan?bandwidth=64M", node: node}), http.StatusOK)
		if p.From != at || p.To != other || p.Memory != vm.Spec.Memory || p.DirtyRate != 3*api.MiB || p.Bandwidth != 64*api.MiB || p.Assumed || !p.Converges || p.TotalMillis < 1 || len(p.Volumes) != 0 || p.Channels != api.DefaultMigrationChannels {
			t.Errorf("asked at %s: %+v", node, p)
		}
	}
	wantProblem(t, f.do(call{method: "GET", path: "vms/web1/migration/plan?target=" + at}), 409, api.CodeRefused, "to")
	wantProblem(t, f.do(call{method: "GET", path: "vms/web1/migration/plan?bandwidth=much"}), 422, api.CodeInvalid, "bandwidth")
	wantProblem(t, f.do(call{method: "GET", path: "vms/web1/migration/plan?channels=17"}), 422, api.CodeInvalid, "channels")
	wantProblem(t, f.do(call{method: "POST", path: "vms/web1/migrate", body: `{"channels": 17}`}), 422, api.CodeInvalid, "channels")
	if p := want[api.MigrationPlan](t, f.do(call{method: "GET", path: "vms/web1/migration/plan?channels=3"}), http.StatusOK); p.Channels != 3 {
		t.Errorf("%+v", p)
	}
	if f.rev() != was {
		t.Error("a plan wrote something")
	}
	r := want[TaskReply](t, f.do(call{method: "POST", path: "vms/web1/migrate", body: `{"channels": 16}`}), http.StatusAccepted)
	if op, err := configdb.Operations.Get(f.db.Local(), vm.Meta.ID); err != nil || op.Spec.Migration.Channels != 16 {
		t.Errorf("%+v, %v", op.Spec.Migration, err)
	}
	for _, node := range []string{at, other} {
		p := want[api.MigrationProgress](t, f.do(call{method: "GET", path: "vms/web1/migration", node: node, role: api.RoleViewer}), http.StatusOK)
		if p.From != at || p.To != other || p.Task != r.Task.Meta.ID || p.Phase != api.TaskPending || p.Transfer == nil || p.Transfer.MemoryLeft != api.MiB {
			t.Errorf("asked at %s: %+v", node, p)
		}
	}
}
