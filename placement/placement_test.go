// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package placement

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
)

// world builds a database for a test.
type world struct {
	tb testing.TB
	db *storetest.Mem
}

func (w *world) do(f func(v *configdb.View, tx *configdb.Txn) error) {
	w.tb.Helper()
	if _, err := configdb.Transact(context.Background(), w.db, "test", 20, f); err != nil {
		w.tb.Fatal(err)
	}
}

func (w *world) node(name string, memory api.Size, change func(*api.Node)) api.Node {
	w.tb.Helper()
	n := api.Node{Meta: api.NewMeta(api.KindNode, "", name), Spec: api.NodeSpec{Role: api.RoleVoter, ReservedMemory: 512 * api.MiB}}
	n.Status = api.NodeStatus{Phase: api.NodeReady, QEMUVersion: "7.2.0", Memory: memory}
	if change != nil {
		change(&n)
	}
	w.do(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Nodes.Create(tx, &n) })
	return n
}

func (w *world) pool(name string, typ api.PoolType, readyOn ...api.Node) api.Pool {
	w.tb.Helper()
	p := api.Pool{Meta: api.NewMeta(api.KindPool, "", name), Spec: api.PoolSpec{Type: typ}}
	w.do(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Pools.Create(tx, &p) })
	for _, n := range readyOn {
		st := api.PoolState{Meta: api.Meta{ID: p.Meta.ID + "." + n.Meta.ID}, Spec: api.PoolStateSpec{PoolID: p.Meta.ID, NodeID: n.Meta.ID}, Status: api.PoolStateStatus{Node: n.Meta.Name, Ready: true}}
		w.do(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.PoolStates.CreateUnnamed(tx, &st) })
	}
	return p
}

func (w *world) volume(name, pool, node string) {
	o := api.Volume{Meta: api.NewMeta(api.KindVolume, "", name), Spec: api.VolumeSpec{Pool: pool, Size: api.GiB, Node: node}}
	w.do(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Volumes.Create(tx, &o) })
}

func (w *world) image(name, pool, node string) {
	o := api.Image{Meta: api.NewMeta(api.KindImage, "", name), Spec: api.ImageSpec{Pool: pool, Node: node}}
	w.do(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Images.Create(tx, &o) })
}

func newVM(name string, memory api.Size, disks ...api.VMDisk) api.VM {
	return api.VM{Meta: api.NewMeta(api.KindVM, "", name), Spec: api.VMSpec{CPUs: 1, Memory: memory, Disks: disks, Power: api.PowerRunning}}
}

func bind(tx *configdb.Txn, vm *api.VM, d Decision) error {
	b := api.Binding{Meta: api.Meta{ID: vm.Meta.ID, Name: vm.Meta.Name}, Spec: api.BindingSpec{NodeID: d.NodeID, Node: d.Node, Epoch: 1}}
	return errors.Join(configdb.VMs.Create(tx, vm), configdb.Bindings.CreateUnnamed(tx, &b))
}

func (w *world) bound(vm api.VM, n api.Node) api.VM {
	w.do(func(_ *configdb.View, tx *configdb.Txn) error {
		return bind(tx, &vm, Decision{NodeID: n.Meta.ID, Node: n.Meta.Name})
	})
	return vm
}

