// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

func follows(a api.StartAfter) api.VMSpec {
	return api.VMSpec{Power: api.PowerRunning, Recovery: &api.VMRecovery{StartAfter: a}}
}

// node2 adds a second node, which nobody plays.
func (e *env) node2() {
	e.t.Helper()
	n := api.Node{Meta: api.NewMeta(api.KindNode, "", "n2")}
	n.Meta.ID, n.Status.Phase = "node-2", api.NodeReady
	tx := &configdb.Txn{}
	must(e.t, configdb.Nodes.Create(tx, &n))
	e.commit(tx)
}

// say writes a status as another node would.
func (e *env) say(id string, f func(*api.VMStatus)) {
	e.t.Helper()
	_, err := configdb.Transact(e.t.Context(), e.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
		vm, err := configdb.VMs.Get(v, id)
		if err != nil {
			return err
		}
		f(&vm.Status)
		return configdb.VMs.UpdateStatus(v, tx, &vm)
	})
	must(e.t, err)
}

// recovered makes the VM app1 that ha has just bound here.
func (e *env) recovered(spec api.VMSpec) string {
	e.t.Helper()
	spec.Power = api.PowerStopped
	e.vols.put("app1-disk0", e.disk())
	id := e.createNamed("app1", "node-1", spec)
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	_, err := configdb.Transact(e.t.Context(), e.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
		vm, err := configdb.VMs.Get(v, id)
		if err != nil {
			return err
		}
		vm.Spec.Power = api.PowerRunning
		vm.Status.Awaits = &api.VMAwaits{Epoch: 1}
		if err := configdb.VMs.UpdateSpec(v, tx, &vm); err != nil {
			return err
		}
		return configdb.VMs.UpdateStatus(v, tx, &vm)
	})
	must(e.t, err)
	return id
}

func heldFor(names ...string) func(api.VM) bool {
	return func(vm api.VM) bool {
		return vm.Status.Awaits != nil && slices.Equal(vm.Status.Awaits.VMs, names) && vm.Status.Awaits.Until != nil
	}
}

func isRunning(vm api.VM) bool { return vm.Status.Phase == api.VMRunning && vm.Status.PID != 0 }

func TestARecoveredVMWaitsForTheOthers(t *testing.T) {
	e := newEnv(t, false)
	e.node2()
	db := e.createNamed("db1", "node-2", api.VMSpec{Power: api.PowerRunning})
	cache := e.createNamed("cache1", "node-2", api.VMSpec{Power: api.PowerRunning})
	e.createNamed("old1", "node-2", api.VMSpec{Power: api.PowerStopped})
	runs := func(s *api.VMStatus) { s.Phase, s.Epoch, s.PID = api.VMRunning, 1, 7 }
	e.say(db, runs) // before the wait began: perhaps of an earlier life
	id := e.recovered(follows(api.StartAfter{After: []string{"db1", "cache1", "old1", "gone1"}, AfterCondition: api.AfterHealthy, AfterDelaySeconds: 30}))
	vm := e.wait(id, "held back", heldFor("db1", "cache1"))
	if vm.Status.Phase != api.VMStarting && vm.Status.Phase != api.VMCreating || !strings.Contains(vm.Status.Message, "waits for db1, cache1 to run and their guest agents to answer, at most 2m0s") {
		t.Fatalf("%+v", vm.Status)
	}
	rev := e.vm(id).Meta.StatusRevision
	e.say(db, func(s *api.VMStatus) { runs(s); s.Message = "m" })
	e.say(cache, runs)
	e.h.Wake()
	e.say(cache, func(s *api.VMStatus) { s.Agent = &api.VMAgent{Version: "1"} })
	e.wait(id, "only one is missing", heldFor("db1"))
	if got := e.vm(id).Meta.StatusRevision; got == rev {
		t.Fatal("nothing was written when another VM came up")
	}
	e.say(db, func(s *api.VMStatus) { s.Agent = &api.VMAgent{Version: "1"} })
	e.wait(id, "the delay", func(vm api.VM) bool { return strings.Contains(vm.Status.Message, "it starts 30s later") })
	if e.guard.startCount() != 0 {
		t.Fatal("started without the delay")
	}
	rev = e.vm(id).Meta.StatusRevision
	for range 3 {
		e.h.Wake()
	}
	if got := e.vm(id).Meta.StatusRevision; got != rev {
		t.Error("waiting writes")
	}
	e.clock.advance(31 * time.Second)
	e.h.Wake()
	if vm := e.wait(id, "running", isRunning); vm.Status.Awaits != nil || e.events(eventNotAwaited) != 0 {
		t.Errorf("%+v", vm.Status)
	}
}

