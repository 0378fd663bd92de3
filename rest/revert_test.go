// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// revert asks for a revert and returns what was done.
func (f *fixture) revert(in api.RevertRequest) api.RevertResult {
	f.t.Helper()
	return want[api.RevertResult](f.t, f.do(call{method: "POST", path: "config/revert", body: in}), 200)
}

// planned returns "OPERATION KIND/NAME", with "refused" or "later" before it.
func planned(r api.RevertResult) (out []string) {
	for _, item := range r.Items {
		text := fmt.Sprintf("%s %s/%s", item.Operation, item.Kind, item.Name)
		switch {
		case item.Refused != "":
			text = "refused " + text
		case item.Part > 1:
			text = fmt.Sprintf("part %d: %s", item.Part, text)
		}
		out = append(out, text)
	}
	return out
}

func (f *fixture) vm(name string) api.VM {
	f.t.Helper()
	return want[api.VM](f.t, f.do(call{method: "GET", path: "vms/" + name}), 200)
}

// settled fails unless nothing is left to revert but what is kept.
func (f *fixture) settled(to uint64) {
	f.t.Helper()
	if r := f.revert(api.RevertRequest{To: to, DryRun: true}); len(r.Items) != 0 {
		f.t.Errorf("after the revert to %d there is still: %q", to, planned(r))
	}
}

func TestRevertOneObject(t *testing.T) {
	f := newFixture(t)
	f.begin()
	vm := f.newVM("web1", api.VMStopped)
	f.newVM("web2", api.VMStopped)
	to := f.rev()
	f.patch("vms/web1", `{"spec":{"cpus":4,"memory":"1G","ha":"restart"},"meta":{"labels":{"env":"prod"}}}`)
	f.patch("vms/web2", `{"spec":{"cpus":2}}`)

	plan := f.revert(api.RevertRequest{To: to, Objects: []string{"vm/web1"}, DryRun: true})
	if got := planned(plan); !slices.Equal(got, []string{"update vm/web1"}) || plan.Done || plan.Plan == "" || f.vm("web1").Spec.CPUs != 4 {
		t.Fatalf("the plan is %q: %+v", got, plan)
	}
	var paths []string
	for _, c := range plan.Items[0].Changes {
		paths = append(paths, fmt.Sprintf("%s:%s→%s", c.Path, c.Before, c.After))
	}
	if wants := []string{`meta.labels.env:"prod"→`, `spec.cpus:4→1`, `spec.ha:"restart"→"none"`, `spec.memory:1073741824→536870912`}; !slices.Equal(paths, wants) {
		t.Errorf("%q, want %q", paths, wants)
	}
	before := f.rev()
	r := f.revert(api.RevertRequest{To: to, Objects: []string{"vm/web1"}, Plan: plan.Plan})
	now := f.vm("web1")
	if !r.Done || r.Revision != before+1 || now.Meta.Revision != r.Revision || now.Spec.CPUs != 1 || now.Spec.HA != api.HANone || now.Meta.Labels != nil || now.Meta.Generation <= vm.Meta.Generation {
		t.Errorf("%+v, now %+v", r, now)
	}
	if f.vm("web2").Spec.CPUs != 2 {
		t.Error("another object was reverted too")
	}
	// It is a change like any other, and says what it is.
	c := f.log("object=vm/web1&limit=1").Items[0]
	if c.Note != fmt.Sprintf("revert to %d", to) || c.Actor != "administrator" || c.Source != "api 127.0.0.1" || c.Revision != r.Revision {
		t.Errorf("%+v", c)
	}
	ev := f.do(call{method: "GET", path: "events?fields=spec.type=audit.config.revert"})
	if text := fmt.Sprintf("administrator: revert config to revision %d", to); strings.Count(string(ev.body), text) != 1 {
		t.Errorf("%s", ev.body)
	}
	// Once more there is nothing to do, and back again there is.
	if again := f.revert(api.RevertRequest{To: to, Objects: []string{"vm/" + vm.Meta.ID}}); again.Done || len(again.Items) != 0 {
		t.Errorf("%+v", again)
	}
	f.revert(api.RevertRequest{To: before, Objects: []string{"vm/web1"}})
	if now := f.vm("web1"); now.Spec.CPUs != 4 || now.Meta.Labels["env"] != "prod" {
		t.Errorf("the revert of the revert: %+v", now)
	}
}

