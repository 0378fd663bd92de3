// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/memory"
	"github.com/muster-vm/muster/internal/qmptest"
)

// nodeMemory says how much memory the node has.
func (e *env) nodeMemory(n api.Size) {
	e.t.Helper()
	_, err := configdb.Transact(e.t.Context(), e.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
		node, err := configdb.Nodes.Get(v, "node-1")
		if err != nil {
			return err
		}
		node.Status.Memory = n
		return configdb.Nodes.UpdateStatus(v, tx, &node)
	})
	must(e.t, err)
}

// says is what a guest reports to its balloon.
func (e *env) says(q *qmptest.QEMU, available float64) {
	q.SetProperty("balloon0", "guest-stats", map[string]any{
		"last-update": e.clock.now().Unix(),
		"stats":       map[string]any{"stat-total-memory": 1e9, "stat-available-memory": available, "stat-free-memory": available},
	})
}

func target(vm api.VM) api.Size {
	if vm.Status.Memory == nil {
		return 0
	}
	return vm.Status.Memory.Target
}

func TestAStartWaitsForWhatOthersGiveBack(t *testing.T) {
	e := newEnv(t, false)
	e.nodeMemory(2 * api.GiB)
	a, _ := e.runningNamed("a", api.VMSpec{Memory: api.GiB, MemoryMin: 256 * api.MiB})
	q := e.fakes.qemu()
	q.SetBalloon(int64(api.GiB))
	e.says(q, float64(800*api.MiB))
	look := func(after time.Duration) {
		e.clock.advance(after)
		e.says(q, float64(500*api.MiB))
		e.h.BalanceNow(t.Context())
	}
	look(0)
	if vm := e.vm(a); q.Count("balloon") != 0 || vm.Status.Memory != nil && vm.Status.Memory.Target != api.GiB {
		t.Fatalf("squeezed without a reason: %+v", vm.Status.Memory)
	}

	q.IgnoreUnplug(true) // the guest takes its time
	e.vols.put("b-disk0", e.disk())
	b := e.createNamed("b", "node-1", api.VMSpec{Memory: 1200 * api.MiB, Power: api.PowerRunning})
	e.wait(b, "waiting", func(vm api.VM) bool {
		return strings.Contains(vm.Status.Message, "give memory back; 304 MiB are still missing")
	})
	for range 20 {
		look(BalanceInterval)
	}
	vm := e.wait(a, "squeezed", func(vm api.VM) bool { return target(vm) == 720*api.MiB })
	if vm.Status.Memory.Reason != "the node is short of memory" || e.guard.startCount() != 1 {
		t.Fatalf("%+v, %d starts", vm.Status.Memory, e.guard.startCount())
	}
	q.SetBalloon(int64(720 * api.MiB))
	e.h.Wake()
	e.wait(b, "running", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning })

	// Given back when the other is gone, and not before its time.
	q.IgnoreUnplug(false)
	e.change(b, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
	e.wait(b, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	look(memory.Cooldown)
	e.wait(a, "given back", func(vm api.VM) bool { return target(vm) == api.GiB })
	n := q.Count("balloon")
	rev := e.db.Local().Revision()
	for range 20 {
		look(BalanceInterval)
	}
	if q.Count("balloon") != n || e.db.Local().Revision() != rev {
		t.Errorf("at rest it moved the balloon %d times and wrote %d times", q.Count("balloon")-n, e.db.Local().Revision()-rev)
	}
}

func TestAGuestThatSaysNothingIsNotCountedOn(t *testing.T) {
	e := newEnv(t, false)
	e.nodeMemory(64 * api.GiB)
	a, vm := e.runningNamed("a", api.VMSpec{Memory: api.GiB, MemoryMin: 256 * api.MiB})
	if held := vm.Status.HeldMemory(&vm.Spec); held != 256*api.MiB {
		t.Fatal(held)
	}
	e.h.BalanceNow(t.Context())
	e.clock.advance(SilentAfter + time.Second)
	e.h.BalanceNow(t.Context())
	vm = e.wait(a, "silent", func(vm api.VM) bool { return vm.Status.Memory != nil && vm.Status.Memory.Silent })
	if held := vm.Status.HeldMemory(&vm.Spec); held != api.GiB {
		t.Error(held)
	}
	e.says(e.fakes.qemu(), 1)
	e.h.BalanceNow(t.Context())
	e.wait(a, "heard", func(vm api.VM) bool { return vm.Status.Memory != nil && !vm.Status.Memory.Silent })
}

func TestOnlyWhatCanBeTrueIsBelieved(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	for name, c := range map[string]struct {
		at              int64
		available, free json64
		used            api.Size
		ok              bool
	}{
		"a sane guest":            {now.Unix(), json64(700 * api.MiB), 5, 324 * api.MiB, true},
		"never":                   {0, json64(700 * api.MiB), 5, 0, false},
		"from the future":         {now.Unix() + 1000, json64(700 * api.MiB), 5, 0, false},
		"more than there is":      {now.Unix(), json64(2 * api.GiB), 5, 0, false},
		"an old kernel":           {now.Unix(), math.MaxUint64, json64(100 * api.MiB), 924 * api.MiB, true},
		"an old kernel that lies": {now.Unix(), math.MaxUint64, math.MaxUint64, 0, false},
		"negative":                {now.Unix(), -5, -5, 0, false},
	} {
		g := guestStats{LastUpdate: c.at}
		g.Stats.Available, g.Stats.Free = c.available, c.free
		if used, _, ok := g.used(api.GiB, now); ok != c.ok || used != c.used {
			t.Errorf("%s: %s, %v", name, used, ok)
		}
	}
}

// Memory that was plugged in is out of the balloon's reach.
func TestTheBalloonLeavesPluggedInMemoryAlone(t *testing.T) {
	e := newEnv(t, false)
	a, _ := e.runningNamed("a", api.VMSpec{Memory: api.GiB, MaxMemory: 4 * api.GiB, MemoryMin: 256 * api.MiB})
	e.change(a, func(vm *api.VM) { vm.Spec.Memory = 1536 * api.MiB })
	vm := e.wait(a, "grown", func(vm api.VM) bool { return vm.Status.Hardware.Memory == 1536*api.MiB })
	if held := vm.Status.HeldMemory(&vm.Spec); held != 512*api.MiB+api.MinMemory {
		t.Error(held)
	}
	q := e.fakes.qemu()
	q.SetBalloon(int64(api.GiB))
	e.nodeMemory(1024*api.MiB + api.OverheadPerVM)
	for range 20 {
		e.says(q, 0)
		e.h.BalanceNow(t.Context())
		e.clock.advance(BalanceInterval)
	}
	e.wait(a, "squeezed", func(vm api.VM) bool { return target(vm) == api.GiB })
	if n := q.Balloon(); n != int64(512*api.MiB) {
		t.Error(n)
	}
}
