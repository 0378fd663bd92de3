// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
)

// oneTarget is placement that knows node m2 only, and refuses some VMs.
type oneTarget struct {
	restPlacer
	refuse map[string]bool
}

func (p oneTarget) ChooseOther(_ *configdb.View, vm api.VM, _ map[string]string, _ string, _ []string) (string, string, error) {
	if p.refuse[vm.Meta.Name] && vm.Spec.Power != api.PowerStopped {
		return "", "", api.Errorf(api.CodeUnplaceable, "no node has its device")
	}
	return "n2", "m2", nil
}

func (p oneTarget) Reserve(*configdb.View, *configdb.Txn, string) {}

type evacKit struct {
	*testing.T
	db *storetest.Mem
	e  *evacuation
}

func (k *evacKit) do(f func(v *configdb.View, tx *configdb.Txn) error) {
	k.Helper()
	if _, err := configdb.Transact(k.Context(), k.db, "test", 10, f); err != nil {
		k.Fatal(err)
	}
}

// remove takes a node out of the cluster.
func (k *evacKit) remove(id string) {
	k.Helper()
	k.do(func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Get(v, id)
		if err != nil {
			return err
		}
		configdb.Nodes.Delete(tx, &n)
		return nil
	})
}

func newEvacKit(t *testing.T, refuse ...string) *evacKit {
	k := &evacKit{T: t, db: storetest.New(t)}
	p := oneTarget{refuse: map[string]bool{}}
	for _, r := range refuse {
		p.refuse[r] = true
	}
	k.e = newEvacuation(k.db, p, 1, slog.New(slog.NewTextHandler(t.Output(), nil)))
	for _, id := range []string{"n1", "n2"} {
		n := api.Node{Meta: api.NewMeta(api.KindNode, "", "m"+id[1:]), Status: api.NodeStatus{Phase: api.NodeReady}}
		n.Meta.ID, n.Spec.Maintenance = id, id == "n1"
		k.do(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Nodes.Create(tx, &n) })
	}
	return k
}

func (k *evacKit) vm(name string, power api.PowerState) string {
	vm := api.VM{Meta: api.NewMeta(api.KindVM, "", name), Spec: api.VMSpec{CPUs: 1, Memory: api.GiB, Power: power}}
	vm.Status = api.VMStatus{Phase: api.VMStopped, Node: "m1", Epoch: 1, ObservedGeneration: 1}
	if power == api.PowerRunning {
		vm.Status.Phase, vm.Status.PID, vm.Status.Hardware = api.VMRunning, 7, vm.Spec.Hardware()
	}
	b := api.Binding{Meta: api.Meta{ID: vm.Meta.ID, Name: name}, Spec: api.BindingSpec{NodeID: "n1", Node: "m1", Epoch: 1}}
	k.do(func(_ *configdb.View, tx *configdb.Txn) error {
		if err := configdb.VMs.Create(tx, &vm); err != nil {
			return err
		}
		return configdb.Bindings.CreateUnnamed(tx, &b)
	})
	return vm.Meta.ID
}

func (k *evacKit) wish(level api.EvacuationLevel, parallel int) {
	ev := api.Evacuation{Meta: api.NewMeta(api.KindEvacuation, "", "m1"), Spec: api.EvacuationSpec{TaskID: "t", Node: "m1", Level: level, Parallel: parallel}}
	ev.Meta.ID = "n1"
	k.do(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Evacuations.CreateUnnamed(tx, &ev) })
}

func (k *evacKit) look() api.EvacuationStatus {
	k.Helper()
	if err := k.e.look(context.Background()); err != nil {
		k.Fatal(err)
	}
	ev, err := configdb.Evacuations.Get(k.db.Local(), "n1")
	if err != nil {
		k.Fatal(err)
	}
	return ev.Status
}

