// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
)

// newerVM stores a VM as a newer version would: with fields that this one does
// not know, in metadata, spec and status.
func newerVM(t *testing.T, db configdb.DB) *api.VM {
	t.Helper()
	vm := newVM(t, "web1")
	create(t, db, vm)
	for key, more := range map[string][2]string{
		configdb.VMs.SpecKey(vm.Meta.ID):   {`"spec":{`, `"spec":{"newField":{"a":[1]},`},
		configdb.VMs.StatusKey(vm.Meta.ID): {`"status":{`, `"status":{"newReport":9007199254740993,`},
	} {
		e, _ := db.Local().Get(key)
		later := bytes.Replace(e.Value, []byte(more[0]), []byte(more[1]), 1)
		later = bytes.Replace(later, []byte(",}"), []byte("}"), 1)
		if !json.Valid(later) || bytes.Equal(later, e.Value) {
			t.Fatalf("%s", later)
		}
		if err := change(db, func(_ *configdb.View, tx *configdb.Txn) error { tx.Put(key, later); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	return get(t, db, vm.Meta.ID)
}

func keeps(t *testing.T, db configdb.DB, key, words string) {
	t.Helper()
	if e, _ := db.Local().Get(key); !bytes.Contains(e.Value, []byte(words)) {
		t.Errorf("%s lost %s: %s", key, words, e.Value)
	}
}

func TestAnOlderNodeDropsNoFieldOfANewerOne(t *testing.T) {
	db := storetest.New(t)
	vm := newerVM(t, db)
	spec, status := configdb.VMs.SpecKey(vm.Meta.ID), configdb.VMs.StatusKey(vm.Meta.ID)
	before := db.Local().Revision()
	for range 2 {
		if err := updateSpec(db, vm); err != nil {
			t.Fatal(err)
		}
		if err := updateStatus(db, vm); err != nil {
			t.Fatal(err)
		}
	}
	for _, key := range []string{spec, status} {
		if e, _ := db.Local().Get(key); e.Revision > before {
			t.Errorf("%s was written though nothing that is known of it changed", key)
		}
	}
	for cpus := 2; cpus < 4; cpus++ { // also what it wrote itself
		vm.Spec.CPUs, vm.Status.Node = cpus, "n2"
		if err := errors.Join(updateSpec(db, vm), updateStatus(db, vm)); err != nil {
			t.Fatal(err)
		}
		keeps(t, db, spec, `"newField":{"a":[1]}`)
		keeps(t, db, status, `"newReport":9007199254740993`)
		if now := get(t, db, vm.Meta.ID); now.Spec.CPUs != cpus || now.Status.Node != "n2" {
			t.Errorf("not written: %+v", now)
		}
	}
	if l := records(t, db, api.KindVM, vm.Meta.ID); !bytes.Contains(l[len(l)-1].Spec, []byte("newField")) {
		t.Errorf("the history lost the field: %s", l[len(l)-1].Spec)
	}
}

func TestAStatusOfANewerSchemaIsNotRewritten(t *testing.T) {
	db := storetest.New(t)
	vm := newVM(t, "web1")
	create(t, db, vm)
	key := configdb.VMs.StatusKey(vm.Meta.ID)
	e, _ := db.Local().Get(key)
	later := bytes.Replace(e.Value, []byte(`"schema":1`), []byte(`"schema":2`), 1)
	if err := change(db, func(_ *configdb.View, tx *configdb.Txn) error { tx.Put(key, later); return nil }); err != nil {
		t.Fatal(err)
	}
	vm = get(t, db, vm.Meta.ID)
	vm.Status.Node = "n2"
	if err := updateStatus(db, vm); !errors.Is(err, api.ErrNewerSchema) {
		t.Errorf("%v", err)
	}
}

// At level 1 nothing is written that a node of level 1 does not know; from level
// 2 on there is a history, and entries name the level.
func TestTheLevelDecidesWhatIsWritten(t *testing.T) {
	c := storetest.NewCluster(t, 1)
	db := c.Leader()
	o := api.Cluster{Meta: api.NewMeta(api.KindCluster, "", "prod"), Spec: api.ClusterSpec{Life: 1, FeatureLevel: 1}}
	create := func(f func(tx *configdb.Txn) error) {
		t.Helper()
		if err := change(db, func(_ *configdb.View, tx *configdb.Txn) error { return f(tx) }); err != nil {
			t.Fatal(err)
		}
	}
	create(func(tx *configdb.Txn) error { tx.Put("before", nil); return nil })
	create(func(tx *configdb.Txn) error { return configdb.Clusters.Create(tx, &o) })
	if n := len(records(t, db, api.KindCluster, o.Meta.ID)); n != 0 {
		t.Errorf("%d records of the founding, at level 1", n)
	}
	level := func(n int) {
		t.Helper()
		if got := db.Local().LogLevel(); got != n {
			t.Errorf("the log says level %d, want %d", got, n)
		}
	}
	level(1)
	one := newVM(t, "one")
	create(func(tx *configdb.Txn) error { return configdb.VMs.Create(tx, one) })
	if n := len(records(t, db, api.KindVM, one.Meta.ID)); n != 0 {
		t.Errorf("%d records at level 1", n)
	}
	o.Spec.FeatureLevel = 2
	if err := change(db, func(v *configdb.View, tx *configdb.Txn) error { return configdb.Clusters.UpdateSpec(v, tx, &o) }); err != nil {
		t.Fatal(err)
	}
	level(1) // whoever is there may apply the raise itself
	if n := len(records(t, db, api.KindCluster, o.Meta.ID)); n != 0 {
		t.Errorf("the raise is recorded, at level 1: %d", n)
	}
	two := newVM(t, "two")
	create(func(tx *configdb.Txn) error { return configdb.VMs.Create(tx, two) })
	level(2)
	if n := len(records(t, db, api.KindVM, two.Meta.ID)); n != 1 {
		t.Errorf("%d records at level 2", n)
	}
}
