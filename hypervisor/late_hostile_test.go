// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// lateDB is a replica that can stand still.
type lateDB struct {
	configdb.DB
	old atomic.Pointer[configdb.View]
}

func (d *lateDB) Local() *configdb.View {
	if v := d.old.Load(); v != nil {
		return v
	}
	return d.DB.Local()
}

func (d *lateDB) standStill() { d.old.Store(d.DB.Local()) }
func (d *lateDB) goOn()       { d.old.Store(nil) }

// Work on several disks looked at the lease before each, but the lease may be another one
// by then: the VM ran elsewhere meanwhile, and what was written there was taken back.
func TestWorkOnDisksEndsWhenTheVMHasBeenElsewhere(t *testing.T) {
	e := newEnv(t, false)
	e.stop()
	late := &lateDB{DB: e.db}
	e.adapt = func(c *Config) { c.DB = late }
	e.begin()
	for name, c := range map[string]struct {
		meanwhile func(id string)
		touched   int
		err       error
	}{
		"nothing happens":    {func(string) {}, 2, nil},
		"the lease is lost":  {func(string) { e.guard.lease(0) }, 1, api.Errorf(api.CodeRefused, "")},
		"it is elsewhere":    {func(id string) { e.move(id, "node-2", 1) }, 1, errTaken},
		"it is back":         {func(id string) { e.move(id, e.node, 2) }, 1, errTaken},
		"a new lease":        {func(string) { e.guard.lease(7) }, 2, nil},
		"a late replica":     {func(id string) { late.standStill(); e.move(id, "node-2", 1); time.AfterFunc(unlockRetry, late.goOn) }, 1, errTaken},
		"late, but nothing":  {func(string) { late.standStill(); e.move("", "", 0); time.AfterFunc(unlockRetry, late.goOn) }, 2, nil},
		"late, and given up": {func(string) { late.standStill(); e.move("", "", 0) }, 1, context.DeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			defer func() { late.goOn(); e.guard.needs(0); e.guard.lease(1) }()
			id := e.createNamed(api.NewID(), e.node, api.VMSpec{Power: api.PowerStopped})
			disks := []api.SnapshotDisk{{Volume: "a", VolumeID: api.NewID()}, {Volume: "b", VolumeID: api.NewID()}}
			set := &diskSet{h: e.h, in: &instance{id: id}, epoch: e.binding(id).Spec.Epoch, disks: disks}
			most := patience
			if errors.Is(c.err, context.DeadlineExceeded) {
				most = 3 * time.Second
			}
			ctx, cancel := context.WithTimeout(t.Context(), most)
			defer cancel()
			touched := 0
			err := set.offline(ctx, disks, func(*configdb.View, string) error {
				if touched++; touched == 1 {
					c.meanwhile(id)
				}
				return nil
			})
			if touched != c.touched || !errors.Is(err, c.err) && api.CodeOf(err) != api.CodeOf(c.err) {
				t.Errorf("%d disks were touched, want %d; %v, want %v", touched, c.touched, err, c.err)
			}
		})
	}
}

// move is the loss of this node's lease, a new binding, and a new lease.
func (e *env) move(id, node string, epochs uint64) {
	e.t.Helper()
	e.guard.lease(0)
	tx := &configdb.Txn{}
	if id != "" {
		b := e.binding(id)
		b.Spec.NodeID, b.Spec.Epoch = node, b.Spec.Epoch+epochs
		must(e.t, configdb.Bindings.UpdateSpec(e.db.Local(), tx, &b))
	} else {
		tx.Put(configdb.Root+"test/"+api.NewID(), []byte("{}"))
	}
	e.commit(tx)
	e.guard.needs(e.db.Local().Revision())
	e.guard.lease(2)
}

// heldDB keeps one transaction back; whoever sent it does not learn what became of it.
type heldDB struct {
	configdb.DB
	next bool
	held *configdb.Txn
}

func (d *heldDB) Txn(ctx context.Context, tx *configdb.Txn) (uint64, error) {
	if d.next {
		d.next, d.held = false, tx
		return 0, configdb.ErrUncertain
	}
	return d.DB.Txn(ctx, tx)
}

// The promise that a VM is protected was sent, and its outcome not known. The VM was then
// started without protection, the promise landed, and the leader would have counted on a
// guard that kills nothing.
func TestALatePromiseDoesNotLandOnAStart(t *testing.T) {
	for name, restart := range map[string]bool{"of this daemon": false, "of the one before": true} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t, false)
			e.vols.put("web1-disk0", e.disk())
			e.until("QEMU is found", func() bool { return e.h.facts.get().Binary != "" }, nothing)
			id := e.create(e.node, api.VMSpec{CPUs: 1, Memory: 64 * api.MiB, Power: api.PowerStopped})
			e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
			facts := e.h.facts.get()
			e.stop()
			db := &heldDB{DB: e.db}
			e.adapt = func(c *Config) { c.DB = db }
			daemon := func() *Hypervisor { // one that looks when this test wants it to
				e.begin()
				e.stop()
				e.h.facts.set(api.AccelTCG, facts)
				return e.h
			}
			h := daemon()
			for _, ha := range []api.HAPolicy{api.HARestart, api.HANone} { // the binding is newer than the daemon
				e.change(id, func(vm *api.VM) { vm.Spec.HA = ha })
				if _, err := h.reconcile(t.Context(), id); err != nil {
					t.Fatal(err)
				}
			}
			e.change(id, func(vm *api.VM) { vm.Spec.HA = api.HARestart })
			db.next = true
			if _, err := h.reconcile(t.Context(), id); !errors.Is(err, configdb.ErrUncertain) {
				t.Fatalf("the promise: %v", err)
			}
			if restart {
				h = daemon()
			}
			e.change(id, func(vm *api.VM) { vm.Spec.HA, vm.Spec.Power = api.HANone, api.PowerRunning })
			for range 100 {
				if _, err := h.reconcile(t.Context(), id); err != nil {
					t.Log(err)
				}
				if e.guard.startCount() > 0 {
					break
				}
				time.Sleep(10 * time.Millisecond)
			}
			if p, _ := e.guard.get(id); p.State != ProcessRunning || p.Protected {
				t.Fatalf("it does not run unprotected: %+v", p)
			}
			if _, err := e.db.Txn(t.Context(), db.held); err == nil || e.binding(id).Spec.Protected {
				t.Errorf("the leader counts on a kill that the guard will not do (%v)", err)
			}
			writes := e.binding(id).Meta.Revision
			e.guard.killAll()
			if _, err := h.reconcile(t.Context(), id); err != nil {
				t.Log(err)
			}
			if e.binding(id).Meta.Revision != writes {
				t.Error("what is settled is written again")
			}
		})
	}
}
