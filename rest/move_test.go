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

type volumeReply struct {
	Task   api.Task   `json:"task"`
	Object api.Volume `json:"object"`
}

// operationOf returns the operation on an object.
func (f *fixture) operationOf(id string) api.Operation {
	f.t.Helper()
	op, err := configdb.Operations.Get(f.db.Local(), id)
	if err != nil {
		f.t.Fatal(err)
	}
	return op
}

func TestAStoppedVMMovesAsOneOperation(t *testing.T) {
	f := newFixture(t)
	vm := f.newVM("web1", api.VMStopped, api.VMDisk{Size: api.GiB, Pool: "local"}, api.VMDisk{Size: api.GiB, Pool: "shared"})
	f.readyDisks()
	at := f.binding(vm.Meta.ID)
	to := map[string]string{"m1": "m2", "m2": "m1"}[at.Spec.Node]
	r := want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/move", body: `{"node":"` + to + `"}`, role: api.RoleOperator}), http.StatusAccepted)
	op := f.operationOf(vm.Meta.ID)
	m := op.Spec.Move
	local, err := configdb.Volumes.Find(f.db.Local(), "", "web1-disk0")
	if err != nil {
		t.Fatal(err)
	}
	if r.Task.Spec.Action != api.ActionVMMove || op.Spec.TaskID != r.Task.Meta.ID || op.Spec.NodeID != f.nodeIDs[to] || op.Spec.Epoch != at.Spec.Epoch || m == nil || m.Node != to || m.FromNodeID != at.Spec.NodeID {
		t.Fatalf("%+v %+v", op.Spec, m)
	}
	// What all nodes see stays where it is.
	if len(m.Volumes) != 1 || m.Volumes[0] != (api.VolumeMove{ID: local.Meta.ID, Pool: "local"}) {
		t.Errorf("%+v", m.Volumes)
	}
	for _, c := range []call{
		{method: "POST", path: "vms/web1/start"}, {method: "POST", path: "vms/web1/move", body: `{"pool":"shared"}`}, {method: "POST", path: "vms/web1/snapshots", body: `{"name":"a"}`},
		{method: "PATCH", path: "vms/web1", body: `{"spec":{"cpus":2}}`}, {method: "PATCH", path: "volumes/web1-disk0", body: `{"spec":{"size":"2G"}}`},
		{method: "POST", path: "images", body: `{"meta":{"name":"x"},"spec":{"sourceVolume":"web1-disk0"}}`}, {method: "POST", path: "volumes/web1-disk0/move", body: `{"pool":"shared"}`},
		{method: "POST", path: "vms/web1/clone", body: `{"name":"x"}`}, {method: "DELETE", path: "vms/web1"},
	} {
		p := wantProblem(t, f.do(c), 409, api.CodeRefused, "")
		if !strings.Contains(p.Detail, "is being moved; wait for task "+r.Task.Meta.ID) {
			t.Errorf("%s %s: %s", c.method, c.path, p.Detail)
		}
	}
	want[any](t, f.do(call{method: "POST", path: "tasks/" + r.Task.Meta.ID + "/cancel"}), http.StatusAccepted)
	if !f.operationOf(vm.Meta.ID).Spec.Cancel {
		t.Error("the wish to cancel is not there")
	}
	f.endOperation("web1")
	// To another pool of its node.
	want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/move", body: `{"pool":"shared"}`}), http.StatusAccepted)
	op = f.operationOf(vm.Meta.ID)
	if op.Spec.NodeID != at.Spec.NodeID || len(op.Spec.Move.Volumes) != 1 || op.Spec.Move.Volumes[0].Pool != "shared" {
		t.Errorf("%+v", op.Spec.Move)
	}
	f.endOperation("web1")
	want[volumeReply](t, f.do(call{method: "POST", path: "volumes/web1-disk0/move", body: `{"pool":"shared"}`}), http.StatusAccepted)
	if op := f.operationOf(vm.Meta.ID); op.Spec.Action != api.ActionVMMove || len(op.Spec.Move.Volumes) != 1 {
		t.Errorf("%+v", op.Spec)
	}
}