func TestChoose(t *testing.T) {
	w := &world{t, storetest.New(t)}
	m1 := w.node("m1", 4*api.GiB, nil)
	m2 := w.node("m2", 8*api.GiB, nil)
	m3 := w.node("m3", 2*api.GiB, nil)
	w.node("m4", 64*api.GiB, func(n *api.Node) { n.Spec.Maintenance = true })
	w.node("m5", 64*api.GiB, func(n *api.Node) { n.Spec.Role = api.RoleWitness })
	w.node("m6", 64*api.GiB, func(n *api.Node) { n.Status.Phase = api.NodeLost })
	w.node("m7", 64*api.GiB, func(n *api.Node) { n.Status.QEMUVersion = "" })
	w.node("m8", 64*api.GiB, func(n *api.Node) { n.Status.Phase = "" })
	w.pool("local", api.PoolDir, m1, m2, m3)
	w.pool("nfs", api.PoolShared, m1, m3)
	w.volume("data", "local", "m1")
	w.volume("shared", "nfs", "m1")
	w.image("tiny", "local", "m3")
	w.image("common", "nfs", "m1")
	running := w.bound(newVM("big", 5*api.GiB), m2)
	stopped := newVM("off", 3*api.GiB)
	stopped.Spec.Power = api.PowerStopped
	w.bound(stopped, m1)
	stopping := newVM("stopping", 2*api.GiB)
	stopping.Spec.Power, stopping.Status.Phase = api.PowerStopped, api.VMStopping
	w.bound(stopping, m1)
	v := w.db.Local()

	for name, c := range map[string]struct {
		r    Request
		want string
		code api.Code
		says []string
	}{
		"emptiest node":               {r: Request{VM: newVM("a", api.GiB)}, want: "m3"},
		"too large":                   {r: Request{VM: newVM("a", 6*api.GiB)}, code: api.CodeUnplaceable, says: []string{"m1: needs 6.1 GiB, has 1.4 GiB free", "m2: needs 6.1 GiB, has 2.4 GiB free", "m4: maintenance", "m5: is a witness", "m6: is lost", "m7: QEMU cannot be used", "m8: is not ready"}},
		"its own share counts once":   {r: Request{VM: running, Only: "m2"}, want: "m2"},
		"volume pins":                 {r: Request{VM: newVM("a", api.GiB, api.VMDisk{Volume: "data"})}, want: "m1"},
		"image pins":                  {r: Request{VM: newVM("a", api.GiB, api.VMDisk{Image: "tiny"})}, want: "m3"},
		"new disk with its name":      {r: Request{VM: newVM("a", api.GiB, api.VMDisk{Volume: "a-disk0", Image: "tiny"})}, want: "m3"},
		"pool at hand":                {r: Request{VM: newVM("a", 1300*api.MiB, api.VMDisk{Pool: "nfs", Size: api.GiB})}, want: "m3", says: nil},
		"shared volume":               {r: Request{VM: newVM("a", api.GiB, api.VMDisk{Volume: "shared"}), Exclude: map[string]string{m3.Meta.ID: "had it"}}, want: "m1"},
		"excluded with reason":        {r: Request{VM: newVM("a", api.GiB, api.VMDisk{Volume: "data"}), Exclude: map[string]string{m1.Meta.ID: "was lost"}}, code: api.CodeUnplaceable, says: []string{"m1: was lost", "m2: volume \"data\" is on node m1"}},
		"contradicting pins":          {r: Request{VM: newVM("a", api.GiB, api.VMDisk{Volume: "data"}, api.VMDisk{Image: "tiny"})}, code: api.CodeUnplaceable, says: []string{"m1: image \"tiny\" is on node m3"}},
		"explicit":                    {r: Request{VM: newVM("a", api.GiB), Only: "m1"}, want: "m1"},
		"explicit unfit":              {r: Request{VM: newVM("a", api.GiB), Only: "m4"}, code: api.CodeUnplaceable, says: []string{"m4: maintenance"}},
		"explicit without pool":       {r: Request{VM: newVM("a", api.GiB, api.VMDisk{Pool: "nfs", Size: api.GiB}), Only: "m2"}, code: api.CodeUnplaceable, says: []string{"m2: has no pool \"nfs\""}},
		"explicit unknown":            {r: Request{VM: newVM("a", api.GiB), Only: "m9"}, code: api.CodeNotFound, says: []string{"m9"}},
		"unknown volume":              {r: Request{VM: newVM("a", api.GiB, api.VMDisk{Volume: "nope"})}, code: api.CodeNotFound},
		"unknown image":               {r: Request{VM: newVM("a", api.GiB, api.VMDisk{Image: "nope"})}, code: api.CodeNotFound},
		"unknown pool":                {r: Request{VM: newVM("a", api.GiB, api.VMDisk{Pool: "nope", Size: api.GiB})}, code: api.CodeNotFound},
		"clone in another pool":       {r: Request{VM: newVM("a", api.GiB, api.VMDisk{Image: "common"})}, code: api.CodeRefused, says: []string{"choose that pool", "spec.disks[0].pool"}},
		"clone in its pool":           {r: Request{VM: newVM("a", api.GiB, api.VMDisk{Image: "common", Pool: "nfs"}), Exclude: map[string]string{m3.Meta.ID: ""}}, want: "m1"},
		"stopping VMs keep their own": {r: Request{VM: newVM("a", 1500*api.MiB), Only: "m1"}, code: api.CodeUnplaceable},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Choose(v, c.r)
			if c.code == "" {
				if err != nil || got.Node != c.want {
					t.Fatalf("got %v, %v; want %s", got, err, c.want)
				}
				return
			}
			if err == nil || api.CodeOf(err) != c.code {
				t.Fatalf("got %v, %v; want code %s", got, err, c.code)
			}
			for _, s := range c.says {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("%q does not say %q", err, s)
				}
			}
		})
	}
	if _, err := Choose(storetest.New(t).Local(), Request{VM: newVM("a", api.GiB)}); api.CodeOf(err) != api.CodeUnplaceable {
		t.Errorf("empty cluster: %v", err)
	}
}