// Power and place are what a VM does, not what it is.
func TestARevertNeitherStartsNorStopsNorMoves(t *testing.T) {
	f := newFixture(t)
	f.begin()
	f.newVM("a", api.VMStopped)
	b := f.newVM("b", api.VMStopped)
	stopped := f.rev()
	do := func(path string) {
		t.Helper()
		if a := f.do(call{method: "POST", path: path}); a.status != 202 {
			t.Fatalf("%s: %d %s", path, a.status, a.body)
		}
	}
	f.patch("vms/b", `{"meta":{"labels":{"x":"y"}}}`)
	do("vms/b/start")
	f.report(b.Meta.ID, api.VMRunning)
	do("vms/b/reboot")
	running := f.rev()
	tasks := strings.Count(string(f.do(call{method: "GET", path: "tasks"}).body), `"action"`)
	binding := f.binding(b.Meta.ID)

	r := f.revert(api.RevertRequest{To: stopped})
	if got := planned(r); !slices.Equal(got, []string{"update vm/b"}) || !slices.Equal(r.Items[0].Kept, []string{"spec.power", "spec.reboots"}) {
		t.Errorf("%q: %+v", got, r.Items)
	}
	if now := f.vm("b"); now.Spec.Power != api.PowerRunning || now.Spec.Reboots != 1 || now.Meta.Labels != nil {
		t.Errorf("%+v", now.Spec)
	}
	// Asked for by name, it says that there is nothing but what is kept.
	r = f.revert(api.RevertRequest{To: stopped, Objects: []string{"vm/b"}})
	if got := planned(r); r.Done || !slices.Equal(got, []string{"keep vm/b"}) {
		t.Errorf("%q: %+v", got, r)
	}
	f.settled(stopped)
	do("vms/b/stop")
	f.report(b.Meta.ID, api.VMStopped)
	f.revert(api.RevertRequest{To: running})
	if now := f.vm("b"); now.Spec.Power != api.PowerStopped || now.Meta.Labels["x"] != "y" {
		t.Errorf("%+v", now)
	}
	if now := f.binding(b.Meta.ID); now.Spec != binding.Spec {
		t.Errorf("the binding was %+v and is %+v", binding.Spec, now.Spec)
	}
	if n := strings.Count(string(f.do(call{method: "GET", path: "tasks"}).body), `"action"`); n != tasks+1 { // of the stop
		t.Errorf("there are %d tasks, there were %d", n, tasks)
	}
}

