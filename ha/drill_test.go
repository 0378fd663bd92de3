// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/ha/plan"
	"github.com/muster-vm/muster/internal/proof"
)

// actDrill is what the hypervisor module does for drills: now and then it has the guard
// end a VM, and once that is reaped it gives the VM up.
func (n *simNode) actDrill(b *api.Binding, running bool, kill time.Duration) bool {
	id := b.Meta.ID
	if n.drilled == nil {
		n.drilled = map[string]int{}
	}
	if life, ok := n.drilled[id]; ok && life != n.life {
		delete(n.drilled, id)
	}
	_, ended := n.drilled[id]
	switch {
	case running && !ended && kill == 0 && n.w.rng.IntN(400) == 0:
		n.drilled[id] = n.life
		n.running[id] = n.w.now + n.w.killTime()
	case ended && (!running || n.w.off == drillEndsFirst):
		vm, err := configdb.VMs.Get(n.view, id)
		must(n.w.t, err)
		if n.tries == nil || n.tries.life != n.life {
			n.tries = n.newDaemon()
		}
		n.w.putDrill(b, api.DrillStatus{Phase: api.TaskRunning, Ended: &api.DrillEnd{PID: 1}, Failover: api.NewID()})
		now := api.TriesOf(&vm, b.Spec.Epoch)
		now.GivenUp, now.Drill = true, true
		if n.noteTries(b, &vm, now) {
			n.w.drills++
		}
		// Whether that landed or not: another daemon finds no word of the guard.
		delete(n.drilled, id)
	default:
		return false
	}
	return true
}

// putDrill is the drill of a VM as it stands.
func (w *world) putDrill(b *api.Binding, s api.DrillStatus) {
	w.t.Helper()
	w.change(func(v *configdb.View, tx *configdb.Txn) error {
		d, err := configdb.Drills.Get(v, b.Meta.ID)
		if err == nil {
			configdb.Drills.DeleteUnnamed(tx, &d)
			if _, err := w.mem.Txn(context.Background(), tx); err != nil {
				return err
			}
			*tx = configdb.Txn{}
		}
		d = api.Drill{Meta: api.NewMeta(api.KindDrill, "", "v"), Spec: api.DrillSpec{NodeID: b.Spec.NodeID, Epoch: b.Spec.Epoch, Generation: 1}, Status: s}
		d.Meta.ID = b.Meta.ID
		return configdb.Drills.CreateUnnamed(tx, &d)
	})
}

func (w *world) drillOf(b *api.Binding) api.Drill {
	w.t.Helper()
	d, err := configdb.Drills.Get(w.mem.Local(), b.Meta.ID)
	must(w.t, err)
	return d
}

// drilled is a VM that its owner gave up for a drill.
func (w *world) drilled(b *api.Binding, change func(*api.DrillStatus)) {
	w.t.Helper()
	at := time.Now().UTC()
	var n api.Node
	w.change(func(v *configdb.View, tx *configdb.Txn) (err error) {
		n, err = configdb.Nodes.Get(v, b.Spec.NodeID)
		return err
	})
	f := api.NewFailover(&n, api.CauseDrill, at)
	end := api.DrillEnd{PID: 4, Reason: "kill request", Signal: 9, At: at}
	f.Spec.Drill = &api.FailoverDrill{VMID: b.Meta.ID, VM: "v", DrillEnd: end}
	w.change(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Failovers.CreateUnnamed(tx, &f) })
	s := api.DrillStatus{Phase: api.TaskRunning, PID: 4, Ended: &end, Failover: f.Meta.ID}
	if change != nil {
		change(&s)
	}
	w.putDrill(b, s)
	w.giveUp(b, func(t *api.VMTries) { t.Drill, t.Failed, t.Nodes = true, 0, nil })
}

func TestADrillMovesAVMWithEvidenceThatHolds(t *testing.T) {
	w := chaosFree(t)
	b := w.bindingOn(3)
	w.drilled(&b, nil)
	got, vm := w.relocated(&b)
	d := w.drillOf(&b)
	if got.Spec.Epoch != b.Spec.Epoch+1 || got.Spec.NodeID == b.Spec.NodeID || vm.Status.Tries != nil || vm.Status.Phase != api.VMStarting || d.Status.Epoch != got.Spec.Epoch || d.Status.NodeID != got.Spec.NodeID {
		t.Fatalf("%+v, %+v, %+v", got.Spec, vm.Status, d.Status)
	}
	all := w.proofs()
	if len(all) != 1 || len(all[0].Moves) != 1 {
		t.Fatalf("%+v", all)
	}
	if v := proof.Check(all[0]); !v.OK {
		t.Errorf("%+v", v)
	}
	all[0].Failover.Spec.Drill.Reason = "lease"
	if v := proof.Check(all[0]); v.OK {
		t.Error("a VM that the guard did not end for it may move in a drill")
	}
	if o := got.Spec.Origin(); o == nil || o.NodeID != b.Spec.NodeID {
		t.Errorf("it does not know where it was: %+v", o)
	}
}

func TestADrillIsTakenBackWhen(t *testing.T) {
	for name, change := range map[string]func(s *api.DrillStatus){
		"it is over":           func(s *api.DrillStatus) { s.Phase = api.TaskFailed },
		"it was moved before":  func(s *api.DrillStatus) { s.Epoch = 2 },
		"its end is not known": func(s *api.DrillStatus) { s.Ended = nil },
	} {
		t.Run(name, func(t *testing.T) {
			w := chaosFree(t)
			b := w.bindingOn(3)
			w.drilled(&b, change)
			if got, vm := w.relocated(&b); got.Spec.Epoch != b.Spec.Epoch || vm.Status.Tries != nil {
				t.Errorf("%+v, %+v", got.Spec, vm.Status)
			}
		})
	}
}

func TestADrillWithoutAnotherNodeIsTakenBack(t *testing.T) {
	w := chaosFree(t)
	b := w.bindingOn(3)
	w.nodes[0].svc.placer = fullPlacer{w.nodes[0].svc.placer}
	w.drilled(&b, nil)
	got, vm := w.relocated(&b)
	if d := w.drillOf(&b); got.Spec.Epoch != b.Spec.Epoch || vm.Status.Tries != nil || d.Status.Refusal == "" || d.Status.Epoch != 0 {
		t.Errorf("%+v, %+v, %+v", got.Spec, vm.Status, d.Status)
	}
}

// fullPlacer has no room anywhere.
type fullPlacer struct{ Placer }

func (p fullPlacer) Load(s *plan.State) (plan.Fleet, error) {
	f, err := p.Placer.Load(s)
	return fullFleet{f}, err
}

type fullFleet struct{ plan.Fleet }

func (fullFleet) Choose(*api.VM, map[string]string, bool) (string, string, error) {
	return "", "", api.Errorf(api.CodeUnplaceable, "no node has room")
}
