// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/qmptest"
)

// testSnapshots runs the real qemu-img on the files of testVolumes, and fails
// where a test says so.
type testSnapshots struct {
	vols *testVolumes

	mu    sync.Mutex
	fail  map[string]error // "verb volume tag": what it answers instead, once
	block chan struct{}    // if set, apply waits for it
	calls []string
}

func (s *testSnapshots) do(v *configdb.View, verb, flag, project, volume, tag string) error {
	call := verb + " " + volume + " " + tag
	s.mu.Lock()
	s.calls = append(s.calls, call)
	err := s.fail[call]
	delete(s.fail, call)
	block := s.block
	s.mu.Unlock()
	if block != nil && verb == "apply" {
		<-block
	}
	if err != nil {
		return err
	}
	path, _, err := s.vols.Resolve(v, project, volume)
	if err != nil {
		return err
	}
	tags, err := tagsOf(path)
	if err != nil {
		return api.Errorf(api.CodeConflict, "read %s: %w", path, err)
	}
	has := slices.Contains(tags, tag)
	if verb == "create" && has || verb == "delete" && !has {
		return nil
	}
	out, err := exec.Command("qemu-img", "snapshot", flag, tag, path).CombinedOutput()
	if err != nil {
		return api.Errorf(api.CodeRefused, "qemu-img snapshot %s: %s", verb, strings.TrimSpace(string(out)))
	}
	return nil
}

func tagsOf(path string) ([]string, error) {
	out, err := exec.Command("qemu-img", "info", "--output=json", path).Output()
	if err != nil {
		return nil, err
	}
	var info struct {
		Snapshots []struct{ Name string }
	}
	if err := json.Unmarshal(out, &info); err != nil {
		return nil, err
	}
	var tags []string
	for _, s := range info.Snapshots {
		tags = append(tags, s.Name)
	}
	return tags, nil
}

func (s *testSnapshots) CreateSnapshot(_ context.Context, v *configdb.View, project, volume, tag string) error {
	return s.do(v, "create", "-c", project, volume, tag)
}

func (s *testSnapshots) ApplySnapshot(_ context.Context, v *configdb.View, project, volume, tag string) error {
	return s.do(v, "apply", "-a", project, volume, tag)
}

func (s *testSnapshots) DeleteSnapshot(_ context.Context, v *configdb.View, project, volume, tag string) error {
	return s.do(v, "delete", "-d", project, volume, tag)
}

func (s *testSnapshots) HasSnapshot(_ context.Context, v *configdb.View, project, volume, tag string) (bool, error) {
	path, _, err := s.vols.Resolve(v, project, volume)
	if err != nil {
		return false, err
	}
	tags, err := tagsOf(path)
	return slices.Contains(tags, tag), err
}

func (s *testSnapshots) failOnce(call string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail[call] = errors.New("the test says no")
}

type qemuFake = qmptest.QEMU

// onStart does something to every scripted QEMU that begins from now on.
func (f *fakes) onStart(tune func(*qemuFake)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tune = tune
}

// twoDisks makes the VM web1 with two disks of 64 MiB and returns its ID.
func (e *env) twoDisks(spec api.VMSpec) string {
	e.t.Helper()
	var disks []api.VMDisk
	for i := range 2 {
		name := fmt.Sprintf("web1-disk%d", i)
		path := filepath.Join(e.runDir, name+".qcow2")
		if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", path, "64M").CombinedOutput(); err != nil {
			e.t.Fatalf("this test needs qemu-img (install qemu-utils): %v: %s", err, out)
		}
		e.vols.put(name, path)
		disks = append(disks, api.VMDisk{Volume: name})
	}
	return e.vmWith(spec, disks)
}

// vmWith makes the VM web1 with volumes of its own that have files already.
func (e *env) vmWith(spec api.VMSpec, disks []api.VMDisk) string {
	e.t.Helper()
	vm := api.VM{Meta: api.NewMeta(api.KindVM, "", "web1"), Spec: spec}
	vm.Spec.Disks = disks
	vm.Spec.Memory = max(vm.Spec.Memory, 64*api.MiB)
	must(e.t, vm.Prepare())
	vm.Spec.AssignSlots(nil)
	b := api.Binding{Meta: vm.Meta, Spec: api.BindingSpec{NodeID: "node-1", Node: "node-1", Epoch: 1}}
	for _, d := range disks {
		vol := api.Volume{Meta: api.NewMeta(api.KindVolume, "", d.Volume), Spec: api.VolumeSpec{Size: 64 * api.MiB}}
		vol.Meta.Owner = "vm/" + vm.Meta.ID
		vol.Status = api.VolumeStatus{Phase: api.StorageReady, Format: "qcow2", Size: 64 * api.MiB}
		must(e.t, vol.Prepare())
		tx := &configdb.Txn{}
		must(e.t, configdb.Volumes.Create(tx, &vol))
		tx.Put(configdb.Volumes.RefPrefix(vol.Meta.ID)+"vm/"+vm.Meta.ID, nil)
		e.commit(tx)
	}
	tx := &configdb.Txn{}
	must(e.t, configdb.VMs.Create(tx, &vm))
	must(e.t, configdb.Bindings.CreateUnnamed(tx, &b))
	e.commit(tx)
	return vm.Meta.ID
}