func TestWhatCannotBeRevertedIsListedAndNothingIsWritten(t *testing.T) {
	f := newFixture(t)
	f.begin()
	f.newVM("a", api.VMStopped)
	run := f.newVM("run", api.VMStopped)
	lost := f.newVM("lost", api.VMStopped, api.VMDisk{Size: api.GiB, Pool: "shared"})
	f.do(call{method: "POST", path: "rules", body: named("r", map[string]any{"check": "vm-failed"})})
	to := f.rev()
	f.patch("vms/a", `{"spec":{"cpus":4}}`)
	f.patch("vms/run", `{"spec":{"cpus":4}}`)
	f.patch("rules/r", `{"spec":{"disabled":true}}`)
	f.do(call{method: "POST", path: "vms/run/start"})
	f.report(run.Meta.ID, api.VMRunning)
	f.newVM("new", api.VMStopped)
	f.remove("lost", lost)
	// On its way out.
	f.newVM("going", api.VMStopped)
	f.do(call{method: "DELETE", path: "vms/going"})

	plan := f.revert(api.RevertRequest{To: to, DryRun: true})
	wants := []string{"refused create volume/lost-disk0", "update vm/a", "refused delete vm/going", "refused create vm/lost", "refused delete vm/new", "update vm/run", "update rule/r"}
	if got := planned(plan); !slices.Equal(got, wants) || plan.Refused != 4 {
		t.Errorf("%q, want %q", got, wants)
	}
	for name, words := range map[string]string{
		"lost-disk0": "its data is gone", "going": "is being deleted", "lost": `its volume "lost-disk0" (spec.disks[0]) is gone`, "new": "remove it with muster vm rm",
	} {
		if i := slices.IndexFunc(plan.Items, func(i api.RevertItem) bool { return i.Name == name }); i < 0 || !strings.Contains(plan.Items[i].Refused, words) || plan.Items[i].Code != api.CodeRefused {
			t.Errorf("%s: %+v, want %q", name, plan.Items[i], words)
		}
	}
	before := f.rev()
	p := wantProblem(t, f.do(call{method: "POST", path: "config/revert", body: api.RevertRequest{To: to}}), 409, api.CodeRefused, "")
	if !strings.Contains(p.Detail, "4 of 7 objects cannot be reverted, so none was") || !strings.Contains(p.Detail, "vm lost") || f.rev() != before {
		t.Errorf("%q; revision %d, was %d", p.Detail, f.rev(), before)
	}
	r := f.revert(api.RevertRequest{To: to, SkipRefused: true})
	if !r.Done || f.vm("a").Spec.CPUs != 1 || f.vm("run").Spec.CPUs != 1 || f.vm("run").Spec.Power != api.PowerRunning {
		t.Errorf("%+v", r)
	}
	if r := f.revert(api.RevertRequest{To: to, SkipRefused: true}); r.Done || r.Refused != 4 {
		t.Errorf("the second time: %+v", r)
	}
	// Without hope from the beginning.
	wantProblem(t, f.do(call{method: "POST", path: "config/revert", body: api.RevertRequest{To: to, Objects: []string{"vm/lost"}}}), 409, api.CodeRefused, "")
}

// remove does what the owner does at the end of a VM: it and its own volumes go.
func (f *fixture) remove(name string, vm api.VM) {
	f.t.Helper()
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		o, err := configdb.VMs.Get(v, vm.Meta.ID)
		if err != nil {
			return err
		}
		b, err := configdb.Bindings.Get(v, vm.Meta.ID)
		if err != nil {
			return err
		}
		configdb.ReleaseNICs(v, tx, &o)
		configdb.VMs.Delete(tx, &o)
		configdb.Bindings.DeleteUnnamed(tx, &b)
		vols, err := configdb.Volumes.List(v)
		for i := range vols {
			configdb.Volumes.Release(tx, vols[i].Meta.ID, api.KindVM, vm.Meta.ID)
		}
		return err
	})
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		vol, err := configdb.Volumes.Find(v, "", name+"-disk0")
		if err == nil {
			configdb.Volumes.Delete(tx, &vol)
		}
		return api.IgnoreNotFound(err)
	})
}

