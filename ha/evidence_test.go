// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/proof"
)

// prove checks the evidence of every loss that the world has seen.
func (w *world) prove() int {
	w.t.Helper()
	all := w.proofs()
	for _, p := range all {
		if v := proof.Check(p); !v.OK {
			w.t.Errorf("the evidence of a loss does not hold: %+v", v)
		}
	}
	return len(all)
}

func (w *world) proofs() (out []*api.FailoverProof) {
	w.t.Helper()
	losses, err := configdb.Failovers.List(w.mem.Local())
	must(w.t, err)
	for i := range losses {
		p, err := configdb.ProofOf(w.mem.Local(), losses[i])
		must(w.t, err)
		out = append(out, p)
	}
	return out
}

func TestALossLeavesEvidenceThatHolds(t *testing.T) {
	w := chaosFree(t)
	leader, ctx := w.nodes[0], context.Background()
	w.lose(3)
	_, err := leader.svc.recover(ctx, 1)
	must(t, err)
	all := w.proofs()
	if len(all) != 1 || len(all[0].Moves) != 1 {
		t.Fatalf("evidence: %+v", all)
	}
	f, m := all[0].Failover, all[0].Moves[0]
	silent := time.Duration(f.Spec.SilentMillis) * time.Millisecond
	if f.Spec.NodeID != w.nodes[3].id || f.Spec.Cause != api.CauseLease || f.Spec.Leader != "m0" || f.Spec.Term != 1 || silent < LostAfter || silent > LostAfter+2*time.Second {
		t.Errorf("evidence of the loss: %+v", f.Spec)
	}
	if m.Spec.FromNodeID != w.nodes[3].id || m.Spec.Epoch != 2 || m.Spec.Outcome != api.HARestarts || m.Status.Phase != api.MoveBound {
		t.Errorf("evidence of the move: %+v", m)
	}
	b, err := configdb.Bindings.Get(w.mem.Local(), m.Spec.VMID)
	must(t, err)
	if m.Meta.Revision != b.Meta.Revision || m.Spec.NodeID != b.Spec.NodeID {
		t.Errorf("the evidence is of revision %d, the move of %d", m.Meta.Revision, b.Meta.Revision)
	}
	if w.status(3).Failover != f.Meta.ID {
		t.Error("the lost node does not name its evidence")
	}
	must(t, leader.svc.readmit(ctx, 1, w.nodes[3].id))
	if f = w.proofs()[0].Failover; f.Status.ReadmittedAt == nil || f.Status.ReadmittedTerm != 1 || f.Meta.StatusRevision <= m.Meta.Revision {
		t.Errorf("evidence of the return: %+v", f)
	}
	if w.status(3).Failover != "" {
		t.Error("a node that is back names evidence")
	}
	w.prove()
}

func TestAPowerDevicesAnswersAreKept(t *testing.T) {
	w := powered(t)
	leader := w.nodes[0].svc
	w.pass(FenceAfter+time.Second, 3)
	leader.fenceSilent(1, inline)
	all := w.proofs()
	if len(all) != 1 || all[0].Failover.Spec.Cause != api.CausePower || len(all[0].Failover.Spec.Power.Steps) != 3 || all[0].Failover.Spec.Power.Action != w.actions()[0].Meta.ID {
		t.Fatalf("evidence: %+v", all)
	}
	w.prove()
}

// setVM changes the status of a VM as its owner would.
func (w *world) setVM(id string, change func(*api.VM)) {
	w.t.Helper()
	w.change(func(v *configdb.View, tx *configdb.Txn) error {
		vm, err := configdb.VMs.Get(v, id)
		if err != nil {
			return err
		}
		change(&vm)
		return configdb.VMs.UpdateStatus(v, tx, &vm)
	})
}

