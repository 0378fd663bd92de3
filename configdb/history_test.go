// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/configdb/storetest"
)

type record struct {
	configdb.HistoryRecord
	revision uint64
}

// records returns the history of an object in the order of its keys.
func records(t *testing.T, db configdb.DB, kind api.Kind, id string) (out []record) {
	t.Helper()
	for e := range db.Local().Scan(configdb.HistoryPrefix(kind, id), "") {
		r, err := configdb.DecodeHistory(e.Value)
		if err != nil {
			t.Fatalf("%s: %v", e.Key, err)
		}
		out = append(out, record{r, e.Revision})
	}
	return out
}

func TestEveryChangeOfASpecIsRecordedInItsTransaction(t *testing.T) {
	db := storetest.New(t)
	vm := newVM(t, "web1")
	vm.Meta.Project = "shop"
	ctx := configdb.WithSource(context.Background(), "ssh 10.0.0.5")
	transact := func(actor string, f func(v *configdb.View, tx *configdb.Txn) error) uint64 {
		t.Helper()
		rev, err := configdb.Transact(ctx, db, actor, 1, f)
		if err != nil {
			t.Fatal(err)
		}
		return rev
	}
	before := time.Now().Truncate(time.Millisecond)
	created := transact("ann", func(_ *configdb.View, tx *configdb.Txn) error { return configdb.VMs.Create(tx, vm) })
	vm.Spec.CPUs = 4
	updated := transact("bob", func(v *configdb.View, tx *configdb.Txn) error {
		tx.Note = "because"
		return configdb.VMs.UpdateSpec(v, tx, vm)
	})
	spec, _ := db.Local().Get(configdb.VMs.SpecKey(vm.Meta.ID))
	transact("bob", func(v *configdb.View, tx *configdb.Txn) error { return configdb.VMs.UpdateSpec(v, tx, vm) }) // nothing to write
	transact("node", func(v *configdb.View, tx *configdb.Txn) error {
		vm.Status.Phase = api.VMRunning
		return configdb.VMs.UpdateStatus(v, tx, vm)
	})
	if err := updateSpec(db, &api.VM{Meta: api.Meta{ID: vm.Meta.ID, Name: "web1", Project: "shop", Revision: 1}}); !errors.Is(err, configdb.ErrConflict) {
		t.Errorf("an update of an old revision: %v", err)
	}
	deleted := transact("eve", func(_ *configdb.View, tx *configdb.Txn) error { configdb.VMs.Delete(tx, vm); return nil })

	got := records(t, db, api.KindVM, vm.Meta.ID)
	want := []struct {
		op          configdb.HistoryOp
		actor, note string
		revision    uint64
	}{
		{configdb.HistoryCreate, "ann", "", created}, {configdb.HistoryUpdate, "bob", "because", updated}, {configdb.HistoryDelete, "eve", "", deleted},
	}
	if len(got) != len(want) {
		t.Fatalf("%d records, want %d: %+v", len(got), len(want), got)
	}
	for i, w := range want {
		g := got[i]
		if g.Op != w.op || g.Actor != w.actor || g.Note != w.note || g.revision != w.revision || g.Source != "ssh 10.0.0.5" || g.Project != "shop" || g.Name != "web1" {
			t.Errorf("record %d: %+v at %d, want %+v", i, g.HistoryRecord, g.revision, w)
		}
		if g.Time.Before(before) || g.Time.After(time.Now()) || g.Exists() != (i < 2) {
			t.Errorf("record %d: time %s, exists %v", i, g.Time, g.Exists())
		}
	}
	if !bytes.Equal(got[1].Spec, spec.Value) || got[2].Spec != nil {
		t.Errorf("the record has\n%s\nthe object\n%s", got[1].Spec, spec.Value)
	}
	// It may come back under its ID, and the history goes on.
	back := transact("ann", func(_ *configdb.View, tx *configdb.Txn) error { return configdb.VMs.Recreate(tx, vm, deleted) })
	if got := records(t, db, api.KindVM, vm.Meta.ID); len(got) != 4 || got[3].Op != configdb.HistoryCreate || got[3].revision != back {
		t.Errorf("after it was created again: %+v", got)
	}
}

func TestOnlyTheLastChangeOfAnObjectInATransactionIsRecorded(t *testing.T) {
	db := storetest.New(t)
	vm := newVM(t, "web1")
	create(t, db, vm)
	err := change(db, func(v *configdb.View, tx *configdb.Txn) error {
		for _, cpus := range []int{2, 3} {
			vm.Spec.CPUs = cpus
			if err := configdb.VMs.UpdateSpec(v, tx, vm); err != nil {
				return err
			}
		}
		if tx.Len() != 2 {
			t.Errorf("%d changes, want the spec and its record", tx.Len())
		}
		return nil
	})
	got := records(t, db, api.KindVM, vm.Meta.ID)
	if err != nil || len(got) != 2 || !strings.Contains(string(got[1].Spec), `"cpus":3`) {
		t.Errorf("%v, records %+v", err, got)
	}
}