func TestConcurrentPlacementsNeverOverfillANode(t *testing.T) {
	w := &world{t, storetest.New(t)}
	// Room for three VMs of 1 GiB with their overhead on each node.
	room := 512*api.MiB + 3*(api.GiB+OverheadPerVM)
	w.node("m1", room, nil)
	w.node("m2", room, nil)
	var wg sync.WaitGroup
	errs := make([]error, 12)
	for i := range errs {
		wg.Go(func() {
			_, errs[i] = configdb.Transact(t.Context(), w.db, "test", 50, func(v *configdb.View, tx *configdb.Txn) error {
				vm := newVM(fmt.Sprintf("vm%d", i), api.GiB)
				d, err := Choose(v, Request{VM: vm})
				if err != nil {
					return err
				}
				Reserve(v, tx, d.NodeID)
				return bind(tx, &vm, d)
			})
		})
	}
	wg.Wait()
	placed := 0
	for _, err := range errs {
		if err == nil {
			placed++
		} else if api.CodeOf(err) != api.CodeUnplaceable {
			t.Error(err)
		}
	}
	f, err := load(w.db.Local(), "")
	if err != nil || placed != 6 || f.hosts[0].free() < 0 || f.hosts[1].free() < 0 {
		t.Errorf("placed %d of 6, free %v and %v, %v", placed, f.hosts[0].free(), f.hosts[1].free(), err)
	}
}

func TestReserveNoticesMaintenance(t *testing.T) {
	w := &world{t, storetest.New(t)}
	n := w.node("m1", 8*api.GiB, nil)
	tx := &configdb.Txn{}
	Reserve(w.db.Local(), tx, n.Meta.ID)
	w.do(func(v *configdb.View, tx *configdb.Txn) error {
		n.Spec.Maintenance = true
		return configdb.Nodes.UpdateSpec(v, tx, &n)
	})
	if _, err := w.db.Txn(t.Context(), tx); !errors.Is(err, configdb.ErrConflict) {
		t.Errorf("got %v, want a conflict", err)
	}
}