// finish ends every operation: well, or badly.
func (k *evacKit) finish(well bool) (ended int) {
	ops, _ := configdb.Operations.List(k.db.Local())
	for _, op := range ops {
		ended++
		k.do(func(v *configdb.View, tx *configdb.Txn) error {
			arr, err := configdb.Arrivals.Get(v, op.Meta.ID)
			if err != nil {
				return err
			}
			configdb.Operations.DeleteUnnamed(tx, &op)
			configdb.Arrivals.DeleteUnnamed(tx, &arr)
			if !well {
				t, err := configdb.Tasks.Get(v, op.Spec.TaskID)
				if err != nil {
					return err
				}
				t.Status.Message = "the link is down"
				return configdb.Tasks.UpdateStatus(v, tx, &t)
			}
			b, err := configdb.Bindings.Get(v, op.Meta.ID)
			if err != nil {
				return err
			}
			b.Spec.NodeID, b.Spec.Node, b.Spec.Epoch = "n2", "m2", 2
			return configdb.Bindings.UpdateSpec(v, tx, &b)
		})
	}
	return ended
}

func (k *evacKit) at(id string) string {
	b, err := configdb.Bindings.Get(k.db.Local(), id)
	if err != nil {
		k.Fatal(err)
	}
	return b.Spec.Node
}

func TestEvacuationMovesEverythingAFewAtATime(t *testing.T) {
	k := newEvacKit(t)
	var ids []string
	for i := range 5 {
		ids = append(ids, k.vm(fmt.Sprintf("run%d", i), api.PowerRunning))
	}
	off := k.vm("off", api.PowerStopped)
	k.wish(api.EvacuateLive, 2)
	for range 10 {
		if st := k.look(); st.Phase.Final() {
			break
		}
		if n := k.finish(true); n > 2 {
			t.Fatalf("%d moved at once", n)
		}
	}
	if st := k.look(); st.Phase != api.TaskSucceeded || !strings.Contains(st.Message, "all 6") {
		t.Fatalf("%+v", st)
	}
	for _, id := range append(ids, off) {
		if k.at(id) != "m2" {
			t.Errorf("%s is on %s", id, k.at(id))
		}
	}
}

func TestEvacuationSaysWhatStaysAndWhy(t *testing.T) {
	k := newEvacKit(t, "pinned")
	k.vm("pinned", api.PowerRunning)
	k.vm("unlucky", api.PowerRunning)
	k.wish(api.EvacuateLive, 4)
	var st api.EvacuationStatus
	for range 6 {
		if st = k.look(); st.Phase.Final() {
			break
		}
		k.finish(false)
	}
	if st.Phase != api.TaskFailed || !strings.Contains(st.Message, "pinned: no node has its device") || !strings.Contains(st.Message, "unlucky: its move failed: the link is down") {
		t.Fatalf("%+v", st)
	}
}

func TestEvacuationShutsDownWhatCannotMoveAndStartsItElsewhere(t *testing.T) {
	k := newEvacKit(t, "pinned")
	id := k.vm("pinned", api.PowerRunning)
	k.wish(api.EvacuateStop, 1)
	k.look()
	get := func() api.VM {
		vm, err := configdb.VMs.Get(k.db.Local(), id)
		if err != nil {
			t.Fatal(err)
		}
		return vm
	}
	if vm := get(); vm.Spec.Power != api.PowerStopped {
		t.Fatalf("it was not shut down: %+v", vm.Spec)
	}
	if st := k.look(); st.Phase.Final() {
		t.Fatalf("it ended while a guest was shutting down: %+v", st)
	}
	k.do(func(v *configdb.View, tx *configdb.Txn) error { // its owner has done it
		vm := get()
		vm.Status.Phase, vm.Status.PID, vm.Status.ObservedGeneration = api.VMStopped, 0, vm.Meta.Generation
		return configdb.VMs.UpdateStatus(v, tx, &vm)
	})
	var st api.EvacuationStatus
	for range 4 {
		if st = k.look(); st.Phase.Final() {
			break
		}
	}
	if st.Phase != api.TaskSucceeded || k.at(id) != "m2" || get().Spec.Power != api.PowerRunning {
		t.Fatalf("%+v, on %s, %+v", st, k.at(id), get().Spec)
	}
}

