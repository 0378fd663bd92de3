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

func TestAnImageOfAVMsVolumeComesFromASnapshot(t *testing.T) {
	f := newFixture(t)
	vm := f.newVM("web1", api.VMStopped, api.VMDisk{Image: "tiny"}, api.VMDisk{Size: api.GiB, Pool: "local"})
	f.readyDisks()
	r := want[imageReply](t, f.do(call{method: "POST", path: "images", body: `{"meta":{"name":"tpl"},"spec":{"sourceVolume":"web1-disk0"}}`, role: api.RoleOperator}), http.StatusAccepted)
	s := r.Object.Spec
	if s.Pool != "shared" || s.SourceVolume != "web1-disk0" || s.SourceSnapshot == "" || r.Task.Spec.Action != api.ActionImageCreate {
		t.Fatalf("%+v, task %+v", s, r.Task.Spec)
	}
	v := f.db.Local()
	op, err := configdb.Operations.Get(v, vm.Meta.ID)
	if err != nil || op.Spec.Action != api.ActionVMSnapshot || op.Spec.SnapshotID != s.SourceSnapshot {
		t.Fatalf("no snapshot is taken: %+v, %v", op.Spec, err)
	}
	snap, err := configdb.Snapshots.Get(v, s.SourceSnapshot)
	if err != nil || !snap.Spec.Temporary {
		t.Errorf("%+v, %v", snap.Spec, err)
	}
	wantProblem(t, f.do(call{method: "PUT", path: "images/tpl/content", body: "x"}), 409, api.CodeRefused, "")
	f.endOperation("web1")
	f.takenSnapshot("web1", snap.Meta.Name)
	p := wantProblem(t, f.do(call{method: "DELETE", path: "vms/web1/snapshots/" + snap.Meta.Name}), http.StatusConflict, api.CodeRefused, "")
	if !strings.Contains(p.Detail, "image tpl is being copied") {
		t.Error(p.Detail)
	}
	// Of a snapshot that there is, by its name, into another pool; the disk is in a
	// pool of one node, which has to copy it.
	at := f.binding(vm.Meta.ID).Spec.Node
	r = want[imageReply](t, f.do(call{method: "POST", path: "images", body: `{"meta":{"name":"tpl2"},"spec":{"sourceVolume":"web1-disk1","sourceSnapshot":"` + snap.Meta.Name + `","pool":"shared"}}`}), http.StatusAccepted)
	if r.Object.Spec.SourceSnapshot != snap.Meta.ID || r.Object.Spec.Node != at || r.Object.Spec.Pool != "shared" {
		t.Errorf("%+v", r.Object.Spec)
	}
	other := map[string]string{"m1": "m2", "m2": "m1"}[at]
	for name, c := range map[string]struct {
		spec, field, says string
		status            int
		code              api.Code
	}{
		"another node":       {`"sourceVolume":"web1-disk1","node":"` + other + `"`, "spec.node", "on node " + at + " only", 409, api.CodeRefused},
		"no such volume":     {`"sourceVolume":"nope"`, "spec.sourceVolume", "does not exist", 404, api.CodeNotFound},
		"no such snapshot":   {`"sourceVolume":"web1-disk0","sourceSnapshot":"nope"`, "spec.sourceSnapshot", "no snapshot", 404, api.CodeNotFound},
		"a snapshot alone":   {`"sourceSnapshot":"nope"`, "spec.sourceSnapshot", "name the volume", 422, api.CodeInvalid},
		"two sources":        {`"sourceVolume":"web1-disk0","path":"/x"`, "spec.path", "one of them", 422, api.CodeInvalid},
		"a checksum":         {`"sourceVolume":"web1-disk0","sha256":"` + strings.Repeat("0", 64) + `"`, "spec.sha256", "", 422, api.CodeInvalid},
		"a name that is not": {`"sourceVolume":"../x"`, "spec.sourceVolume", "", 422, api.CodeInvalid},
	} {
		was := f.rev()
		p := wantProblem(t, f.do(call{method: "POST", path: "images", body: `{"meta":{"name":"x"},"spec":{` + c.spec + `}}`}), c.status, c.code, c.field)
		if !strings.Contains(p.Detail, c.says) {
			t.Errorf("%s: %q does not say %q", name, p.Detail, c.says)
		}
		if f.rev() != was {
			t.Errorf("%s: something was written", name)
		}
	}
}

func TestAnImageOfAFreeVolumeHoldsIt(t *testing.T) {
	f := newFixture(t)
	want[any](t, f.do(call{method: "POST", path: "volumes", body: `{"meta":{"name":"data"},"spec":{"size":"1G","pool":"shared"}}`}), http.StatusAccepted)
	p := wantProblem(t, f.do(call{method: "POST", path: "images", body: `{"meta":{"name":"tpl"},"spec":{"sourceVolume":"data"}}`}), 409, api.CodeRefused, "")
	if !strings.Contains(p.Detail, "wait until it is ready") {
		t.Error(p.Detail)
	}
	f.readyDisks()
	wantProblem(t, f.do(call{method: "POST", path: "images", body: `{"meta":{"name":"tpl"},"spec":{"sourceVolume":"data","sourceSnapshot":"s"}}`}), 409, api.CodeRefused, "spec.sourceSnapshot")
	want[imageReply](t, f.do(call{method: "POST", path: "images", body: `{"meta":{"name":"tpl"},"spec":{"sourceVolume":"data"}}`}), http.StatusAccepted)
	p = wantProblem(t, f.do(call{method: "POST", path: "vms", body: `{"meta":{"name":"web1"},"spec":{"disks":[{"volume":"data"}]}}`}), 409, api.CodeRefused, "")
	if !strings.Contains(p.Detail, "image tpl") {
		t.Error(p.Detail)
	}
	wantProblem(t, f.do(call{method: "DELETE", path: "volumes/data"}), 409, api.CodeRefused, "")
}
