// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

type drillKit struct {
	*failbackKit
	d    *drills
	full bool // no other node has room
	kept bool // the promise to survive failures
}

func (k *drillKit) ChooseOther(*configdb.View, api.VM, map[string]string, string, []string) (string, string, error) {
	if k.full {
		return "", "", api.Errorf(api.CodeUnplaceable, "no node has room")
	}
	return "n2", "m2", nil
}

type drillPlacer struct {
	oneTarget
	k *drillKit
}

func (p drillPlacer) ChooseOther(v *configdb.View, vm api.VM, exclude map[string]string, only string, copied []string) (string, string, error) {
	return p.k.ChooseOther(v, vm, exclude, only, copied)
}

func newDrillKit(t *testing.T) *drillKit {
	k := &drillKit{failbackKit: newFailbackKit(t), kept: true}
	k.clock = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC) // a Sunday
	promise := func() (api.HAAdmission, time.Duration, bool) {
		return api.HAAdmission{HASettings: api.HASettings{Failures: 1, Admission: api.AdmissionWarn}, Kept: k.kept}, 0, true
	}
	k.d = newDrills(k.db, drillPlacer{k: k}, 1, promise, func(id string) time.Duration { return k.quiet[id] }, slog.New(slog.NewTextHandler(t.Output(), nil)))
	k.d.now = func() time.Time { return k.clock }
	return k
}

// canary makes a protected VM on m1 that is drilled.
func (k *drillKit) canary(name, drill string) string {
	id := k.vm(name, api.PowerRunning)
	k.set(id, func(vm *api.VM, b *api.Binding) {
		vm.Spec.HA, vm.Spec.Recovery = api.HARestart, &api.VMRecovery{Drill: drill}
		b.Spec.Protected = true
	})
	return id
}

func (k *drillKit) set(id string, f func(*api.VM, *api.Binding)) {
	k.Helper()
	k.do(func(v *configdb.View, tx *configdb.Txn) error {
		vm, err := configdb.VMs.Get(v, id)
		b, berr := configdb.Bindings.Get(v, id)
		if err = errors.Join(err, berr); err != nil {
			return err
		}
		f(&vm, &b)
		err = errors.Join(configdb.VMs.UpdateSpec(v, tx, &vm), configdb.Bindings.UpdateSpec(v, tx, &b))
		return errors.Join(err, configdb.VMs.UpdateStatus(v, tx, &vm))
	})
}

// at looks at a time, and once more.
func (k *drillKit) at(d time.Duration) {
	k.Helper()
	k.clock = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC).Add(d)
	for range 2 {
		if err := k.d.look(context.Background()); err != nil {
			k.Fatal(err)
		}
	}
}

func (k *drillKit) drill(id string) *api.Drill {
	k.Helper()
	d, err := configdb.Drills.Get(k.db.Local(), id)
	if api.IgnoreNotFound(err) != nil {
		k.Fatal(err)
	}
	if err != nil {
		return nil
	}
	return &d
}

// answers changes the drill as others do.
func (k *drillKit) answers(id string, f func(*api.Drill)) {
	k.Helper()
	k.do(func(v *configdb.View, tx *configdb.Txn) error {
		d, err := configdb.Drills.Get(v, id)
		if err != nil {
			return err
		}
		f(&d)
		return errors.Join(configdb.Drills.UpdateSpec(v, tx, &d), configdb.Drills.UpdateStatus(v, tx, &d))
	})
}

func (k *drillKit) said(typ string) (n int) {
	k.Helper()
	all, err := configdb.Events.List(k.db.Local())
	if err != nil {
		k.Fatal(err)
	}
	for i := range all {
		if all[i].Spec.Type == typ {
			n++
		}
	}
	return n
}