// What hangs together comes back together: a network, the addresses in it, and
// the cards of VMs, each under its old ID and with its claims.
func TestRevertBringsBackWhatHangsTogether(t *testing.T) {
	f := newFixture(t)
	f.begin()
	lan := f.addNetwork("lan", map[string]any{"type": "vlan", "vlan": 7}, map[string]any{"cidr": "10.0.0.0/24", "gateway": "10.0.0.1"})
	want[api.Uplink](t, f.do(call{method: "POST", path: "uplinks", body: named("up", map[string]any{"node": "m1", "nic": "eth1"})}), 201)
	want[vmReply](t, f.do(call{method: "POST", path: "vms", body: vmOn("web1", map[string]any{"network": "lan", "address": "10.0.0.5"})}), 202)
	f.report(f.vm("web1").Meta.ID, api.VMStopped)
	nic := f.vm("web1").Spec.NICs[0]
	claims, to := f.claims(), f.rev()

	f.patch("vms/web1", `{"spec":{"nics":[]}}`)
	for _, path := range []string{"ippools/lan", "networks/lan", "uplinks/up"} {
		if a := f.do(call{method: "DELETE", path: path}); a.status != 204 {
			t.Fatalf("%s: %d %s", path, a.status, a.body)
		}
	}
	// The name and the tag have another owner now, and so has the node's uplink.
	f.addNetwork("lan", map[string]any{"type": "vlan", "vlan": 8}, nil)
	f.addNetwork("other", map[string]any{"type": "vlan", "vlan": 7}, nil)
	want[api.Uplink](t, f.do(call{method: "POST", path: "uplinks", body: named("up2", map[string]any{"node": "m1", "nic": "eth2"})}), 201)

	before := f.rev()
	r := f.revert(api.RevertRequest{To: to})
	wants := []string{"create network/lan", "delete network/lan", "delete network/other", "create ippool/lan", "create uplink/up", "delete uplink/up2", "update vm/web1"}
	got := planned(r)
	slices.Sort(got)
	slices.Sort(wants)
	if !slices.Equal(got, wants) || r.Revision != before+1 {
		t.Fatalf("%q at %d, want %q in one transaction at %d", got, r.Revision, wants, before+1)
	}
	back := want[api.Network](t, f.do(call{method: "GET", path: "networks/lan"}), 200)
	if back.Meta.ID != lan.Meta.ID || back.Spec.VLAN != 7 || !back.Meta.CreatedAt.Equal(lan.Meta.CreatedAt) || back.Meta.Generation <= lan.Meta.Generation {
		t.Errorf("the network is %+v, was %+v", back, lan)
	}
	if now := f.vm("web1").Spec.NICs; len(now) != 1 || now[0] != nic {
		t.Errorf("the card is %+v, was %+v", now, nic)
	}
	if n := f.claims(); n != claims {
		t.Errorf("%d claims, there were %d", n, claims)
	}
	// The claims and references work: what is in use stays, what is taken is taken.
	wantProblem(t, f.do(call{method: "DELETE", path: "networks/lan"}), 409, api.CodeRefused, "")
	wantProblem(t, f.do(call{method: "POST", path: "networks", body: named("x", map[string]any{"type": "vlan", "vlan": 7})}), 409, api.CodeRefused, "spec.vlan")
	wantProblem(t, f.do(call{method: "POST", path: "vms", body: vmOn("web2", map[string]any{"network": "lan", "address": "10.0.0.5"})}), 409, api.CodeRefused, "spec.nics[0].address")
	f.settled(to)
	// And away again.
	var parts []int
	for {
		r = f.revert(api.RevertRequest{To: before, Partial: true})
		if !r.Done {
			break
		}
		parts = append(parts, r.Parts)
	}
	if !slices.Equal(parts, []int{3, 2, 1}) { // the card; then the pool; then the network
		t.Errorf("it took parts %v", parts)
	}
	f.settled(before)
}