func TestWhatIsNotRecorded(t *testing.T) {
	db := storetest.New(t)
	meta := func(k api.Kind) api.Meta { m := api.NewMeta(k, "", "x"); return m }
	err := change(db, func(_ *configdb.View, tx *configdb.Txn) error {
		return errors.Join(
			configdb.Tokens.Create(tx, &api.Token{Meta: meta(api.KindToken), Spec: api.TokenSpec{Hash: "secret"}}),
			configdb.Tasks.CreateUnnamed(tx, &api.Task{Meta: meta(api.KindTask)}),
			configdb.Events.CreateUnnamed(tx, &api.Event{Meta: meta(api.KindEvent)}),
			configdb.Bindings.CreateUnnamed(tx, &api.Binding{Meta: meta(api.KindBinding)}),
			configdb.PoolStates.CreateUnnamed(tx, &api.PoolState{Meta: meta(api.KindPoolState)}),
			configdb.SwitchStates.CreateUnnamed(tx, &api.SwitchState{Meta: meta(api.KindSwitchState)}),
			configdb.Alerts.CreateUnnamed(tx, &api.Alert{Meta: meta(api.KindAlert)}),
		)
	})
	if err != nil || !db.Local().Empty(configdb.HistoryRoot) {
		t.Errorf("%v; something was recorded", err)
	}
	for _, k := range configdb.HistoryKinds() {
		if !configdb.HasHistory(k) {
			t.Errorf("kind %s is listed and has no history", k)
		}
	}
}

// The key of an authority that was replaced must not live on in the history.
func TestSealedKeysOfAuthoritiesAreNotRecorded(t *testing.T) {
	db := storetest.New(t)
	c := api.Cluster{Meta: api.NewMeta(api.KindCluster, "", "prod"), Spec: api.ClusterSpec{CACert: "PEM", SealedCAKey: []byte("0123456789sealed"), Life: 1<<63 + 1, FeatureLevel: 2}}
	err := change(db, func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Clusters.Create(tx, &c) })
	got := records(t, db, api.KindCluster, c.Meta.ID)
	if err != nil || len(got) != 1 || strings.Contains(strings.ToLower(string(got[0].Spec)), "sealed") {
		t.Fatalf("%v, %+v", err, got)
	}
	var back api.Cluster
	if _, err := back.Decode(got[0].Spec, nil); err != nil || back.Spec.CACert != "PEM" || back.Spec.Life != c.Spec.Life || back.Meta.ID != c.Meta.ID {
		t.Errorf("the rest came back as %+v, %v", back, err)
	}
}

func TestUnrecordedChangesAreNotedOnce(t *testing.T) {
	db := storetest.New(t)
	vm := newVM(t, "web1")
	create(t, db, vm)
	// As a node of an older version writes.
	vm.Spec.CPUs = 9
	b, err := vm.EncodeSpec()
	if err != nil {
		t.Fatal(err)
	}
	put := func(f func(tx *configdb.Txn)) error {
		return change(db, func(_ *configdb.View, tx *configdb.Txn) error { f(tx); return nil })
	}
	key := configdb.VMs.SpecKey(vm.Meta.ID)
	if err := put(func(tx *configdb.Txn) { tx.Put(key, b) }); err != nil {
		t.Fatal(err)
	}
	e, _ := db.Local().Get(key)
	note := func(tx *configdb.Txn) {
		tx.Unrecorded(api.KindVM, vm.Meta.ID, 1, &e, configdb.HistoryRecord{Name: "web1", Time: time.Now()})
	}
	if err := put(note); err != nil {
		t.Fatal(err)
	}
	if err := put(note); !errors.Is(err, configdb.ErrConflict) {
		t.Errorf("noted twice: %v", err)
	}
	got := records(t, db, api.KindVM, vm.Meta.ID)
	if len(got) != 2 || got[1].Op != configdb.HistoryFound || got[1].Since != e.Revision || got[1].revision <= e.Revision || !bytes.Equal(got[1].Spec, b) {
		t.Fatalf("%+v", got)
	}
	// The next change comes after it.
	vm = get(t, db, vm.Meta.ID)
	vm.Spec.CPUs = 10
	if err := updateSpec(db, vm); err != nil {
		t.Fatal(err)
	}
	if got := records(t, db, api.KindVM, vm.Meta.ID); len(got) != 3 || got[2].Op != configdb.HistoryUpdate {
		t.Errorf("%+v", got)
	}
	// Gone without a word, and the object must really be gone.
	gone := func(tx *configdb.Txn) {
		tx.Unrecorded(api.KindVM, vm.Meta.ID, vm.Meta.Revision, nil, configdb.HistoryRecord{Name: "web1", Time: time.Now()})
	}
	if err := put(gone); !errors.Is(err, configdb.ErrConflict) {
		t.Errorf("an object that is there was noted as gone: %v", err)
	}
	if err := put(func(tx *configdb.Txn) { tx.Delete(key) }); err != nil {
		t.Fatal(err)
	}
	if err := put(gone); err != nil {
		t.Fatal(err)
	}
	if got := records(t, db, api.KindVM, vm.Meta.ID); len(got) != 4 || got[3].Op != configdb.HistoryGone || got[3].Exists() {
		t.Errorf("%+v", got)
	}
}