func TestAMoveIsRefusedAndNothingChanges(t *testing.T) {
	f := newFixture(t)
	vm := f.newVM("web1", api.VMStopped, api.VMDisk{Image: "tiny"})
	f.movableVM("runs", api.VMDisk{Size: api.GiB, Pool: "local"})
	f.readyDisks()
	f.suspended("sleeps")
	at := f.binding(vm.Meta.ID).Spec.Node
	other := map[string]string{"m1": "m2", "m2": "m1"}[at]
	for _, c := range []struct {
		name, path, body string
		before           func()
		status           int
		code             api.Code
		field, says      string
	}{
		{"nothing to do", "vms/web1/move", ``, nil, 422, api.CodeInvalid, "pool", "a node or both"},
		{"a bad name", "vms/web1/move", `{"node":"../x"}`, nil, 422, api.CodeInvalid, "node", "not a valid name"},
		{"no such node", "vms/web1/move", `{"node":"nope"}`, nil, 404, api.CodeNotFound, "node", "nope"},
		{"no such pool", "vms/web1/move", `{"pool":"nope"}`, nil, 404, api.CodeNotFound, "pool", "nope"},
		{"to where it is", "vms/web1/move", `{"node":"` + at + `"}`, nil, 409, api.CodeRefused, "node", "there already"},
		{"to the pool where it is", "vms/web1/move", `{"pool":"shared"}`, nil, 409, api.CodeRefused, "pool", "there already"},
		{"a running vm", "vms/runs/move", `{"pool":"shared"}`, nil, 409, api.CodeRefused, "", "muster vm migrate runs"},
		{"a volume of a running vm", "volumes/runs-disk0/move", `{"pool":"shared"}`, nil, 409, api.CodeRefused, "", "muster vm migrate runs"},
		{"a suspended vm", "vms/sleeps/move", `{"pool":"local"}`, nil, 409, api.CodeRefused, "", "is suspended"},
		{"a volume without its vm", "volumes/web1-disk0/move", `{"pool":"local","node":"` + other + `"}`, nil, 409, api.CodeRefused, "node", "muster vm move web1 --node"},
		{"migrated instead", "vms/web1/migrate", `{"to":"` + other + `"}`, nil, 409, api.CodeRefused, "", "muster vm move web1 --node NODE"},
		{"a clone with a snapshot", "vms/web1/move", `{"pool":"local"}`, func() { f.takenSnapshot("web1", "a") }, 409, api.CodeRefused, "", "clone of image tiny, which stays where it is, and holds snapshot a"},
		{"no room there", "vms/web1/move", `{"node":"` + other + `"}`, func() { f.placer.setFull(other, true) }, 409, api.CodeUnplaceable, "", "no node fits"},
		{"a lost node", "vms/web1/move", `{"node":"` + other + `"}`, func() { f.setNodePhase(other, api.NodeLost) }, 409, api.CodeRefused, "", "is lost"},
		{"its node lost", "vms/web1/move", `{"pool":"local"}`, func() { f.setNodePhase(at, api.NodeLost) }, 409, api.CodeRefused, "", "is lost"},
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
}

func TestAFreeVolumeMoves(t *testing.T) {
	f := newFixture(t)
	want[any](t, f.do(call{method: "POST", path: "volumes", body: `{"meta":{"name":"data"},"spec":{"size":"1G","pool":"shared"}}`}), http.StatusAccepted)
	f.readyDisks()
	wantProblem(t, f.do(call{method: "POST", path: "volumes/data/move", body: `{"pool":"local"}`}), 409, api.CodeRefused, "node")
	r := want[volumeReply](t, f.do(call{method: "POST", path: "volumes/data/move", body: `{"pool":"local","node":"m2"}`, role: api.RoleOperator}), http.StatusAccepted)
	id := r.Object.Meta.ID
	op := f.operationOf(id)
	if op.Spec.Action != api.ActionVolumeMove || op.Spec.NodeID != f.nodeIDs["m2"] || op.Spec.Move.Volumes[0] != (api.VolumeMove{ID: id, Pool: "local"}) || r.Task.Spec.TargetKind != api.KindVolume || r.Task.Spec.TargetID != id {
		t.Errorf("%+v %+v", op.Spec, r.Task.Spec)
	}
	for _, c := range []call{
		{method: "DELETE", path: "volumes/data"}, {method: "PATCH", path: "volumes/data", body: `{"spec":{"size":"2G"}}`},
		{method: "POST", path: "vms", body: `{"meta":{"name":"web1"},"spec":{"disks":[{"volume":"data"}]}}`},
		{method: "POST", path: "images", body: `{"meta":{"name":"x"},"spec":{"sourceVolume":"data"}}`}, {method: "POST", path: "volumes/data/move", body: `{"pool":"local","node":"m1"}`},
	} {
		p := wantProblem(t, f.do(c), 409, api.CodeRefused, "")
		if !strings.Contains(p.Detail, r.Task.Meta.ID) || !strings.Contains(p.Detail, "being moved") {
			t.Errorf("%s %s: %s", c.method, c.path, p.Detail)
		}
	}
}
