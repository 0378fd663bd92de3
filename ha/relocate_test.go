// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// tries is what a daemon knows of its attempts to start VMs. It handles one VM
// once at a time.
type tries struct {
	life    int // of the host
	busy    map[string]bool
	pending map[string]bool // sent to the guard
	failed  map[string]bool // and came to nothing
}

func (n *simNode) newDaemon() *tries {
	return &tries{life: n.life, busy: map[string]bool{}, pending: map[string]bool{}, failed: map[string]bool{}}
}

// tryStart is what the hypervisor module does for a VM whose starts are counted.
func (n *simNode) tryStart(b *api.Binding, session uint64) {
	if n.tries == nil || n.tries.life != n.life {
		n.tries = n.newDaemon()
	}
	t, id := n.tries, b.Meta.ID
	if t.busy[id] || t.pending[id] {
		return
	}
	t.busy[id] = true
	defer delete(t.busy, id)
	vm, err := configdb.VMs.Get(n.view, id)
	must(n.w.t, err)
	now := api.TriesOf(&vm, b.Spec.Epoch)
	switch {
	case t.failed[id]:
		if now.Failed++; now.Failed >= 2 {
			now.GivenUp = true
			now.Nodes = append(now.Nodes, n.id)
		}
		if n.noteTries(b, &vm, now) {
			delete(t.failed, id)
		}
		return
	case now.GivenUp:
		return
	}
	now.Begun++
	if n.w.off != startIsCommitted && !n.noteTries(b, &vm, now) {
		return
	}
	t.pending[id] = true
	n.w.after(n.w.upTo(3*time.Second), func() {
		if t != n.tries || t.life != n.life {
			return // the guard refuses what an earlier daemon sent
		}
		delete(t.pending, id)
		if n.w.rng.IntN(2) == 0 {
			t.failed[id] = true
			return
		}
		n.start(session, id)
	})
}

// noteTries commits, unless the daemon is killed: then what it sent may land late,
// and the next daemon goes on meanwhile.
func (n *simNode) noteTries(b *api.Binding, vm *api.VM, t api.VMTries) bool {
	v, tx, daemon := n.view, &configdb.Txn{}, n.tries
	killed := n.w.rng.IntN(8) == 0
	if killed {
		n.tries = n.newDaemon()
	}
	vm.Status.Tries = &t
	if n.w.off != startNeedsBinding {
		tx.RequireRevision(configdb.Bindings.SpecKey(vm.Meta.ID), b.Meta.Revision)
	}
	must(n.w.t, configdb.VMs.UpdateStatus(v, tx, vm))
	if killed {
		n.w.meanwhile(1, 60)
	}
	_, err := n.Txn(context.Background(), tx)
	return err == nil && n.tries == daemon && daemon.life == n.life
}

// giveUp is the owner's word for a VM.
func (w *world) giveUp(b *api.Binding, change func(*api.VMTries)) {
	w.t.Helper()
	w.setVM(b.Meta.ID, func(vm *api.VM) {
		now := time.Now()
		t := api.TriesOf(vm, b.Spec.Epoch)
		t.Failed, t.GivenUp, t.At, t.Nodes = 3, true, &now, append(t.Nodes, b.Spec.NodeID)
		if change != nil {
			change(&t)
		}
		vm.Status.Tries, vm.Status.Phase, vm.Status.Message = &t, api.VMFailed, "no such device"
	})
}

func (w *world) relocated(b *api.Binding) (api.Binding, api.VM) {
	w.t.Helper()
	_, err := w.nodes[0].svc.relocate(context.Background(), 1)
	must(w.t, err)
	got, err := configdb.Bindings.Get(w.mem.Local(), b.Meta.ID)
	must(w.t, err)
	vm, err := configdb.VMs.Get(w.mem.Local(), b.Meta.ID)
	must(w.t, err)
	return got, vm
}