func TestTheWitnessNotesWhatBecomesOfAMove(t *testing.T) {
	w := chaosFree(t)
	ctx := context.Background()
	w.lose(3)
	_, err := w.nodes[0].svc.recover(ctx, 1)
	must(t, err)
	m := w.proofs()[0].Moves[0]
	wit := &witness{db: w.mem, term: 1, now: time.Now, open: map[string]map[string]bool{}}
	phase := func() api.FailoverMovePhase {
		t.Helper()
		must(t, wit.look(ctx, m.Meta.ID))
		got, err := configdb.FailoverMoves.Get(w.mem.Local(), m.Meta.ID)
		must(t, err)
		return got.Status.Phase
	}
	if p := phase(); p != api.MoveBound || len(wit.openOf(m.Spec.VMID)) != 1 {
		t.Errorf("before anything is reported: %s, open %v", p, wit.open)
	}
	w.setVM(m.Spec.VMID, func(vm *api.VM) { vm.Status.Phase, vm.Status.Message = api.VMFailed, "no such disk" })
	if p := phase(); p != api.MoveFailing || len(wit.openOf(m.Spec.VMID)) != 1 {
		t.Errorf("after a failed start: %s, open %v", p, wit.open)
	}
	w.setVM(m.Spec.VMID, func(vm *api.VM) { vm.Status.Phase, vm.Status.Epoch = api.VMRunning, 1 })
	if p := phase(); p == api.MoveRunning {
		t.Error("a report under the old epoch was taken for the new node's")
	}
	w.setVM(m.Spec.VMID, func(vm *api.VM) { vm.Status.Epoch = 2 })
	if p := phase(); p != api.MoveRunning || len(wit.openOf(m.Spec.VMID)) != 0 {
		t.Errorf("once it runs: %s, open %v", p, wit.open)
	}
	w.setVM(m.Spec.VMID, func(vm *api.VM) { vm.Status.Phase = api.VMStopped })
	if p := phase(); p != api.MoveRunning {
		t.Errorf("what is final has changed: %s", p)
	}
	w.prove()
}

func TestOldEvidenceGoesWithItsMoves(t *testing.T) {
	w := chaosFree(t)
	ctx := context.Background()
	const losses, each = api.KeptFailovers + 3, 3
	vm := api.VM{Meta: api.Meta{Name: "v"}}
	var ids []string
	for i := range losses {
		tx := &configdb.Txn{}
		f := api.NewFailover(&api.Node{}, api.CauseLease, time.Now())
		ids = append(ids, f.Meta.ID)
		must(t, configdb.Failovers.CreateUnnamed(tx, &f))
		for k := range each {
			vm.Meta.ID = fmt.Sprintf("vm%d-%d", i, k)
			m := api.NewFailoverMove(f.Meta.ID, &vm, time.Now())
			must(t, configdb.FailoverMoves.CreateUnnamed(tx, &m))
		}
		_, err := w.mem.Txn(ctx, tx)
		must(t, err)
	}
	wit := &witness{db: w.mem, term: 1, now: time.Now, open: map[string]map[string]bool{}}
	must(t, wit.prune(ctx))
	all := w.proofs()
	if len(all) != api.KeptFailovers || all[0].Failover.Meta.ID != ids[losses-api.KeptFailovers] || len(all[0].Moves) != each {
		t.Fatalf("%d losses are kept, the oldest with %d moves", len(all), len(all[0].Moves))
	}
	moves, err := configdb.FailoverMoves.List(w.mem.Local())
	must(t, err)
	if len(moves) != api.KeptFailovers*each {
		t.Errorf("%d moves are kept", len(moves))
	}
}

// Many drills push out no losses.
func TestDrillsArePrunedFirst(t *testing.T) {
	w := chaosFree(t)
	b := w.bindingOn(3)
	vm, err := configdb.VMs.Get(w.mem.Local(), b.Meta.ID)
	must(t, err)
	const drills = api.KeptDrills + 5
	for i := range drills + 1 {
		w.change(func(_ *configdb.View, tx *configdb.Txn) error {
			f := api.NewFailover(&api.Node{Meta: api.Meta{ID: w.nodes[3].id}}, api.CauseLease, time.Now())
			if f.Meta.ID = fmt.Sprintf("loss-%03d", i); i > 0 {
				f.Spec.Cause = api.CauseDrill
			}
			m := api.NewFailoverMove(f.Meta.ID, &vm, time.Now())
			if err := configdb.FailoverMoves.CreateUnnamed(tx, &m); err != nil {
				return err
			}
			return configdb.Failovers.CreateUnnamed(tx, &f)
		})
	}
	wit := &witness{db: w.mem, term: 1, now: time.Now, open: map[string]map[string]bool{}}
	must(t, wit.prune(context.Background()))
	all := w.proofs()
	// The newest is never removed, and counts besides.
	if len(all) != api.KeptDrills+2 || all[0].Failover.Meta.ID != "loss-000" || all[1].Failover.Meta.ID != "loss-005" {
		t.Fatalf("%d are kept, from %s, %s", len(all), all[0].Failover.Meta.ID, all[1].Failover.Meta.ID)
	}
	for _, p := range all {
		if len(p.Moves) != 1 {
			t.Errorf("%s has %d moves", p.Failover.Meta.ID, len(p.Moves))
		}
	}
}