func TestAStatusOfAnEarlierLifeIsNotBelieved(t *testing.T) {
	e := newEnv(t, false)
	e.node2()
	db := e.createNamed("db1", "node-2", api.VMSpec{Power: api.PowerRunning})
	e.say(db, func(s *api.VMStatus) { s.Phase, s.Epoch, s.PID = api.VMRunning, 1, 7 })
	id := e.recovered(follows(api.StartAfter{After: []string{"db1"}}))
	e.wait(id, "held back", heldFor("db1"))
	e.h.Wake()
	e.wait(id, "held back", heldFor("db1"))
	e.clock.advance(livingTime + time.Second) // by now its node would have been declared lost
	e.h.Wake()
	e.wait(id, "running", isRunning)
	if e.events(eventNotAwaited) != 0 {
		t.Error("it did not wait in vain")
	}
}

func TestAVMWhoseNodeIsLostIsNotUp(t *testing.T) {
	e := newEnv(t, false)
	e.node2()
	db := e.createNamed("db1", "node-2", api.VMSpec{Power: api.PowerRunning})
	_, err := configdb.Transact(t.Context(), e.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Get(v, "node-2")
		if err != nil {
			return err
		}
		n.Status.Phase = api.NodeLost
		return configdb.Nodes.UpdateStatus(v, tx, &n)
	})
	must(t, err)
	id := e.recovered(follows(api.StartAfter{After: []string{"db1"}, AfterWaitSeconds: 300}))
	e.wait(id, "held back", heldFor("db1"))
	e.say(db, func(s *api.VMStatus) { s.Phase, s.Epoch, s.PID = api.VMRunning, 1, 7 })
	e.clock.advance(livingTime + time.Second)
	e.h.Wake()
	e.wait(id, "held back", heldFor("db1"))
	e.clock.advance(5 * time.Minute)
	e.h.Wake()
	vm := e.wait(id, "started in vain", isRunning)
	if vm.Status.Awaits != nil || e.events(eventNotAwaited) != 1 {
		t.Errorf("%d events, %+v", e.events(eventNotAwaited), vm.Status)
	}
}

// A host that powers up starts its VMs in their order, and one that crashes alone
// waits for nobody.
func TestAPowerCutRestartsInOrder(t *testing.T) {
	e := newEnv(t, false)
	e.vols.put("db1-disk0", e.disk())
	db := e.createNamed("db1", "node-1", api.VMSpec{Power: api.PowerRunning})
	e.wait(db, "running", isRunning)
	e.vols.put("app1-disk0", e.disk())
	id := e.createNamed("app1", "node-1", follows(api.StartAfter{After: []string{"db1"}}))
	e.wait(id, "running: its user asked for it", isRunning)
	e.fakes.qemu().Exit(-1, 11)
	e.soon(id, "restarted after its own crash", func(vm api.VM) bool { return isRunning(vm) && vm.Status.Crashes == 1 })

	was := e.vm(id).Status.PID
	e.stop()
	e.guard.killAll()
	e.guard.mu.Lock()
	e.guard.procs, e.guard.starts = map[string]*testProc{}, nil // the guard's memory is gone, too
	e.guard.mu.Unlock()
	e.begin()
	e.wait(id, "running again", func(vm api.VM) bool { return isRunning(vm) && vm.Status.PID != was && vm.Status.Awaits == nil })
	e.guard.mu.Lock()
	defer e.guard.mu.Unlock()
	if len(e.guard.starts) != 2 || e.guard.starts[0].VM != db || e.guard.starts[1].VM != id {
		t.Errorf("starts: %+v", e.guard.starts)
	}
}

func TestALapsedLeaseRestartsInOrder(t *testing.T) {
	e := newEnv(t, false)
	e.vols.put("db1-disk0", e.disk())
	db := e.createNamed("db1", "node-1", api.VMSpec{Power: api.PowerRunning, HA: api.HARestart})
	e.wait(db, "running", isRunning)
	e.vols.put("app1-disk0", e.disk())
	spec := follows(api.StartAfter{After: []string{"db1"}})
	spec.HA = api.HARestart
	id := e.createNamed("app1", "node-1", spec)
	e.wait(id, "running", isRunning)
	e.until("both are protected", func() bool { return e.binding(id).Spec.Protected && e.binding(db).Spec.Protected }, nothing)
	e.guard.lease(0)
	e.wait(id, "ended", func(vm api.VM) bool { return vm.Status.PID == 0 && vm.Status.Awaits != nil })
	e.guard.mu.Lock()
	e.guard.starts = nil
	e.guard.mu.Unlock()
	e.guard.lease(2)
	e.h.Wake()
	e.wait(id, "running again", isRunning)
	e.guard.mu.Lock()
	defer e.guard.mu.Unlock()
	if len(e.guard.starts) != 2 || e.guard.starts[0].VM != db {
		t.Errorf("starts: %+v", e.guard.starts)
	}
}