// TestProperties fills random clusters and checks every single decision
// against a plain recomputation.
func TestProperties(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w := &world{t, storetest.New(t)}
		var nodes []api.Node
		for i := range rapid.IntRange(0, 5).Draw(rt, "nodes") {
			nodes = append(nodes, w.node(fmt.Sprintf("m%d", i), api.Size(rapid.IntRange(0, 8).Draw(rt, "GiB"))*api.GiB, func(n *api.Node) {
				n.Spec.Maintenance = rapid.IntRange(0, 5).Draw(rt, "maintenance") == 0
				if rapid.IntRange(0, 5).Draw(rt, "witness") == 0 {
					n.Spec.Role = api.RoleWitness
				}
				n.Status.Phase = rapid.SampledFrom([]api.NodePhase{api.NodeReady, api.NodeReady, api.NodeReady, api.NodeLost, api.NodeJoining}).Draw(rt, "phase")
				n.Status.QEMUVersion = rapid.SampledFrom([]string{"7.2", "7.2", "7.2", ""}).Draw(rt, "qemu")
			}))
		}
		var withPool []api.Node
		hasPool := map[string]bool{}
		for _, n := range nodes {
			if rapid.Bool().Draw(rt, "has pool") {
				withPool = append(withPool, n)
				hasPool[n.Meta.ID] = true
			}
		}
		w.pool("local", api.PoolDir, withPool...)
		used := map[string]api.Size{}
		for i := range rapid.IntRange(1, 12).Draw(rt, "vms") {
			vm := newVM(fmt.Sprintf("vm%d", i), api.Size(rapid.IntRange(1, 3000).Draw(rt, "MiB"))*api.MiB)
			disk := rapid.Bool().Draw(rt, "disk")
			if disk {
				vm.Spec.Disks = []api.VMDisk{{Size: api.GiB}}
			}
			vm.Spec.Power = rapid.SampledFrom([]api.PowerState{api.PowerRunning, api.PowerPaused, api.PowerStopped}).Draw(rt, "power")
			fit := map[string]bool{}
			for _, n := range nodes {
				fit[n.Meta.ID] = n.Spec.Role == api.RoleVoter && !n.Spec.Maintenance && n.Status.Phase == api.NodeReady && n.Status.QEMUVersion != "" &&
					(!disk || hasPool[n.Meta.ID]) &&
					used[n.Meta.ID]+vm.Spec.Memory+OverheadPerVM <= n.Status.Memory-n.Spec.ReservedMemory
				if !fit[n.Meta.ID] {
					delete(fit, n.Meta.ID)
				}
			}
			v := w.db.Local()
			got, err := Choose(v, Request{VM: vm})
			again, _ := Choose(v, Request{VM: vm})
			if got != again {
				rt.Fatalf("two answers: %v and %v", got, again)
			}
			if err != nil {
				if len(fit) > 0 || api.CodeOf(err) != api.CodeUnplaceable {
					rt.Fatalf("refused though %v fit: %v", fit, err)
				}
				for _, n := range nodes {
					if !strings.Contains(err.Error(), n.Meta.Name+": ") {
						rt.Fatalf("no reason for %s in %q", n.Meta.Name, err)
					}
				}
				continue
			}
			if !fit[got.NodeID] {
				rt.Fatalf("chose the unfit node %v of %v", got, fit)
			}
			w.do(func(_ *configdb.View, tx *configdb.Txn) error {
				Reserve(v, tx, got.NodeID)
				return bind(tx, &vm, got)
			})
			if vm.Spec.Power != api.PowerStopped {
				used[got.NodeID] += vm.Spec.Memory + OverheadPerVM
			}
		}
	})
}

func TestANodeFitsOnlyIfItHasTheNetworks(t *testing.T) {
	w := &world{t, storetest.New(t)}
	silent := w.node("m1", 8*api.GiB, nil)
	down, without, with := w.node("m2", 8*api.GiB, nil), w.node("m3", 8*api.GiB, nil), w.node("m4", 4*api.GiB, nil)
	report := func(n api.Node, st api.SwitchStateStatus) {
		o := api.SwitchState{Meta: api.Meta{ID: n.Meta.ID}, Spec: api.SwitchStateSpec{NodeID: n.Meta.ID}, Status: st}
		w.do(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.SwitchStates.CreateUnnamed(tx, &o) })
	}
	report(down, api.SwitchStateStatus{Reason: "Open vSwitch does not run"})
	report(without, api.SwitchStateStatus{Ready: true, Networks: []string{"blue"}, Problems: map[string]string{"red": "no uplink"}})
	report(with, api.SwitchStateStatus{Ready: true, Networks: []string{"blue", "red"}})
	vm := newVM("web1", api.GiB)
	vm.Spec.NICs = []api.VMNIC{{Network: "red"}}
	d, err := Choose(w.db.Local(), Request{VM: vm})
	if err != nil || d.Node != "m4" {
		t.Fatalf("chose %+v, %v", d, err)
	}
	for n, words := range map[*api.Node]string{&silent: "not reported", &down: "Open vSwitch does not run", &without: `network "red": no uplink`} {
		_, err := Choose(w.db.Local(), Request{VM: vm, Only: n.Meta.Name})
		if api.CodeOf(err) != api.CodeUnplaceable || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v, want %q", n.Meta.Name, err, words)
		}
	}
	vm.Spec.NICs = nil
	if d, err := Choose(w.db.Local(), Request{VM: vm, Only: "m1"}); err != nil || d.Node != "m1" {
		t.Errorf("a VM without cards needs no switch: %v", err)
	}
}