// What is still needed when the transaction begins can only go in the next.
func TestRevertOfWhatIsStillNeededGoesOnLater(t *testing.T) {
	f := newFixture(t)
	f.begin()
	vm := f.newVM("web1", api.VMStopped)
	to := f.rev()
	f.addNetwork("lan", map[string]any{}, nil)
	f.patch("vms/web1", `{"spec":{"nics":[{"network":"lan"}]}}`)
	p := wantProblem(t, f.do(call{method: "POST", path: "config/revert", body: api.RevertRequest{To: to}}), 409, api.CodeRefused, "")
	if !strings.Contains(p.Detail, "it takes 2 transactions to revert 2 objects, so none was") {
		t.Errorf("%q", p.Detail)
	}
	r := f.revert(api.RevertRequest{To: to, Partial: true})
	if got := planned(r); !r.Done || r.Parts != 2 || !slices.Equal(got, []string{"part 2: delete network/lan", "update vm/web1"}) {
		t.Errorf("%q", got)
	}
	r = f.revert(api.RevertRequest{To: to, Partial: true})
	if got := planned(r); !r.Done || r.Parts != 1 || !slices.Equal(got, []string{"delete network/lan"}) {
		t.Errorf("%q", got)
	}
	f.settled(to)
	if refs := configdb.VMs.Referrers(f.db.Local(), vm.Meta.ID); len(refs) != 0 || f.claims() != 0 {
		t.Errorf("left: %v, %d claims", refs, f.claims())
	}
}

// An address that went from one VM to another goes back.
func TestRevertMovesAddressesBack(t *testing.T) {
	f := newFixture(t)
	f.begin()
	f.addNetwork("lan", map[string]any{}, map[string]any{"cidr": "10.0.0.0/24"})
	for name, address := range map[string]string{"a": "10.0.0.5", "b": "10.0.0.6"} {
		vm := want[vmReply](t, f.do(call{method: "POST", path: "vms", body: vmOn(name, map[string]any{"network": "lan", "address": address})}), 202).Object
		f.report(vm.Meta.ID, api.VMStopped)
	}
	to := f.rev()
	f.patch("vms/a", `{"spec":{"nics":[{"network":"lan","address":"10.0.0.7"}]}}`)
	f.report(f.vm("a").Meta.ID, api.VMStopped)
	f.patch("vms/b", `{"spec":{"nics":[{"network":"lan","address":"10.0.0.5"}]}}`)
	r := f.revert(api.RevertRequest{To: to})
	if a, b := f.vm("a").Spec.NICs[0].Address, f.vm("b").Spec.NICs[0].Address; a != "10.0.0.5" || b != "10.0.0.6" {
		t.Errorf("a has %s and b has %s; %q", a, b, planned(r))
	}
	f.settled(to)
}

func TestRevertBringsBackAVMWithTheVolumesItHad(t *testing.T) {
	f := newFixture(t)
	f.begin()
	r := want[struct{ Object api.Volume }](t, f.do(call{method: "POST", path: "volumes", body: named("data", map[string]any{"size": "1G", "pool": "shared"})}), 202)
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		o, err := configdb.Volumes.Get(v, r.Object.Meta.ID)
		o.Status.Phase = api.StorageReady
		if err == nil {
			err = configdb.Volumes.UpdateStatus(v, tx, &o)
		}
		return err
	})
	vm := f.newVM("web1", api.VMStopped, api.VMDisk{Volume: "data"})
	f.do(call{method: "POST", path: "vms/web1/start"})
	to := f.rev()
	f.remove("web1", vm)

	done := f.revert(api.RevertRequest{To: to, Objects: []string{"vm/web1"}})
	if got := planned(done); !slices.Equal(got, []string{"create vm/web1"}) || done.Items[0].Task == "" {
		t.Fatalf("%q: %+v", got, done.Items)
	}
	now := f.vm("web1")
	b := f.binding(vm.Meta.ID)
	if now.Meta.ID != vm.Meta.ID || now.Spec.Power != api.PowerStopped || now.Spec.Disks[0].Volume != "data" || !slices.Equal(done.Items[0].Kept, []string{"spec.power"}) {
		t.Errorf("%+v", now)
	}
	// Above every epoch that it ever had: each took a revision.
	if b.Spec.Epoch < to || now.Status.Epoch != b.Spec.Epoch || b.Spec.Epoch > f.rev() {
		t.Errorf("the epoch is %d, in the status %d, at revision %d", b.Spec.Epoch, now.Status.Epoch, f.rev())
	}
	task := want[api.Task](t, f.do(call{method: "GET", path: "tasks/" + done.Items[0].Task}), 200)
	if task.Spec.Action != api.ActionVMCreate || task.Spec.TargetID != vm.Meta.ID {
		t.Errorf("%+v", task.Spec)
	}
	if by := configdb.Volumes.Referrers(f.db.Local(), r.Object.Meta.ID); !slices.Equal(by, []string{"vm/" + vm.Meta.ID}) {
		t.Errorf("the volume is used by %v", by)
	}
	// Its volume has another user: that is told.
	f.remove("web1", now)
	f.newVM("thief", api.VMStopped, api.VMDisk{Volume: "data"})
	p := wantProblem(t, f.do(call{method: "POST", path: "config/revert", body: api.RevertRequest{To: to, Objects: []string{"vm/web1"}}}), 409, api.CodeRefused, "")
	if !strings.Contains(p.Detail, "attached to vm thief") {
		t.Errorf("%q", p.Detail)
	}
}