func TestHistoryKeys(t *testing.T) {
	id := api.NewID()
	a, b := configdb.HistoryKey(api.KindVM, id, 9), configdb.HistoryKey(api.KindVM, id, 1<<40)
	if a >= b || !strings.HasPrefix(a, configdb.HistoryPrefix(api.KindVM, id)) {
		t.Errorf("%s is not before %s", a, b)
	}
	if kind, got, ok := configdb.SplitHistoryKey(a); !ok || kind != api.KindVM || got != id {
		t.Errorf("%s, %s, %v", kind, got, ok)
	}
	for _, key := range []string{"", "muster/history/", "muster/history/vm/x", "muster/history/vm/x/", "muster/history/vm/x/12", "muster/history/vm/x/y/0000000000000001",
		"muster/history/vm/x/000000000000000g", "muster/spec/vm/x/0000000000000001", configdb.HistoryHorizonKey} {
		if _, _, ok := configdb.SplitHistoryKey(key); ok {
			t.Errorf("%q passes for a record", key)
		}
	}
}

func TestHistoryRecordsComeBackAsTheyWere(t *testing.T) {
	at := time.UnixMilli(1790000000123).UTC()
	for _, r := range []configdb.HistoryRecord{
		{Op: configdb.HistoryCreate, Time: at, Actor: "ann", Source: "api 10.0.0.5", Node: "n1", Note: "n", Project: "p", Name: "web1", Spec: []byte(`{"schema":1}`)},
		{Op: configdb.HistoryFound, Time: at, Since: 1 << 60, Spec: []byte(strings.Repeat(`{"schema":1,"meta":{"name":"web1"}}`, 9))},
		{Op: configdb.HistoryUpdate, Time: time.UnixMilli(-5).UTC(), Spec: []byte{}},
		{Op: configdb.HistoryDelete, Time: at},
	} {
		b := r.Encode()
		got, err := configdb.DecodeHistory(b)
		if err != nil || !reflect.DeepEqual(normal(got), normal(r)) {
			t.Errorf("%+v came back as %+v, %v", r, got, err)
		}
		op, from := configdb.HistoryEffect(configdb.Entry{Value: b, Revision: 1 << 62})
		if want := max(r.Since, 0); op != r.Op || from != 1<<62 && from != want {
			t.Errorf("%+v: effect %v from %d", r, op, from)
		}
		if !configdb.HistoryTime(b).Equal(r.Time) {
			t.Errorf("time %s, want %s", configdb.HistoryTime(b), r.Time)
		}
		for cut := range b {
			if _, err := configdb.DecodeHistory(b[:cut]); err == nil && cut < len(b)-len(r.Spec) {
				t.Errorf("%+v cut to %d bytes was read", r, cut)
			}
		}
	}
	long := configdb.HistoryRecord{Op: configdb.HistoryDelete, Actor: strings.Repeat("ü", 5000), Time: at}
	if got, err := configdb.DecodeHistory(long.Encode()); err != nil || len(got.Actor) > 1024 || !strings.HasPrefix(long.Actor, got.Actor) {
		t.Errorf("an actor of %d bytes: %d bytes, %v", len(long.Actor), len(got.Actor), err)
	}
}

func normal(r configdb.HistoryRecord) configdb.HistoryRecord {
	if len(r.Spec) == 0 && r.Spec != nil {
		r.Spec = []byte{}
	}
	return r
}

func FuzzDecodeHistory(f *testing.F) {
	r := configdb.HistoryRecord{Op: configdb.HistoryUpdate, Time: time.UnixMilli(1), Actor: "a", Spec: []byte(strings.Repeat(`{"spec":{}}`, 20))}
	f.Add(r.Encode())
	f.Add([]byte{1, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{2, 1})
	f.Add([]byte{1, 9, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		configdb.HistoryTime(b)
		configdb.HistoryEffect(configdb.Entry{Value: b, Revision: 7})
		r, err := configdb.DecodeHistory(b)
		if err != nil {
			return
		}
		if len(r.Spec) > fsm.MaxValueBytes {
			t.Errorf("a spec of %d bytes", len(r.Spec))
		}
		again, err := configdb.DecodeHistory(r.Encode())
		if err != nil || !reflect.DeepEqual(normal(again), normal(r)) {
			t.Errorf("%+v came back as %+v, %v", r, again, err)
		}
	})
}

// On three nodes each record names the node that proposed the change.
func TestRecordsNameTheirNode(t *testing.T) {
	c := storetest.NewCluster(t, 3)
	ids := map[string]string{}
	for _, n := range c.Nodes {
		vm := newVM(t, fmt.Sprintf("web%d", n.Index))
		create(t, n, vm)
		ids[n.Name()] = vm.Meta.ID
	}
	for name, id := range ids {
		c.Eventually("the record is on every node", func() error {
			for _, n := range c.Nodes {
				got := records(t, n, api.KindVM, id)
				if len(got) != 1 || got[0].Node != name {
					return fmt.Errorf("node %d has %+v, want one by %s", n.Index, got, name)
				}
			}
			return nil
		})
	}
}
