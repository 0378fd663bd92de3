// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
)

func newVM(t *testing.T, name string) *api.VM {
	t.Helper()
	vm := &api.VM{Meta: api.NewMeta(api.KindVM, "", name)}
	if err := vm.Prepare(); err != nil {
		t.Fatal(err)
	}
	return vm
}

// change commits what f puts into a transaction.
func change(db configdb.DB, f func(v *configdb.View, tx *configdb.Txn) error) error {
	tx := &configdb.Txn{}
	if err := f(db.Local(), tx); err != nil {
		return err
	}
	_, err := db.Txn(context.Background(), tx)
	return err
}

func create(t *testing.T, db configdb.DB, vm *api.VM) {
	t.Helper()
	if err := change(db, func(_ *configdb.View, tx *configdb.Txn) error { return configdb.VMs.Create(tx, vm) }); err != nil {
		t.Fatal(err)
	}
}

func updateSpec(db configdb.DB, vm *api.VM) error {
	return change(db, func(v *configdb.View, tx *configdb.Txn) error { return configdb.VMs.UpdateSpec(v, tx, vm) })
}

func updateStatus(db configdb.DB, vm *api.VM) error {
	return change(db, func(v *configdb.View, tx *configdb.Txn) error { return configdb.VMs.UpdateStatus(v, tx, vm) })
}

func get(t *testing.T, db configdb.DB, id string) *api.VM {
	t.Helper()
	vm, err := configdb.VMs.Get(db.Local(), id)
	if err != nil {
		t.Fatal(err)
	}
	return &vm
}

func wantCode(t *testing.T, err error, code api.Code) {
	t.Helper()
	if err == nil || api.CodeOf(err) != code {
		t.Errorf("%v, want code %s", err, code)
	}
}

func TestTableCreateAndFind(t *testing.T) {
	db := storetest.New(t)
	vm := newVM(t, "web1")
	vm.Meta.Kind = "wrong"
	create(t, db, vm)
	if vm.Meta.Revision != 1 || vm.Meta.StatusRevision != 1 {
		t.Errorf("revisions after creation: %+v", vm.Meta)
	}
	v := db.Local()
	for what, find := range map[string]func() (api.VM, error){
		"by ID":           func() (api.VM, error) { return configdb.VMs.Get(v, vm.Meta.ID) },
		"by name":         func() (api.VM, error) { return configdb.VMs.Find(v, "", "web1") },
		"by name, in its": func() (api.VM, error) { return configdb.VMs.Find(v, "default", "web1") },
		"by ID anywhere":  func() (api.VM, error) { return configdb.VMs.Find(v, "other", vm.Meta.ID) },
	} {
		got, err := find()
		if err != nil || got.Meta.ID != vm.Meta.ID || got.Meta.Kind != api.KindVM || got.Meta.Revision != 1 || got.Meta.Generation != 1 {
			t.Errorf("%s: %+v, %v", what, got.Meta, err)
		}
	}
	for _, name := range []string{"", "web", "web1/", "../default/web1", "web2", api.NewID(), strings.Repeat("x", 1<<16)} {
		_, err := configdb.VMs.Find(v, "", name)
		wantCode(t, err, api.CodeNotFound)
	}
	_, err := configdb.VMs.Find(v, "other", "web1")
	wantCode(t, err, api.CodeNotFound)
	_, err = configdb.Volumes.Find(v, "", "web1")
	wantCode(t, err, api.CodeNotFound)
}

func TestNamesAreUniquePerProjectAndKind(t *testing.T) {
	db := storetest.New(t)
	create(t, db, newVM(t, "web1"))
	again := newVM(t, "web1")
	err := change(db, func(_ *configdb.View, tx *configdb.Txn) error { return configdb.VMs.Create(tx, again) })
	if !errors.Is(err, configdb.ErrConflict) {
		t.Errorf("a second web1: %v", err)
	}
	if again.Meta.Revision != 0 || db.Local().Len() != 4 {
		t.Errorf("the refused creation left %d keys, revision %d", db.Local().Len(), again.Meta.Revision)
	}
	other := newVM(t, "web1")
	other.Meta.Project = "other"
	create(t, db, other)
	vol := &api.Volume{Meta: api.NewMeta(api.KindVolume, "", "web1")}
	if err := change(db, func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Volumes.Create(tx, vol) }); err != nil {
		t.Errorf("the name in another kind: %v", err)
	}
	same := newVM(t, "web9")
	same.Meta.ID = other.Meta.ID
	err = change(db, func(_ *configdb.View, tx *configdb.Txn) error { return configdb.VMs.Create(tx, same) })
	if !errors.Is(err, configdb.ErrConflict) {
		t.Errorf("an ID twice: %v", err)
	}
}