func TestRevertUsersReceiversRulesAndPools(t *testing.T) {
	f := newFixture(t)
	withMonitors(f)
	f.begin()
	key := newPublicKey(t)
	post := func(path string, body any) {
		t.Helper()
		if a := f.do(call{method: "POST", path: path, body: body}); a.status != 201 {
			t.Fatalf("%s: %d %s", path, a.status, a.body)
		}
	}
	post("users", named("ann", map[string]any{"role": "operator", "sshKeys": []string{key}}))
	post("receivers", named("nms", map[string]any{"type": "snmp", "address": "h:162", "secret": "first"}))
	post("rules", named("hot", map[string]any{"check": "metric", "metric": "m", "threshold": 5}))
	post("pools", named("big", map[string]any{"type": "shared", "path": "/srv/big"}))
	to := f.rev()
	sealed := func() string {
		o, err := configdb.Receivers.Find(f.db.Local(), "", "nms")
		if err != nil {
			t.Fatal(err)
		}
		return string(o.Spec.SealedSecret)
	}
	first := sealed()
	for _, path := range []string{"users/ann", "rules/hot", "pools/big"} {
		if a := f.do(call{method: "DELETE", path: path}); a.status != 204 {
			t.Fatalf("%s: %d %s", path, a.status, a.body)
		}
	}
	f.patch("receivers/nms", `{"spec":{"secret":"second","minSeverity":"info"}}`)
	post("users", named("bob", map[string]any{"sshKeys": []string{key}})) // has ann's key
	post("pools", named("huge", map[string]any{"type": "shared", "path": "/srv/big"}))
	if sealed() == first {
		t.Fatal("the secret did not change")
	}
	r := f.revert(api.RevertRequest{To: to})
	got := planned(r)
	wants := []string{"create pool/big", "delete pool/huge", "create rule/hot", "update receiver/nms", "create user/ann", "delete user/bob"}
	if !slices.Equal(got, wants) {
		t.Errorf("%q, want %q", got, wants)
	}
	if sealed() != first {
		t.Error("the receiver has not got its old secret back")
	}
	if strings.Contains(fmt.Sprintf("%+v", r), "sealed:") {
		t.Errorf("the answer shows a secret: %+v", r)
	}
	ann, err := configdb.Users.Find(f.db.Local(), "", "ann")
	if err != nil || ann.Spec.Role != api.RoleOperator {
		t.Fatalf("%+v, %v", ann, err)
	}
	p := wantProblem(t, f.do(call{method: "POST", path: "users", body: named("eve", map[string]any{"sshKeys": []string{key}})}), 409, api.CodeRefused, "spec.sshKeys[0]")
	if !strings.Contains(p.Detail, "user ann") {
		t.Errorf("%q", p.Detail)
	}
	wantProblem(t, f.do(call{method: "POST", path: "pools", body: named("x", map[string]any{"type": "shared", "path": "/srv/big"})}), 409, api.CodeRefused, "")
	f.settled(to)
}