func TestDrillsBeginWhenTheyAreDue(t *testing.T) {
	k := newDrillKit(t)
	daily, weekly, byHand := k.canary("a", "daily 13:00"), k.canary("b", "weekly mon 03:30"), k.canary("c", api.DrillManual)
	past := k.canary("d", "daily 11:45")
	k.at(0)
	k.at(59 * time.Minute)
	for _, id := range []string{daily, weekly, byHand, past} {
		if d := k.drill(id); d != nil {
			t.Fatalf("too early, or of a time before it had a schedule: %+v", d.Spec)
		}
	}
	k.at(time.Hour + time.Minute)
	d := k.drill(daily)
	if d == nil || d.Spec.Due == nil || d.Spec.Due.Hour() != 13 || d.Spec.NodeID != "n1" || d.Spec.Epoch != 1 || d.Status.Phase != api.TaskPending {
		t.Fatalf("%+v", d)
	}
	if _, err := configdb.Tasks.Get(k.db.Local(), d.Spec.TaskID); err != nil {
		t.Error(err)
	}
	k.answers(daily, func(d *api.Drill) { d.Status.Phase = api.TaskSucceeded })
	k.at(2 * time.Hour)
	if again := k.drill(daily); again.Spec.TaskID != d.Spec.TaskID {
		t.Error("it was drilled twice for one time")
	}
	k.at(15*time.Hour + 31*time.Minute) // Monday, 03:31
	if d := k.drill(weekly); d == nil || d.Status.Phase != api.TaskPending {
		t.Errorf("%+v", d)
	}
	if k.drill(byHand) != nil {
		t.Error("nobody asked for it")
	}
}

func TestADrillThatCannotBeIsLeftOutAfterAnHour(t *testing.T) {
	for name, bad := range map[string]func(k *drillKit, id string, on bool){
		"a node in maintenance": func(k *drillKit, _ string, on bool) { k.node("n2", func(n *api.Node) { n.Spec.Maintenance = on }) },
		"a silent node": func(k *drillKit, _ string, on bool) {
			delete(k.quiet, "n2")
			if on {
				k.quiet["n2"] = 6 * time.Second
			}
		},
		"no room":    func(k *drillKit, _ string, on bool) { k.full = on },
		"no promise": func(k *drillKit, _ string, on bool) { k.kept = !on },
		"not protected by now": func(k *drillKit, id string, on bool) {
			k.set(id, func(_ *api.VM, b *api.Binding) { b.Spec.Protected = !on })
		},
	} {
		t.Run(name, func(t *testing.T) {
			k := newDrillKit(t)
			id := k.canary("a", "daily 13:00")
			k.at(0)
			bad(k, id, true)
			k.at(90 * time.Minute)
			if d := k.drill(id); d != nil {
				t.Fatalf("%+v", d)
			}
			k.at(2*time.Hour + time.Minute)
			d := k.drill(id)
			if d == nil || d.Status.Phase != api.TaskCancelled || !strings.Contains(d.Status.Message, "left out") || k.said(eventDrillLeftOut) != 1 {
				t.Fatalf("%+v, %d events", d, k.said(eventDrillLeftOut))
			}
			k.at(2*time.Hour + 30*time.Minute)
			if k.said(eventDrillLeftOut) != 1 {
				t.Error("it was said twice")
			}
			bad(k, id, false)
			k.at(25 * time.Hour)
			if d := k.drill(id); d.Status.Phase != api.TaskPending {
				t.Errorf("the next one: %+v", d.Status)
			}
		})
	}
}

// The next leader makes up for what the last one did not begin.
func TestTheNextLeaderGoesOnWithTheSchedule(t *testing.T) {
	k := newDrillKit(t)
	id := k.canary("a", "daily 13:00")
	k.at(0)
	k.at(time.Hour)
	k.answers(id, func(d *api.Drill) { d.Status.Phase = api.TaskFailed })
	task := k.drill(id).Spec.TaskID
	k.d.seen, k.d.looked = map[string]time.Time{}, time.Time{}
	k.at(time.Hour + time.Minute)
	if k.drill(id).Spec.TaskID != task {
		t.Fatal("drilled twice for one time")
	}
	k.d.seen, k.d.looked = map[string]time.Time{}, time.Time{}
	k.at(25*time.Hour + 20*time.Minute)
	if d := k.drill(id); d.Spec.TaskID == task || d.Status.Phase != api.TaskPending {
		t.Errorf("%+v", d)
	}
}

