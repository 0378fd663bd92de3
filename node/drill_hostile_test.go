// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/rest"
)

func (k *drillKit) schedule(id, drill string) {
	k.Helper()
	k.set(id, func(vm *api.VM, _ *api.Binding) { vm.Spec.Recovery = &api.VMRecovery{Drill: drill} })
}

// byHand begins a drill at a node whose clock differs from the leader's.
func (k *drillKit) byHand(id string, skew time.Duration, known bool) (err error) {
	k.Helper()
	k.do(func(v *configdb.View, tx *configdb.Txn) error {
		vm, e := configdb.VMs.Get(v, id)
		if e != nil {
			return e
		}
		promise := func() (api.HAAdmission, time.Duration, bool) {
			return api.HAAdmission{HASettings: api.HASettings{Failures: 1, Admission: api.AdmissionWarn}, Kept: known}, 0, known
		}
		_, err = rest.Drill{Placer: drillPlacer{k: k}, Actor: "somebody", Now: k.clock.Add(skew), Promise: promise}.Begin(v, tx, &vm)
		return nil
	})
	return err
}

// It was taken away before its time, and given again after it.
func TestAScheduleThatIsSetAgainAfterItsTimeDrillsNothingYet(t *testing.T) {
	k := newDrillKit(t)
	id := k.canary("a", "daily 13:00")
	k.at(0)
	k.schedule(id, api.DrillManual)
	k.at(70 * time.Minute)
	k.schedule(id, "daily 13:00")
	k.at(80 * time.Minute)
	if d := k.drill(id); d != nil {
		t.Errorf("at 13:20 it is drilled for 13:00, when it was not to be: %+v", d.Spec)
	}
}

// The same by its last drill, however long ago that was.
func TestAnOldDrillDoesNotMakeAScheduleOld(t *testing.T) {
	k := newDrillKit(t)
	id := k.canary("a", "daily 13:00")
	k.at(0)
	k.at(time.Hour)
	k.answers(id, func(d *api.Drill) { d.Status.Phase = api.TaskFailed })
	task := k.drill(id).Spec.TaskID
	k.schedule(id, api.DrillManual)
	k.d.seen, k.d.looked = map[string]time.Time{}, time.Time{} // another leader
	k.at(30*24*time.Hour + 70*time.Minute)
	k.schedule(id, "daily 13:00")
	k.at(30*24*time.Hour + 80*time.Minute)
	if d := k.drill(id); d.Spec.TaskID != task {
		t.Errorf("it is drilled for a time when it was not to be: %+v", d.Spec)
	}
}

// Nobody led, or other drills went on.
func TestADrillIsNotBegunAfterItsHour(t *testing.T) {
	k := newDrillKit(t)
	id := k.canary("a", "daily 13:00")
	k.at(0)
	k.at(2*time.Hour + 30*time.Minute)
	if d := k.drill(id); d == nil || d.Status.Phase != api.TaskCancelled {
		t.Errorf("at 14:30 it is begun for 13:00: %+v", d)
	}
}

func TestTheClockOfWhoBeginsADrillDoesNotEndIt(t *testing.T) {
	k := newDrillKit(t)
	id := k.canary("a", api.DrillManual)
	k.at(0)
	if err := k.byHand(id, -time.Minute, true); err != nil {
		t.Fatal(err)
	}
	k.at(0)
	if d := k.drill(id); d.Status.Over() {
		t.Errorf("failed at once: %s", d.Status.Message)
	}
}

func TestTheClockOfWhoBeginsADrillDoesNotLockTheVM(t *testing.T) {
	k := newDrillKit(t)
	id := k.canary("a", api.DrillManual)
	k.at(0)
	if err := k.byHand(id, time.Hour, true); err != nil {
		t.Fatal(err)
	}
	k.at(0)
	k.at(59 * time.Minute)
	if d := k.drill(id); !d.Status.Over() {
		t.Error("after 59 minutes without an answer of the owner it is not over")
	}
}

// A daemon that has just begun has not computed it yet.
func TestADrillNeedsAKnownPromise(t *testing.T) {
	k := newDrillKit(t)
	id := k.canary("a", api.DrillManual)
	if err := k.byHand(id, 0, false); err == nil {
		t.Error("begun without knowing whether the promise holds")
	}
}

// The record of the move was pruned (more drills at once than are kept).
func TestADrillWhoseEvidenceIsGoneIsJudgedByTheVM(t *testing.T) {
	k := newDrillKit(t)
	id := k.canary("a", "daily 13:00")
	k.at(0)
	k.at(time.Hour)
	at := k.clock
	k.set(id, func(vm *api.VM, b *api.Binding) {
		b.Spec.NodeID, b.Spec.Node, b.Spec.Epoch = "n2", "m2", 2
		vm.Status.Node, vm.Status.Epoch, vm.Status.PID, vm.Status.Phase = "m2", 2, 9, api.VMRunning
	})
	k.answers(id, func(d *api.Drill) {
		d.Status.Node, d.Status.Epoch, d.Status.MovedAt, d.Status.Failover = "m2", 2, &at, "f"
		d.Status.Ended = &api.DrillEnd{PID: 7, At: at}
	})
	k.at(time.Hour + 6*time.Minute)
	if d := k.drill(id); d.Status.Phase == api.TaskFailed {
		t.Errorf("it runs on m2, and is said not to: %s", d.Status.Message)
	}
}

// The VM was deleted while the leader's replica was behind.
func TestALeftOutDrillOfADeletedVMLeavesNothing(t *testing.T) {
	k := newDrillKit(t)
	id := k.canary("a", "daily 13:00")
	k.at(0)
	old, vm := k.db.Local(), k.get(id)
	k.do(func(v *configdb.View, tx *configdb.Txn) error {
		now, err := configdb.VMs.Get(v, id)
		if err != nil {
			return err
		}
		b, err := configdb.Bindings.Get(v, id)
		configdb.VMs.Delete(tx, &now)
		configdb.Bindings.DeleteUnnamed(tx, &b)
		return err
	})
	k.full = true
	k.clock = k.clock.Add(2*time.Hour + time.Minute)
	if _, err := k.d.begin(context.Background(), old, &vm, k.clock.Add(-61*time.Minute), 61*time.Minute); err != nil {
		t.Fatal(err)
	}
	if d := k.drill(id); d != nil {
		t.Errorf("a drill that nothing removes, with its alert and its metrics: %+v", d.Spec)
	}
}
