// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

// serveSnapshots answers below /vms/{name}/snapshots.
func (f *fakeCluster) serveSnapshots(w http.ResponseWriter, r *http.Request, vm *fakeObject, rest string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	name, verb, _ := strings.Cut(rest, "/")
	var mine []*fakeObject
	var one *fakeObject
	current := ""
	for _, o := range f.objects[api.KindSnapshot] {
		var s api.Snapshot
		_ = json.Unmarshal(o.raw, &s)
		if s.Spec.VM != vm.meta.Name {
			continue
		}
		mine = append(mine, o)
		if s.Status.Current {
			current = s.Meta.Name
		}
		if s.Meta.Name == name {
			one = o
		}
	}
	switch {
	case name == "" && r.Method == http.MethodGet:
		var docs []string
		for _, o := range mine {
			docs = append(docs, string(o.raw))
		}
		f.send(w, http.StatusOK, fmt.Appendf(nil, `{"kind":"snapshotList","items":[%s],"revision":%d}`, strings.Join(docs, ","), f.rev))
	case name == "":
		var in struct {
			Name, Description string
			Memory            bool
		}
		_ = json.NewDecoder(r.Body).Decode(&in)
		f.moveCurrent(vm.meta.Name, "")
		at := time.Now().UTC()
		s := api.Snapshot{Meta: api.Meta{Name: in.Name}, Spec: api.SnapshotSpec{VM: vm.meta.Name, Memory: in.Memory, Description: in.Description, Parent: current}}
		s.Status = api.SnapshotStatus{Phase: api.SnapshotReady, Current: true, TakenAt: &at, Consistency: api.ConsistencyCrash, Disks: []api.SnapshotDisk{{Volume: "v", Size: api.GiB}}}
		doc, _ := json.Marshal(s)
		o, err := f.put(api.KindSnapshot, doc, nil)
		if err != nil {
			f.fail(w, err)
			return
		}
		f.accept(w, api.ActionVMSnapshot, o)
	case one == nil:
		f.fail(w, api.Errorf(api.CodeNotFound, "vm %s has no snapshot %q", vm.meta.Name, name))
	case r.Method == http.MethodGet:
		f.send(w, http.StatusOK, one.raw)
	case r.Method == http.MethodDelete:
		f.accept(w, api.ActionVMForget, one)
		f.remove(api.KindSnapshot, one)
	case verb == "revert":
		var in struct{ Force, Start bool }
		_ = json.NewDecoder(r.Body).Decode(&in)
		if !in.Force {
			f.fail(w, api.Errorf(api.CodeRefused, "vm %s is running; stop it first, or force the revert (--force)", vm.meta.Name))
			return
		}
		f.moveCurrent(vm.meta.Name, name)
		f.accept(w, api.ActionVMRevert, one)
	}
}

// serveClone answers POST /vms/{name}/clone.
func (f *fakeCluster) serveClone(w http.ResponseWriter, r *http.Request, source *api.VM) {
	var in struct {
		Name, Snapshot string
		Start          bool
	}
	_ = json.NewDecoder(r.Body).Decode(&in)
	has := in.Snapshot == ""
	for _, o := range f.objects[api.KindSnapshot] {
		has = has || o.meta.Name == in.Snapshot
	}
	if !has {
		f.fail(w, api.Errorf(api.CodeNotFound, "vm %s has no snapshot %q", source.Meta.Name, in.Snapshot))
		return
	}
	vm := api.VM{Meta: api.Meta{Name: in.Name}, Spec: source.Spec, Status: api.VMStatus{Phase: api.VMStopped, Node: "m1"}}
	if in.Start {
		vm.Status.Phase = api.VMRunning
	}
	doc, _ := json.Marshal(vm)
	o, err := f.put(api.KindVM, doc, nil)
	if err != nil {
		f.fail(w, err)
		return
	}
	f.accept(w, api.ActionVMClone, o)
}

// moveCurrent marks the snapshot that a VM descends from.
func (f *fakeCluster) moveCurrent(vm, name string) {
	for _, o := range f.objects[api.KindSnapshot] {
		var s api.Snapshot
		_ = json.Unmarshal(o.raw, &s)
		if s.Spec.VM == vm {
			s.Status.Current = s.Meta.Name == name
			o.raw, _ = json.Marshal(s)
		}
	}
}

func TestSnapshotTree(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	var items []json.RawMessage
	for _, s := range []struct {
		name, parent string
		current      bool
	}{{"base", "", false}, {"app", "base", false}, {"test", "app", true}, {"other", "base", false}, {"lost", "deleted", false}} {
		o := api.Snapshot{Meta: api.Meta{Name: s.name}, Spec: api.SnapshotSpec{VM: "web1", Parent: s.parent}}
		o.Status = api.SnapshotStatus{Phase: api.SnapshotReady, Current: s.current, TakenAt: &at, Consistency: api.ConsistencyMemory, MemorySize: api.MiB}
		raw, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		items = append(items, raw)
	}
	tree, err := snapshotTree(items, at.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := tree.write(&b, false); err != nil {
		t.Fatal(err)
	}
	var names []string
	for line := range strings.Lines(b.String()) {
		name, _, _ := strings.Cut(strings.TrimRight(line, "\n"), "  ")
		if strings.HasPrefix(line, treeLine) || strings.HasPrefix(line, treeSpace) {
			name = strings.TrimRight(string([]rune(line)[:14]), " \n")
		}
		names = append(names, name)
	}
	want := "NAME\nbase\n├─ app\n│  └─ test\n│     └─ (now)\n└─ other\nlost"
	if got := strings.Join(names, "\n"); !strings.HasPrefix(got, want) {
		t.Errorf("%s\nwant\n%s\nof\n%s", got, want, b.String())
	}
	if len(tree.rows) != len(items)+1 {
		t.Errorf("%d rows for %d snapshots", len(tree.rows), len(items))
	}
}