func TestAVMThatWasGivenUpGoesAroundAndRests(t *testing.T) {
	w := chaosFree(t)
	b := w.bindingOn(3)
	if got, _ := w.relocated(&b); got.Spec.Epoch != 1 {
		t.Fatal("a VM that nobody gave up was moved")
	}
	seen := map[string]bool{}
	for i := range len(w.nodes) {
		if seen[b.Spec.NodeID] {
			t.Fatalf("it came to a node twice, after %d", i)
		}
		w.nodes[0].svc.grant.begin(1)
		for _, n := range w.nodes {
			_, err := w.nodes[0].svc.grant.renew(context.Background(), n.id) // all of them live
			must(t, err)
		}
		seen[b.Spec.NodeID] = true
		w.giveUp(&b, nil)
		got, vm := w.relocated(&b)
		last := i == len(w.nodes)-1
		switch tr := vm.Status.Tries; {
		case !last && (got.Spec.Epoch != b.Spec.Epoch+1 || vm.Status.Phase != api.VMStarting || len(tr.Nodes) != i+1 || tr.Failed != 0):
			t.Fatalf("after %d nodes: %+v, %+v", i+1, got.Spec, vm.Status)
		case last && (got.Spec.Epoch != b.Spec.Epoch || tr.GivenUp || tr.Rounds != 1 || len(tr.Nodes) != 0):
			t.Fatalf("after all nodes: %+v, %+v", got.Spec, tr)
		}
		b = got
	}
	w.giveUp(&b, nil)
	if got, _ := w.relocated(&b); got.Spec.Epoch != b.Spec.Epoch {
		t.Error("the next round began at once")
	}
	w.giveUp(&b, func(tr *api.VMTries) { at := time.Now().Add(-2 * roundPause); tr.At = &at })
	if got, _ := w.relocated(&b); got.Spec.Epoch != b.Spec.Epoch+1 {
		t.Error("the next round does not begin after its pause")
	}
}

func TestAVMIsNotPassedOnWhen(t *testing.T) {
	for name, change := range map[string]func(w *world, b *api.Binding){
		"its word is of an earlier epoch": func(w *world, b *api.Binding) { w.giveUp(b, func(t *api.VMTries) { t.Epoch-- }) },
		"there is a new wish":             func(w *world, b *api.Binding) { w.giveUp(b, func(t *api.VMTries) { t.Generation++ }) },
		"it is to be stopped": func(w *world, b *api.Binding) {
			w.giveUp(b, nil)
			w.change(func(v *configdb.View, tx *configdb.Txn) error {
				vm, err := configdb.VMs.Get(v, b.Meta.ID)
				vm.Spec.Power = api.PowerStopped
				return errors.Join(err, configdb.VMs.UpdateSpec(v, tx, &vm))
			})
		},
		"something works on it": func(w *world, b *api.Binding) {
			w.giveUp(b, nil)
			w.change(func(_ *configdb.View, tx *configdb.Txn) error {
				op := api.Operation{Meta: api.NewMeta(api.KindOperation, "", "v")}
				op.Meta.ID = b.Meta.ID
				return configdb.Operations.CreateUnnamed(tx, &op)
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := chaosFree(t)
			b := w.bindingOn(3)
			change(w, &b)
			if got, _ := w.relocated(&b); got.Spec.Epoch != 1 {
				t.Errorf("it was moved: %+v", got.Spec)
			}
		})
	}
}

// The owner begins a start while the leader decides.
func TestAStartThatBeginsKeepsTheVM(t *testing.T) {
	w := chaosFree(t)
	leader, b := w.nodes[0], w.bindingOn(3)
	w.giveUp(&b, nil)
	leader.svc.placer = interruptedPlacer{leader.svc.placer, func() {
		w.setVM(b.Meta.ID, func(vm *api.VM) { vm.Status.Tries.GivenUp = false; vm.Status.Tries.Begun++ })
	}}
	if got, _ := w.relocated(&b); got.Spec.Epoch != 1 {
		t.Error("a VM that is being started was moved")
	}
}