func TestEvacuationIsGivenUp(t *testing.T) {
	k := newEvacKit(t)
	k.vm("a", api.PowerRunning)
	k.vm("b", api.PowerRunning)
	k.wish(api.EvacuateLive, 1)
	k.look()
	k.do(func(v *configdb.View, tx *configdb.Txn) error {
		ev, err := configdb.Evacuations.Get(v, "n1")
		if err != nil {
			return err
		}
		ev.Spec.Cancel = true
		return configdb.Evacuations.UpdateSpec(v, tx, &ev)
	})
	if st := k.look(); st.Phase.Final() {
		t.Fatal("it ended while a VM was on its way")
	}
	k.finish(true)
	if st := k.look(); st.Phase != api.TaskCancelled || !strings.Contains(st.Message, "1 VMs are left") {
		t.Fatalf("%+v", st)
	}
}

// A stopped VM whose disk only the node has stays, unless it is to be moved with it.
func TestEvacuationMovesStoppedVMsWithTheirDisksIfAsked(t *testing.T) {
	for name, asked := range map[string]bool{"asked for": true, "not asked for": false} {
		t.Run(name, func(t *testing.T) {
			k := newEvacKit(t)
			id := k.vm("off", api.PowerStopped)
			pool := api.Pool{Meta: api.NewMeta(api.KindPool, "", "local"), Spec: api.PoolSpec{Type: api.PoolDir}}
			vol := api.Volume{Meta: api.NewMeta(api.KindVolume, "", "off-disk0"), Spec: api.VolumeSpec{Pool: "local", Node: "m1", Size: api.GiB}}
			vol.Status = api.VolumeStatus{Phase: api.StorageReady, Format: "qcow2", Size: api.GiB}
			k.do(func(v *configdb.View, tx *configdb.Txn) error {
				vm, err := configdb.VMs.Get(v, id)
				if err != nil {
					return err
				}
				vm.Spec.Disks = []api.VMDisk{{Volume: "off-disk0"}}
				vm.Status.ObservedGeneration = 2
				for _, n := range []string{"n1", "n2"} {
					st := api.PoolState{Meta: api.NewMeta(api.KindPoolState, "", "x"), Spec: api.PoolStateSpec{PoolID: pool.Meta.ID, NodeID: n}, Status: api.PoolStateStatus{Ready: true}}
					st.Meta.ID = pool.Meta.ID + "." + n
					if err := configdb.PoolStates.CreateUnnamed(tx, &st); err != nil {
						return err
					}
				}
				return errors.Join(configdb.Pools.Create(tx, &pool), configdb.Volumes.Create(tx, &vol), configdb.VMs.UpdateSpec(v, tx, &vm), configdb.VMs.UpdateStatus(v, tx, &vm))
			})
			ev := api.Evacuation{Meta: api.NewMeta(api.KindEvacuation, "", "m1"), Spec: api.EvacuationSpec{TaskID: "t", Node: "m1", Level: api.EvacuateLive, Parallel: 2, MoveStopped: asked}}
			ev.Meta.ID = "n1"
			k.do(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Evacuations.CreateUnnamed(tx, &ev) })
			k.look()
			op, err := configdb.Operations.Get(k.db.Local(), id)
			if (err == nil) != asked {
				t.Fatalf("%+v, %v", op.Spec, err)
			}
			if !asked {
				return
			}
			if op.Spec.Action != api.ActionVMMove || op.Spec.NodeID != "n2" || len(op.Spec.Move.Volumes) != 1 || op.Spec.Move.Volumes[0].ID != vol.Meta.ID {
				t.Errorf("%+v %+v", op.Spec, op.Spec.Move)
			}
			if st := k.look(); st.Phase.Final() {
				t.Fatalf("it ended while a VM was on its way: %+v", st)
			}
			k.do(func(v *configdb.View, tx *configdb.Txn) error { // as the target does
				b, err := configdb.Bindings.Get(v, id)
				configdb.Operations.DeleteUnnamed(tx, &op)
				b.Spec.NodeID, b.Spec.Node, b.Spec.Epoch = "n2", "m2", 2
				return errors.Join(err, configdb.Bindings.UpdateSpec(v, tx, &b))
			})
			if st := k.look(); st.Phase != api.TaskSucceeded {
				t.Errorf("%+v", st)
			}
		})
	}
}
