// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

func canary() api.VMSpec {
	return api.VMSpec{HA: api.HARestart, Recovery: &api.VMRecovery{Drill: api.DrillManual}}
}

// drill wishes for a drill of a VM.
func (e *env) drill(id string, change func(*api.Drill)) {
	e.t.Helper()
	vm, b := e.vm(id), e.binding(id)
	if _, err := configdb.Nodes.Get(e.db.Local(), b.Spec.NodeID); err != nil {
		n := api.Node{Meta: api.NewMeta(api.KindNode, "", b.Spec.Node)}
		n.Meta.ID = b.Spec.NodeID
		tx := &configdb.Txn{}
		must(e.t, configdb.Nodes.Create(tx, &n))
		e.commit(tx)
	}
	d := api.Drill{Meta: api.NewMeta(api.KindDrill, "", vm.Meta.Name), Spec: api.DrillSpec{
		VM: vm.Meta.Name, NodeID: b.Spec.NodeID, Node: b.Spec.Node, Epoch: b.Spec.Epoch, Generation: vm.Meta.Generation, BegunAt: time.Now(),
	}}
	d.Meta.ID, d.Status.Phase = id, api.TaskPending
	if change != nil {
		change(&d)
	}
	tx := &configdb.Txn{}
	must(e.t, configdb.Drills.CreateUnnamed(tx, &d))
	e.commit(tx)
}

// asked is a VM whose owner has said that it ends it for a drill, and was stopped then.
func (e *env) asked() (id string, was api.VM) {
	e.t.Helper()
	id, was = e.running(canary())
	e.stop()
	e.drill(id, func(d *api.Drill) { d.Status.PID, d.Status.Phase = was.Status.PID, api.TaskRunning })
	return id, was
}

func (e *env) drillOf(id string) api.Drill {
	e.t.Helper()
	d, err := configdb.Drills.Get(e.db.Local(), id)
	must(e.t, err)
	return d
}

func TestADrilledVMIsEndedAndGivenUp(t *testing.T) {
	e := newEnv(t, false)
	id, was := e.running(canary())
	e.drill(id, nil)
	vm := e.wait(id, "given up", func(vm api.VM) bool { return api.GivenUp(&vm, 1) })
	d := e.drillOf(id)
	if !vm.Status.Tries.Drill || vm.Status.PID != 0 || d.Status.Ended == nil || d.Status.Ended.PID != was.Status.PID || d.Status.PID != was.Status.PID || d.Status.Ended.Reason != ReasonKill {
		t.Fatalf("%+v, %+v", vm.Status, d.Status)
	}
	f, err := configdb.Failovers.Get(e.db.Local(), d.Status.Failover)
	if err != nil || f.Spec.Cause != api.CauseDrill || f.Spec.Drill.VMID != id || f.Meta.Revision != d.Meta.StatusRevision || f.Meta.Revision != vm.Meta.StatusRevision {
		t.Fatalf("the evidence is not of the moment that it is about: %+v, %v", f, err)
	}
	// Neither this daemon nor the next one starts it, whatever it forgets.
	starts := e.guard.startCount()
	e.stop()
	for range 3 {
		if _, err := e.h.reconcile(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	if e.guard.startCount() != starts {
		t.Fatal("a VM that was given up was started")
	}
	e.begin()
	// Nobody answers.
	e.clock.advance(drillAlone + time.Second)
	e.h.Wake()
	vm = e.wait(id, "runs again", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning && vm.Status.PID != 0 })
	if vm.Status.Epoch != 1 || vm.Status.Tries != nil || e.drillOf(id).Status.Ended == nil {
		t.Errorf("%+v", vm.Status)
	}
}

// The daemon dies after the kill; the guard keeps what became of QEMU.
func TestADrillGoesOnWithTheNextDaemon(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.asked()
	must(t, e.guard.Kill(t.Context(), id))
	e.begin()
	e.wait(id, "given up", func(vm api.VM) bool { return api.GivenUp(&vm, 1) && vm.Status.Tries.Drill })
}

func TestADrillEndsNothing(t *testing.T) {
	for name, change := range map[string]func(d *api.Drill){
		"that was cancelled":         func(d *api.Drill) { d.Spec.Cancel = true },
		"that is over":               func(d *api.Drill) { d.Status.Phase = api.TaskFailed },
		"of an earlier binding":      func(d *api.Drill) { d.Spec.Epoch-- },
		"of an earlier wish":         func(d *api.Drill) { d.Spec.Generation-- },
		"of another process":         func(d *api.Drill) { d.Status.PID = 1 << 20 },
		"that is another node's":     func(d *api.Drill) { d.Spec.NodeID = "node-2" },
		"whose VM was bound onwards": func(d *api.Drill) { d.Status.Epoch = 2 },
		"which has ended it already": func(d *api.Drill) { d.Status.Ended = &api.DrillEnd{PID: 1} },
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t, false)
			id, was := e.running(canary())
			e.stop()
			e.drill(id, change)
			for range 3 {
				if _, err := e.h.reconcile(t.Context(), id); err != nil {
					t.Fatal(err)
				}
			}
			if vm := e.vm(id); vm.Status.PID != was.Status.PID || vm.Status.Tries != nil {
				t.Errorf("%+v", vm.Status)
			}
		})
	}
}

// QEMU ends by itself, or somebody else ends it, a moment before the kill.
func TestAnEndThatIsNotTheDrillsGivesNothingUp(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.asked()
	e.clock.hold()
	e.fakes.qemu().Exit(-1, 11)
	e.begin()
	vm := e.wait(id, "crashed", crashed(1))
	if vm.Status.Tries != nil && vm.Status.Tries.GivenUp || e.drillOf(id).Status.Ended != nil {
		t.Errorf("%+v", vm.Status)
	}
}

// What a daemon that died sent lands when the VM has been started again.
func TestALateWordOfADrillConflictsWithAStart(t *testing.T) {
	e := newEnv(t, false)
	id, was := e.asked()
	must(t, e.guard.Kill(t.Context(), id))
	v := e.db.Local()
	vm, err := configdb.VMs.Get(v, id)
	must(t, err)
	late := &configdb.Txn{}
	vm.Status.Tries = &api.VMTries{Epoch: 1, Generation: vm.Meta.Generation, GivenUp: true, Drill: true}
	must(t, configdb.VMs.UpdateStatus(v, late, &vm))
	// The drill is over, and the next daemon starts the VM.
	e.setDrill(id, func(d *api.Drill) { d.Status.Phase = api.TaskFailed })
	e.begin()
	e.wait(id, "runs again", func(vm api.VM) bool {
		return vm.Status.Phase == api.VMRunning && vm.Status.PID != 0 && vm.Status.PID != was.Status.PID
	})
	if _, err := e.db.Txn(t.Context(), late); err == nil {
		t.Error("a VM that runs was given up")
	}
}

func (e *env) setDrill(id string, f func(*api.Drill)) {
	e.t.Helper()
	v, tx := e.db.Local(), &configdb.Txn{}
	d, err := configdb.Drills.Get(v, id)
	must(e.t, err)
	f(&d)
	must(e.t, configdb.Drills.UpdateStatus(v, tx, &d))
	e.commit(tx)
}
