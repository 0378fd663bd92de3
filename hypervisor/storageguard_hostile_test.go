// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"errors"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// fenced is a fence of a pool.
func fenced(pool string) func([]api.StorageFence) []api.StorageFence {
	return func([]api.StorageFence) []api.StorageFence {
		return []api.StorageFence{{ID: "f", PoolID: pool, Pool: "local", Reason: "silent"}}
	}
}

// What the database says of a VM that was moved away is not what its old QEMU has open.
func TestAnOldQEMUStandsInTheWayWhateverBecameOfItsVM(t *testing.T) {
	e := newEnv(t, false)
	pool := e.guardedPool(map[string][]string{"node-1": {"10.0.0.1"}})
	id, _ := e.running(api.VMSpec{HA: api.HARestart})
	e.spared(id, pool)
	e.stop()
	e.fence(fenced(pool))
	e.rebind(id, "node-2", 2)
	_, err := configdb.Transact(t.Context(), e.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
		vm, err := configdb.VMs.Get(v, id)
		if err != nil {
			return err
		}
		vm.Spec.Disks = nil // its new owner has let go of the disk
		vm.Status = api.VMStatus{Phase: api.VMRunning, Node: "node-2", Epoch: 2, Hardware: &api.VMSpec{}}
		return errors.Join(configdb.VMs.UpdateSpec(v, tx, &vm), configdb.VMs.UpdateStatus(v, tx, &vm))
	})
	must(t, err)
	left, err := e.h.Quiet(t.Context(), pool)
	if err != nil || !strings.Contains(left, "web1") {
		t.Fatalf("an old QEMU has the disk open, and nothing is said to be left: %q, %v", left, err)
	}
}

// A promise that was sent and not answered must not land after the guard has let go.
func TestAPromiseThatWasTakenBackCannotLandLate(t *testing.T) {
	e := newEnv(t, false)
	pool := e.guardedPool(map[string][]string{"node-1": {"10.0.0.1"}})
	id, _ := e.running(api.VMSpec{HA: api.HARestart})
	e.spared(id, pool)
	e.stop() // after the guard kills it again, and the word that it is no more guarded was sent
	e.guard.mu.Lock()
	e.guard.procs[id].Protected = true
	e.guard.mu.Unlock()
	late := &configdb.Txn{}
	b := e.binding(id)
	b.Spec.StorageGuard = nil
	must(t, configdb.Bindings.UpdateSpec(e.db.Local(), late, &b))
	e.begin()
	e.spared(id, pool)
	if _, err := e.db.Txn(t.Context(), late); !errors.Is(err, configdb.ErrConflict) {
		t.Fatalf("the binding says that the guard kills it, which it does not: %v", err)
	}
}

// A node that is locked out while a guest is on its way there does not take it.
func TestAGuestDoesNotMoveToANodeThatIsLockedOut(t *testing.T) {
	p := newPair(t, false)
	pool := p.guardedPool(map[string][]string{"node-1": {"10.0.0.1"}, "node-2": {"10.0.0.2"}})
	id := p.begun(api.VMSpec{HA: api.HARestart})
	q := p.fakes.qemu()
	q.Hold()
	p.migrate(id, nil)
	p.atStep("active")
	p.other.fence(fenced(pool))
	p.other.h.Wake()
	q.Release()
	p.over(id, "locked out of pool local")
	p.settled(id, "node-1")
	if n := p.guard.startCount(); n != 1 {
		t.Fatalf("%d starts at the source: the guest did not go on", n)
	}
}

// The VM was elsewhere in between, where its guest may have run.
func TestAQEMUOfAnEarlierBindingIsNotAdopted(t *testing.T) {
	e := newEnv(t, false)
	id, was := e.running(api.VMSpec{})
	e.rebind(id, "node-1", 5)
	vm := e.wait(id, "started anew", func(vm api.VM) bool {
		return vm.Status.Epoch == 5 && vm.Status.Phase == api.VMRunning && vm.Status.PID != was.Status.PID
	})
	if p, ok := e.guard.get(id); !ok || p.Epoch != 5 || p.PID != vm.Status.PID {
		t.Fatalf("process %+v", p)
	}
}