// Nobody hides an object behind a name that looks like its ID.
func TestAnIDIsFoundBeforeAName(t *testing.T) {
	db := storetest.New(t)
	victim := newVM(t, "web1")
	create(t, db, victim)
	create(t, db, newVM(t, victim.Meta.ID))
	got, err := configdb.VMs.Find(db.Local(), "", victim.Meta.ID)
	if err != nil || got.Meta.Name != "web1" {
		t.Errorf("the ID of web1 finds %q, %v", got.Meta.Name, err)
	}
}

func TestGenerationCountsChangesOfTheSpecOnly(t *testing.T) {
	db := storetest.New(t)
	vm := newVM(t, "web1")
	create(t, db, vm)
	rev := db.Local().Revision()
	step := func(what string, generation uint64, written bool, f func(*api.VM)) {
		t.Helper()
		vm := get(t, db, vm.Meta.ID)
		f(vm)
		before, records := db.Local().Len(), 0
		if written {
			records = 1 // in the history
		}
		tx := &configdb.Txn{}
		if err := configdb.VMs.UpdateSpec(db.Local(), tx, vm); err != nil {
			t.Fatal(err)
		}
		if tx.Empty() == written {
			t.Errorf("%s: writes %v", what, !tx.Empty())
		}
		if _, err := db.Txn(context.Background(), tx); err != nil {
			t.Fatal(err)
		}
		got := get(t, db, vm.Meta.ID)
		if got.Meta.Generation != generation || vm.Meta.Generation != generation || db.Local().Len() != before+records {
			t.Errorf("%s: generation %d stored, %d in hand, want %d", what, got.Meta.Generation, vm.Meta.Generation, generation)
		}
		if written && (got.Meta.Revision != db.Local().Revision() || got.Meta.Revision != vm.Meta.Revision) {
			t.Errorf("%s: revision %d stored, %d in hand", what, got.Meta.Revision, vm.Meta.Revision)
		}
		if got.Meta.StatusRevision != rev {
			t.Errorf("%s: the status was touched", what)
		}
	}
	step("nothing", 1, false, func(*api.VM) {})
	step("a label", 1, true, func(vm *api.VM) { vm.Meta.Labels = map[string]string{"a": "b"} })
	step("the spec", 2, true, func(vm *api.VM) { vm.Spec.CPUs = 4 })
	step("both", 3, true, func(vm *api.VM) { vm.Spec.CPUs, vm.Meta.Labels = 5, nil })
	step("a forged generation", 3, false, func(vm *api.VM) { vm.Meta.Generation = 99 })
	step("a forged revision", 3, false, func(vm *api.VM) { vm.Meta.Revision, vm.Meta.StatusRevision = 7, 8 })
	step("a forged kind", 3, false, func(vm *api.VM) { vm.Meta.Kind = api.KindPool })
	step("the status", 3, false, func(vm *api.VM) { vm.Status.Message = "not spec" })
}

func TestUpdateSpecRefusals(t *testing.T) {
	db := storetest.New(t)
	vm := newVM(t, "web1")
	create(t, db, vm)
	stale := get(t, db, vm.Meta.ID)
	vm.Spec.CPUs = 2
	if err := updateSpec(db, vm); err != nil {
		t.Fatal(err)
	}
	stale.Spec.CPUs = 3
	if err := updateSpec(db, stale); !errors.Is(err, configdb.ErrConflict) {
		t.Errorf("on a stale object: %v", err)
	}
	wantCode(t, updateSpec(db, newVM(t, "none")), api.CodeNotFound)
	for what, f := range map[string]func(*api.VM){
		"name": func(vm *api.VM) { vm.Meta.Name = "web2" }, "project": func(vm *api.VM) { vm.Meta.Project = "p" },
	} {
		renamed := get(t, db, vm.Meta.ID)
		f(renamed)
		err := updateSpec(db, renamed)
		if api.CodeOf(err) != api.CodeInvalid {
			t.Errorf("a changed %s: %v", what, err)
		}
	}
	if got := get(t, db, vm.Meta.ID); got.Meta.Name != "web1" || got.Spec.CPUs != 2 {
		t.Errorf("a refused update wrote %+v", got)
	}
}