// request does what a request does: it adds an operation, and for a new snapshot the
// object. It returns the ID of the snapshot.
func (e *env) request(id string, action api.Action, name string, memory bool) string {
	e.t.Helper()
	vm := e.vm(id)
	op := api.Operation{Meta: api.NewMeta(api.KindOperation, "", "web1"), Spec: api.OperationSpec{Action: action, VM: "web1", TaskID: api.NewID(), NodeID: "node-1", Epoch: e.binding(id).Spec.Epoch}}
	op.Meta.ID = id
	op.Status.Phase = api.TaskPending
	_, err := configdb.Transact(e.t.Context(), e.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
		op := op.Clone()
		switch action {
		case api.ActionVMSnapshot:
			snap := api.Snapshot{Meta: api.NewMeta(api.KindSnapshot, "", name), Spec: api.SnapshotSpec{VM: "web1", VMID: id, Memory: memory}}
			snap.Status.Phase = api.SnapshotCreating
			for _, s := range e.snapshots(id) {
				if s.Status.Current {
					snap.Spec.Parent = s.Meta.Name
				}
			}
			if err := configdb.CreateSnapshot(tx, &snap); err != nil {
				return err
			}
			op.Spec.SnapshotID = snap.Meta.ID
		case api.ActionVMRevert, api.ActionVMForget:
			snap, err := configdb.FindSnapshot(v, &vm.Meta, name)
			if err != nil {
				return err
			}
			op.Spec.SnapshotID = snap.Meta.ID
			if cur, err := configdb.VMs.Get(v, id); err == nil && action == api.ActionVMRevert && cur.Spec.Power != api.PowerStopped {
				cur.Spec.Power, cur.Spec.ForceStop = api.PowerStopped, true
				if err := configdb.VMs.UpdateSpec(v, tx, &cur); err != nil {
					return err
				}
			}
		}
		return configdb.Operations.CreateUnnamed(tx, &op)
	})
	must(e.t, err)
	cur, err := configdb.Operations.Get(e.db.Local(), id)
	must(e.t, err)
	return cur.Spec.SnapshotID
}

// ended waits for the last word of the operation and does what its task does.
func (e *env) ended(id string, want api.TaskPhase) api.OperationStatus {
	e.t.Helper()
	var op api.Operation
	e.until("the operation's end", func() bool {
		var err error
		op, err = configdb.Operations.Get(e.db.Local(), id)
		return err == nil && op.Status.Phase.Final()
	}, func() string { return fmt.Sprintf("operation %+v, vm %+v", op.Status, e.vm(id).Status) })
	if op.Status.Phase != want {
		e.t.Fatalf("the operation %s: %+v, want %s", op.Spec.Action, op.Status, want)
	}
	tx := &configdb.Txn{}
	configdb.Operations.DeleteUnnamed(tx, &op)
	e.commit(tx)
	return op.Status
}

// done asks and waits for success.
func (e *env) done(id string, action api.Action, name string, memory bool) {
	e.t.Helper()
	e.request(id, action, name, memory)
	e.ended(id, api.TaskSucceeded)
}

func (e *env) snapshots(id string) []api.Snapshot {
	e.t.Helper()
	all, err := configdb.SnapshotsOf(e.db.Local(), id)
	must(e.t, err)
	return all
}

func (e *env) snap(id, name string) api.Snapshot {
	e.t.Helper()
	vm := e.vm(id)
	s, err := configdb.FindSnapshot(e.db.Local(), &vm.Meta, name)
	must(e.t, err)
	return s
}

func (e *env) hasSaved(id string) bool {
	_, err := configdb.SavedStates.Get(e.db.Local(), id)
	return err == nil
}

// noTags fails the test if a disk that no QEMU has open has internal snapshots.
func (e *env) noTags(names ...string) {
	e.t.Helper()
	for _, n := range names {
		path, _, err := e.vols.Resolve(nil, "", n)
		must(e.t, err)
		tags, err := tagsOf(path)
		must(e.t, err)
		if len(tags) > 0 {
			e.t.Errorf("volume %s has the tags %v", n, tags)
		}
	}
}

func running(vm api.VM) bool { return vm.Status.Phase == api.VMRunning }

func write(t *testing.T, path, pattern string) {
	t.Helper()
	if out, err := exec.Command("qemu-io", "-f", "qcow2", "-c", "write -P "+pattern+" 0 64k", path).CombinedOutput(); err != nil || strings.Contains(string(out), "failed") {
		t.Fatalf("write to %s: %v: %s", path, err, out)
	}
}

func reads(t *testing.T, path, pattern string) {
	t.Helper()
	out, err := exec.Command("qemu-io", "-r", "-U", "-f", "qcow2", "-c", "read -P "+pattern+" 0 64k", path).CombinedOutput()
	if err != nil || strings.Contains(string(out), "failed") {
		t.Errorf("%s does not hold %s: %v: %s", path, pattern, err, out)
	}
}