func TestTheLastWordOfADrill(t *testing.T) {
	type world struct {
		*drillKit
		id string
	}
	moved := func(w world, phase api.FailoverMovePhase) {
		w.set(w.id, func(vm *api.VM, b *api.Binding) {
			b.Spec.NodeID, b.Spec.Node, b.Spec.Epoch = "n2", "m2", 2
			vm.Status.Tries = nil
		})
		at := w.clock
		w.answers(w.id, func(d *api.Drill) {
			d.Status.Node, d.Status.Epoch, d.Status.MovedAt, d.Status.Failover = "m2", 2, &at, "f"
			d.Status.Ended = &api.DrillEnd{PID: 7, At: at.Add(-time.Second)}
		})
		w.do(func(v *configdb.View, tx *configdb.Txn) error {
			vm, err := configdb.VMs.Get(v, w.id)
			m := api.NewFailoverMove("f", &vm, at)
			m.Status.Phase, m.Status.At = phase, &at
			return errors.Join(err, configdb.FailoverMoves.CreateUnnamed(tx, &m))
		})
	}
	ended := func(w world) {
		w.answers(w.id, func(d *api.Drill) { d.Status.Ended = &api.DrillEnd{PID: 7, At: w.clock} })
		w.set(w.id, func(vm *api.VM, _ *api.Binding) {
			vm.Status.Tries = &api.VMTries{Epoch: 1, Generation: vm.Meta.Generation, GivenUp: true, Drill: true}
		})
	}
	for name, c := range map[string]struct {
		do    func(w world)
		wait  time.Duration
		phase api.TaskPhase // "": none yet
		words string
	}{
		"nothing yet":            {func(world) {}, 29 * time.Second, "", ""},
		"the owner is silent":    {func(world) {}, 31 * time.Second, api.TaskFailed, "did not end it"},
		"ended, not moved yet":   {ended, time.Minute, "", ""},
		"taken back":             {func(w world) { ended(w); w.set(w.id, func(vm *api.VM, _ *api.Binding) { vm.Status.Tries = nil }) }, 0, api.TaskFailed, "nobody bound it"},
		"refused":                {func(w world) { w.answers(w.id, func(d *api.Drill) { d.Status.Refusal = "full" }) }, 0, api.TaskFailed, "no other node could take it: full"},
		"cancelled":              {func(w world) { ended(w); w.answers(w.id, func(d *api.Drill) { d.Spec.Cancel = true }) }, 0, api.TaskCancelled, "stays on node m1"},
		"the owner is lost":      {func(w world) { w.node("n1", func(n *api.Node) { n.Status.Phase = api.NodeLost }) }, 0, api.TaskFailed, "not ready any more"},
		"another wish":           {func(w world) { w.set(w.id, func(vm *api.VM, _ *api.Binding) { vm.Spec.CPUs++ }) }, 0, api.TaskFailed, "changed"},
		"moved by somebody else": {func(w world) { w.set(w.id, func(_ *api.VM, b *api.Binding) { b.Spec.Epoch = 2 }) }, 0, api.TaskFailed, "by somebody else"},
		"it runs":                {func(w world) { moved(w, api.MoveRunning) }, 0, api.TaskSucceeded, "from node m1 to node m2"},
		"it starts":              {func(w world) { moved(w, api.MoveBound) }, 4 * time.Minute, "", ""},
		"it does not start":      {func(w world) { moved(w, api.MoveFailing) }, 6 * time.Minute, api.TaskFailed, "does not run on node m2"},
		"it was stopped":         {func(w world) { moved(w, api.MoveStopped) }, 0, api.TaskFailed, "stopped"},
		"the new node is lost": {func(w world) {
			moved(w, api.MoveBound)
			w.set(w.id, func(_ *api.VM, b *api.Binding) { b.Spec.Epoch = 3 })
		}, 0, api.TaskFailed, "did not run on node m2"},
	} {
		t.Run(name, func(t *testing.T) {
			k := newDrillKit(t)
			w := world{k, k.canary("a", "daily 13:00")}
			k.at(0)
			k.at(time.Hour)
			c.do(w)
			k.at(time.Hour + c.wait)
			d := k.drill(w.id)
			if c.phase == "" {
				if d.Status.Over() {
					t.Fatalf("%+v", d.Status)
				}
				return
			}
			if d.Status.Phase != c.phase || !strings.Contains(d.Status.Message, c.words) || d.Status.DoneAt == nil {
				t.Fatalf("%+v", d.Status)
			}
			vm, err := configdb.VMs.Get(k.db.Local(), w.id)
			if err != nil || vm.Status.Tries != nil && vm.Status.Tries.GivenUp {
				t.Errorf("the VM stays given up: %+v, %v", vm.Status, err)
			}
			if n := k.said(eventDrillFailed) + k.said(eventDrillSucceeded) + k.said(eventDrillLeftOut); n != 1 {
				t.Errorf("%d events", n)
			}
			if ok := d.Status.SucceededAt != nil; ok != (c.phase == api.TaskSucceeded) || ok && d.Status.Took() != time.Second {
				t.Errorf("%+v, took %v", d.Status, d.Status.Took())
			}
		})
	}
}