func TestNewerSchemaIsReadButNotRewritten(t *testing.T) {
	db := storetest.New(t)
	vm := newVM(t, "web1")
	create(t, db, vm)
	e, _ := db.Local().Get(configdb.VMs.SpecKey(vm.Meta.ID))
	later := bytes.Replace(e.Value, []byte(`"schema":1`), []byte(`"schema":2`), 1)
	later = bytes.Replace(later, []byte(`"cpus":1`), []byte(`"cpus":1,"invented":true`), 1)
	if !json.Valid(later) || bytes.Equal(later, e.Value) {
		t.Fatalf("%s", later)
	}
	set(t, db, configdb.VMs.SpecKey(vm.Meta.ID), string(later))
	got := get(t, db, vm.Meta.ID)
	got.Spec.CPUs = 9
	if err := updateSpec(db, got); !errors.Is(err, api.ErrNewerSchema) {
		t.Errorf("rewriting: %v", err)
	}
	if e, _ := db.Local().Get(configdb.VMs.SpecKey(vm.Meta.ID)); !bytes.Equal(e.Value, later) {
		t.Errorf("rewritten to %s", e.Value)
	}
	got.Status.Message = "status may be written"
	if err := updateStatus(db, got); err != nil {
		t.Error(err)
	}
}

func TestUpdateStatus(t *testing.T) {
	db := storetest.New(t)
	vm := newVM(t, "web1")
	create(t, db, vm)
	stale := get(t, db, vm.Meta.ID)
	vm.Status.Message = "one"
	if err := updateStatus(db, vm); err != nil {
		t.Fatal(err)
	}
	if vm.Meta.StatusRevision != db.Local().Revision() || get(t, db, vm.Meta.ID).Status.Message != "one" {
		t.Errorf("status revision %d", vm.Meta.StatusRevision)
	}
	stale.Status.Message = "two"
	if err := updateStatus(db, stale); !errors.Is(err, configdb.ErrConflict) {
		t.Errorf("on a stale status: %v", err)
	}
	stale.Status.Message = "one" // equal to what is there
	tx := &configdb.Txn{}
	if err := configdb.VMs.UpdateStatus(db.Local(), tx, stale); err != nil || !tx.Empty() {
		t.Errorf("an equal status writes %v, %v", !tx.Empty(), err)
	}
	// A change of the spec meanwhile does not stand in the way.
	wish := get(t, db, vm.Meta.ID)
	wish.Spec.CPUs = 7
	if err := updateSpec(db, wish); err != nil {
		t.Fatal(err)
	}
	vm.Status.Message = "three"
	if err := updateStatus(db, vm); err != nil {
		t.Errorf("after a change of the spec: %v", err)
	}
	if got := get(t, db, vm.Meta.ID); got.Spec.CPUs != 7 || got.Meta.Revision != wish.Meta.Revision {
		t.Errorf("a status wrote the spec: %+v", got)
	}
	gone := newVM(t, "none")
	if err := updateStatus(db, gone); !errors.Is(err, configdb.ErrConflict) {
		t.Errorf("status of nothing: %v", err)
	}
}

func TestDeletionNeedsTheLastReferrerGone(t *testing.T) {
	db := storetest.New(t)
	vol := &api.Volume{Meta: api.NewMeta(api.KindVolume, "", "v")}
	vm := newVM(t, "web1")
	create(t, db, vm)
	if err := change(db, func(_ *configdb.View, tx *configdb.Txn) error {
		configdb.Volumes.Refer(tx, vol.Meta.ID, api.KindVM, vm.Meta.ID)
		return nil
	}); !errors.Is(err, configdb.ErrConflict) {
		t.Errorf("a reference to nothing: %v", err)
	}
	if err := change(db, func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Volumes.Create(tx, vol) }); err != nil {
		t.Fatal(err)
	}
	refer := func(tx *configdb.Txn) { configdb.Volumes.Refer(tx, vol.Meta.ID, api.KindVM, vm.Meta.ID) }
	if err := change(db, func(_ *configdb.View, tx *configdb.Txn) error { refer(tx); return nil }); err != nil {
		t.Fatal(err)
	}
	if got := configdb.Volumes.Referrers(db.Local(), vol.Meta.ID); fmt.Sprint(got) != "[vm/"+vm.Meta.ID+"]" {
		t.Errorf("referrers %v", got)
	}
	remove := func(_ *configdb.View, tx *configdb.Txn) error { configdb.Volumes.Delete(tx, vol); return nil }
	if err := change(db, remove); !errors.Is(err, configdb.ErrConflict) {
		t.Errorf("a volume in use was deleted: %v", err)
	}
	if err := change(db, func(_ *configdb.View, tx *configdb.Txn) error {
		configdb.Volumes.Release(tx, vol.Meta.ID, api.KindVM, vm.Meta.ID)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := change(db, remove); err != nil {
		t.Fatal(err)
	}
	configdb.VMs.Delete(&configdb.Txn{}, vm)
	for e := range db.Local().Scan("", "") {
		if strings.HasPrefix(e.Key, configdb.HistoryRoot) {
			continue
		}
		if strings.Contains(e.Key, vol.Meta.ID) || strings.Contains(e.Key, "/volume/") {
			t.Errorf("deletion left %s", e.Key)
		}
	}
	// The name is free again.
	again := &api.Volume{Meta: api.NewMeta(api.KindVolume, "", "v")}
	if err := change(db, func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Volumes.Create(tx, again) }); err != nil {
		t.Errorf("the name of a deleted object: %v", err)
	}
}