// Fields that say where something is, and what never changes, stay.
func TestRevertKeepsPlacesAndTheClusterItself(t *testing.T) {
	f := newFixture(t)
	c := api.Cluster{Meta: api.NewMeta(api.KindCluster, "", "prod"), Spec: api.ClusterSpec{CACert: "old", SealedCAKey: []byte("key"), Life: 1, FeatureLevel: 2}}
	create(f, configdb.Clusters, &c)
	f.begin()
	to := f.rev()
	f.patch("config/retention", `{"maxAgeSeconds":7200}`)
	f.patch("nodes/m2", `{"spec":{"maintenance":true,"reservedMemory":"1G"}}`)
	f.patch("images/tiny", `{"meta":{"labels":{"os":"tiny"}}}`)
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		img, err := configdb.Images.Find(v, "", "tiny")
		if err != nil {
			return err
		}
		img.Spec.Node = "m2" // the leader handed its work on
		cl, err := configdb.Clusters.Get(v, c.Meta.ID)
		if err != nil {
			return err
		}
		cl.Spec.CACert, cl.Spec.Life, cl.Spec.SealedCAKey = "new", 2, []byte("new key")
		if err := configdb.Clusters.UpdateSpec(v, tx, &cl); err != nil {
			return err
		}
		return configdb.Images.UpdateSpec(v, tx, &img)
	})
	r := f.revert(api.RevertRequest{To: to})
	if got := planned(r); !slices.Equal(got, []string{"update cluster/prod", "update node/m2", "update image/tiny"}) {
		t.Fatalf("%q", got)
	}
	for i, kept := range [][]string{{"spec.caCert", "spec.life"}, {"spec.maintenance"}, {"spec.node"}} {
		if got := r.Items[i].Kept; !slices.Equal(slices.DeleteFunc(got, func(p string) bool { return p == "spec.sealedCAKey" }), kept) {
			t.Errorf("%s: kept %q, want %q", r.Items[i].Name, got, kept)
		}
	}
	now, err := configdb.Clusters.Get(f.db.Local(), c.Meta.ID)
	if err != nil || now.Spec.CACert != "new" || string(now.Spec.SealedCAKey) != "new key" || now.Spec.Life != 2 || now.Spec.History.MaxAgeSeconds != 0 {
		t.Errorf("%+v, %v", now.Spec, err)
	}
	n := want[api.Node](t, f.do(call{method: "GET", path: "nodes/m2"}), 200)
	if !n.Spec.Maintenance || n.Spec.ReservedMemory != 512*api.MiB {
		t.Errorf("%+v", n.Spec)
	}
	img := want[api.Image](t, f.do(call{method: "GET", path: "images/tiny"}), 200)
	if img.Spec.Node != "m2" || img.Meta.Labels != nil {
		t.Errorf("%+v", img)
	}
	f.settled(to)
}

func TestRevertByAPlan(t *testing.T) {
	f := newFixture(t)
	f.begin()
	f.newVM("web1", api.VMStopped)
	to := f.rev()
	f.patch("vms/web1", `{"spec":{"cpus":4}}`)
	plan := f.revert(api.RevertRequest{To: to, DryRun: true})
	f.patch("vms/web1", `{"spec":{"cpus":5}}`)
	before := f.rev()
	wantProblem(t, f.do(call{method: "POST", path: "config/revert", body: api.RevertRequest{To: to, Plan: plan.Plan}}), 412, api.CodeConflict, "")
	if f.rev() != before {
		t.Error("it was carried out all the same")
	}
	plan = f.revert(api.RevertRequest{To: to, DryRun: true})
	// The same request twice acts once.
	ask := call{method: "POST", path: "config/revert", body: api.RevertRequest{To: to, Plan: plan.Plan}, header: map[string]string{headerIdemKey: "k1"}}
	first := want[api.RevertResult](t, f.do(ask), 200)
	f.patch("vms/web1", `{"spec":{"cpus":7}}`)
	a := f.do(ask)
	again := want[api.RevertResult](t, a, 200)
	if a.header.Get(headerReplayed) != "true" || again.Revision != first.Revision || f.vm("web1").Spec.CPUs != 7 || !slices.Equal(planned(again), []string{"update vm/web1"}) || !again.Done {
		t.Errorf("%s %+v", a.header, again)
	}
}

