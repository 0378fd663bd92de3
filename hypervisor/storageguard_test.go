// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// guardedPool makes the pool of volumes one that can lock hosts out.
func (e *env) guardedPool(addresses map[string][]string) string {
	e.t.Helper()
	tx := &configdb.Txn{}
	pool := api.Pool{Meta: api.NewMeta(api.KindPool, "", "local"), Spec: api.PoolSpec{Type: "rbd"}}
	must(e.t, configdb.Pools.Create(tx, &pool))
	for node, list := range addresses {
		st := api.PoolState{Meta: api.NewMeta(api.KindPoolState, "", ""), Status: api.PoolStateStatus{Ready: true, HostBoot: "b", Addresses: list}}
		st.Meta.ID = pool.Meta.ID + "." + node
		must(e.t, configdb.PoolStates.CreateUnnamed(tx, &st))
	}
	e.commit(tx)
	return pool.Meta.ID
}

func (e *env) fence(change func([]api.StorageFence) []api.StorageFence) {
	e.t.Helper()
	_, err := configdb.Transact(e.t.Context(), e.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Get(v, e.node)
		if err != nil {
			return err
		}
		n.Status.StorageFences = change(n.Status.StorageFences)
		return configdb.Nodes.UpdateStatus(v, tx, &n)
	})
	must(e.t, err)
}

func (e *env) guardingNow(id string) []string {
	b := e.binding(id)
	return b.Spec.Guarding()
}

// spared waits until the guard does not kill the VM with the lease any more.
func (e *env) spared(id, pool string) {
	e.t.Helper()
	e.until("the storage guard", func() bool {
		p, _ := e.guard.get(id)
		b := e.binding(id)
		return !p.Protected && b.Spec.Protected && slices.Equal(b.Spec.Guarding(), []string{pool})
	}, func() string { return fmt.Sprintf("binding %+v", e.binding(id).Spec) })
}

func TestAGuardedVMOutlivesTheLeaseAndEndsWithAFence(t *testing.T) {
	e := newEnv(t, false)
	pool := e.guardedPool(map[string][]string{"node-1": {"10.0.0.1"}})
	id, _ := e.running(api.VMSpec{HA: api.HARestart})
	e.spared(id, pool)
	first, _ := e.guard.get(id)

	e.guard.lease(0)
	if p, _ := e.guard.get(id); p.State != ProcessRunning {
		t.Fatal("it ended with the lease")
	}
	e.guard.lease(2)
	if _, err := e.h.Quiet(t.Context(), pool); err == nil || !strings.Contains(err.Error(), "no fence") {
		t.Fatalf("quiet without a fence: %v", err)
	}

	e.fence(func([]api.StorageFence) []api.StorageFence {
		return []api.StorageFence{{ID: "f", PoolID: pool, Pool: "local", Reason: "silent"}}
	})
	left := ""
	e.until("nothing is left", func() bool {
		var err error
		left, err = e.h.Quiet(t.Context(), pool)
		return err == nil && left == ""
	}, func() string { return left })
	e.wait(id, "it waits", func(vm api.VM) bool {
		return strings.HasPrefix(vm.Status.Message, "waiting: this node is locked out of pool local") && vm.Status.PID == 0
	})
	if p, there := e.guard.get(id); there && p.State == ProcessRunning {
		t.Fatal("it runs although this node is locked out")
	}
	starts := e.guard.startCount()

	e.fence(func([]api.StorageFence) []api.StorageFence { return nil })
	e.wait(id, "it runs again", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning && vm.Status.PID != first.PID })
	if n := e.guard.startCount(); n != starts+1 {
		t.Fatalf("%d starts after the fence, %d before", n, starts)
	}
	e.spared(id, pool)
}

func TestAStartIsUnderTheGuardsKillUntilTheBindingSaysOtherwise(t *testing.T) {
	e := newEnv(t, false)
	pool := e.guardedPool(map[string][]string{"node-1": {"10.0.0.1"}})
	id, _ := e.running(api.VMSpec{HA: api.HARestart})
	e.spared(id, pool)
	e.fakes.qemu().Exit(1, 0)
	e.until("started anew", func() bool { return e.guard.startCount() == 2 }, nothing)
	e.guard.mu.Lock()
	again := e.guard.starts[1]
	e.guard.mu.Unlock()
	if !again.Protected {
		t.Fatal("the second QEMU began without the guard's kill")
	}
	e.spared(id, pool)

	// A disk that cannot be locked away: the guard first, then the binding.
	tx := &configdb.Txn{}
	other := api.Pool{Meta: api.NewMeta(api.KindPool, "", "plain"), Spec: api.PoolSpec{Type: api.PoolDir}}
	must(t, configdb.Pools.Create(tx, &other))
	vol := api.Volume{Meta: api.NewMeta(api.KindVolume, "", "more"), Spec: api.VolumeSpec{Size: api.GiB, Pool: "plain"}}
	must(t, vol.Prepare())
	must(t, configdb.Volumes.Create(tx, &vol))
	e.commit(tx)
	e.change(id, func(vm *api.VM) { vm.Spec.Disks = append(vm.Spec.Disks, api.VMDisk{Volume: "more", Slot: 2}) })
	e.until("the guard's kill", func() bool {
		p, _ := e.guard.get(id)
		return p.Protected && len(e.guardingNow(id)) == 0
	}, nothing)
}

const ofEarlierBoot = "an address of an earlier boot"

func TestNobodyIsSparedWhoseNodeCannotBeLockedOutAlone(t *testing.T) {
	for name, addresses := range map[string]map[string][]string{
		"no address":        {},
		ofEarlierBoot:       {"node-1": {"10.0.0.1"}},
		"an address of two": {"node-1": {"10.0.0.1", "10.0.0.9"}, "node-2": {"10.0.0.9"}},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t, false)
			second := api.Node{Meta: api.NewMeta(api.KindNode, "", "n2")}
			second.Meta.ID = "node-2"
			tx := &configdb.Txn{}
			must(t, configdb.Nodes.Create(tx, &second))
			e.commit(tx)
			pool := e.guardedPool(addresses)
			if name == ofEarlierBoot {
				_, err := configdb.Transact(t.Context(), e.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
					st, err := configdb.PoolStates.Get(v, pool+".node-1")
					st.Status.HostBoot = ""
					return errors.Join(err, configdb.PoolStates.UpdateStatus(v, tx, &st))
				})
				must(t, err)
			}
			id, _ := e.running(api.VMSpec{HA: api.HARestart})
			for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
				if p, _ := e.guard.get(id); !p.Protected || len(e.guardingNow(id)) > 0 {
					t.Fatalf("spared: %+v", e.binding(id).Spec)
				}
			}
		})
	}
}

// A leader that locked this node out late, or the storage's administrator, may have
// locked out a QEMU whose node is well.
func TestAQEMUThatIsLockedOutIsReplaced(t *testing.T) {
	e := newEnv(t, false)
	e.guardedPool(map[string][]string{"node-1": {"10.0.0.1"}})
	id, first := e.running(api.VMSpec{})
	e.fakes.qemu().Emit("BLOCK_IO_ERROR", `{"device": "", "operation": "write", "action": "stop", "reason": "Cannot send after transport endpoint shutdown"}`)
	e.wait(id, "another QEMU", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning && vm.Status.PID != first.Status.PID })
	e.vols.mu.Lock()
	defer e.vols.mu.Unlock()
	if want := []string{"web1-disk0", "web1-disk0"}; !slices.Equal(e.vols.released, want) {
		t.Fatalf("released %v, want %v", e.vols.released, want)
	}
}