func TestStaleDeletionConflicts(t *testing.T) {
	db := storetest.New(t)
	vm := newVM(t, "web1")
	create(t, db, vm)
	stale := get(t, db, vm.Meta.ID)
	vm.Spec.CPUs = 2
	if err := updateSpec(db, vm); err != nil {
		t.Fatal(err)
	}
	err := change(db, func(_ *configdb.View, tx *configdb.Txn) error { configdb.VMs.Delete(tx, stale); return nil })
	if !errors.Is(err, configdb.ErrConflict) {
		t.Errorf("%v", err)
	}
}

func TestUnnamedObjects(t *testing.T) {
	db := storetest.New(t)
	k := api.NewTask(api.ActionVMStart, api.KindVM, newVM(t, "web1").Meta, "me", time.Minute, time.Now())
	if err := change(db, func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Tasks.CreateUnnamed(tx, &k) }); err != nil {
		t.Fatal(err)
	}
	if db.Local().Len() != 2 {
		t.Errorf("%d keys, want spec and status", db.Local().Len())
	}
	if got, err := configdb.Tasks.Find(db.Local(), "", k.Meta.ID); err != nil || got.Status.Phase != api.TaskPending {
		t.Errorf("%+v, %v", got, err)
	}
	if err := change(db, func(_ *configdb.View, tx *configdb.Txn) error { configdb.Tasks.DeleteUnnamed(tx, &k); return nil }); err != nil {
		t.Fatal(err)
	}
	if db.Local().Len() != 0 {
		t.Errorf("%d keys are left", db.Local().Len())
	}
}

func TestOneBrokenValueHidesNoOther(t *testing.T) {
	db := storetest.New(t)
	a, b := newVM(t, "a"), newVM(t, "b")
	create(t, db, a)
	create(t, db, b)
	set(t, db, configdb.VMs.SpecKey("0-broken"), "{")
	list, err := configdb.VMs.List(db.Local())
	if len(list) != 2 || err == nil || !strings.Contains(err.Error(), "0-broken") {
		t.Errorf("%d objects, %v", len(list), err)
	}
	for _, o := range list {
		if o.Meta.Revision == 0 || o.Meta.StatusRevision == 0 {
			t.Errorf("listed without revisions: %+v", o.Meta)
		}
	}
}

func TestKeysTellTheirID(t *testing.T) {
	for key, want := range map[string]string{
		configdb.VMs.SpecKey("x"): "x", configdb.VMs.StatusKey("y"): "y", configdb.Volumes.SpecKey("x"): "", "other": "", configdb.VMs.NameKey("p", "n"): "",
	} {
		if id, ok := configdb.VMs.IDOf(key); ok != (want != "") || (ok && id != want) {
			t.Errorf("%s: %q, %v", key, id, ok)
		}
	}
}

func TestTransact(t *testing.T) {
	db := storetest.New(t)
	set(t, db, "k", "0")
	calls := 0
	rev, err := configdb.Transact(context.Background(), db, "me", 3, func(v *configdb.View, tx *configdb.Txn) error {
		calls++
		e, _ := v.Get("k")
		if calls == 1 {
			set(t, db, "k", "meanwhile")
		}
		tx.RequireRevision("k", e.Revision)
		tx.Put("k", []byte("mine"))
		return nil
	})
	if err != nil || calls != 2 || rev != db.Local().Revision() {
		t.Errorf("%d calls, revision %d, %v", calls, rev, err)
	}
	calls = 0
	_, err = configdb.Transact(context.Background(), db, "me", 3, func(_ *configdb.View, tx *configdb.Txn) error {
		calls++
		tx.RequireRevision("k", 1<<40)
		tx.Put("k", nil)
		return nil
	})
	if !errors.Is(err, configdb.ErrConflict) || calls != 3 {
		t.Errorf("conflicts for ever: %d calls, %v", calls, err)
	}
	before := db.Local().Revision()
	if rev, err := configdb.Transact(context.Background(), db, "me", 0, func(*configdb.View, *configdb.Txn) error { return nil }); err != nil || rev != before || db.Local().Revision() != before {
		t.Errorf("nothing to do: %d, %v", rev, err)
	}
	broken := errors.New("no")
	if _, err := configdb.Transact(context.Background(), db, "me", 5, func(*configdb.View, *configdb.Txn) error { return broken }); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
}