func TestARevertThatIsTooLargeGoesInParts(t *testing.T) {
	f := newFixture(t)
	f.begin()
	const many = 1100
	for i := 0; i < many; {
		f.txn(func(v *configdb.View, tx *configdb.Txn) error {
			for range 100 {
				name := fmt.Sprintf("vm%d", i)
				vm := api.VM{Meta: api.NewMeta(api.KindVM, "", name)}
				if err := vm.Prepare(); err != nil {
					return err
				}
				vm.Status.Phase = api.VMStopped
				b := api.Binding{Meta: api.NewMeta(api.KindBinding, "", name), Spec: api.BindingSpec{Node: "m1", NodeID: f.nodeIDs["m1"], Epoch: 1}}
				b.Meta.ID = vm.Meta.ID
				if err := configdb.VMs.Create(tx, &vm); err != nil {
					return err
				}
				if err := configdb.Bindings.CreateUnnamed(tx, &b); err != nil {
					return err
				}
				i++
			}
			return nil
		})
	}
	to := f.rev()
	vms, err := configdb.VMs.List(f.db.Local())
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < many; i += 400 {
		f.txn(func(v *configdb.View, tx *configdb.Txn) error {
			for j := i; j < min(i+400, many); j++ {
				vms[j].Spec.CPUs = 3
				if err := configdb.VMs.UpdateSpec(v, tx, &vms[j]); err != nil {
					return err
				}
			}
			return nil
		})
	}
	start := time.Now()
	plan := f.revert(api.RevertRequest{To: to, DryRun: true})
	t.Logf("the plan for %d objects took %s", many, time.Since(start))
	const wantParts = 4
	if len(plan.Items) != many || plan.Parts != wantParts {
		t.Fatalf("%d objects in %d parts", len(plan.Items), plan.Parts)
	}
	before := f.rev()
	revert := func(in api.RevertRequest) (a answer) {
		for range 10 { // a slow machine lets the deadline pass: nothing was changed then
			if a = f.do(call{method: "POST", path: "config/revert", body: in}); a.status != http.StatusGatewayTimeout {
				break
			}
		}
		return a
	}
	p := wantProblem(t, revert(api.RevertRequest{To: to}), 409, api.CodeRefused, "")
	if !strings.Contains(p.Detail, fmt.Sprintf("it takes 4 transactions to revert %d objects, so none was", many)) || f.rev() != before {
		t.Errorf("%q", p.Detail)
	}
	for left := wantParts; left > 0; left-- {
		if r := want[api.RevertResult](t, revert(api.RevertRequest{To: to, Partial: true}), http.StatusOK); !r.Done || r.Parts != left {
			t.Fatalf("%d parts, want %d", r.Parts, left)
		}
	}
	if f.rev() != before+wantParts {
		t.Errorf("%d revisions for %d parts", f.rev()-before, wantParts)
	}
	f.settled(to)
}

func TestRevertOfNothing(t *testing.T) {
	f := newFixture(t)
	f.begin()
	a := f.do(call{method: "POST", path: "config/revert", body: `{"to":1,"objects":["vm"]}`})
	if r := want[api.RevertResult](t, a, http.StatusOK); r.Done || len(r.Items) != 0 || r.Plan == "" {
		t.Errorf("nothing differs, but: %+v", r)
	}
}
