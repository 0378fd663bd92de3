// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// simPool is a pool that can lock hosts out, in a world where every second VM has
// its disk there.
type simPool struct {
	id       string
	barred   map[int]bool // hosts
	on       map[string]bool
	fenced   int // times that a host was locked out
	outlived int // looks at VMs that ran on without a lease
}

// guest is what a daemon knows of VMs in the pool.
type guest struct {
	life    int
	spared  map[string]bool // the guard does not kill it with the lease
	pending int             // starts between the look at the fences and the guard's answer
	back    *TakeBack
	inBack  bool
}

func (n *simNode) guest() *guest {
	if n.guests == nil || n.guests.life != n.life {
		n.guests = &guest{life: n.life, spared: map[string]bool{}}
		n.guests.back = NewTakeBack(TakeBackConfig{DB: n, NodeID: n.id, Lease: n.keeper, Quiet: n.quietPool, Pools: n, Log: slog.New(slog.DiscardHandler)})
	}
	return n.guests
}

func newPoolWorld(t *testing.T, seed uint64, vms int, off rule) *world {
	w := newWorld(t, seed, vms, off)
	w.pool = &simPool{id: simID(3, 0), barred: map[int]bool{}, on: map[string]bool{}}
	tx, ctx := &configdb.Txn{}, context.Background()
	pool := api.Pool{Meta: api.NewMeta(api.KindPool, "", "ceph"), Spec: api.PoolSpec{Type: "rbd"}}
	pool.Meta.ID = w.pool.id
	must(t, configdb.Pools.Create(tx, &pool))
	for _, n := range w.nodes {
		st := api.PoolState{Meta: api.NewMeta(api.KindPoolState, "", ""), Status: api.PoolStateStatus{Ready: true, Addresses: []string{fmt.Sprintf("10.0.0.%d", n.i)}}}
		st.Meta.ID = w.pool.id + "." + n.id
		must(t, configdb.PoolStates.CreateUnnamed(tx, &st))
	}
	for i := range vms {
		if i%2 == 1 {
			continue
		}
		vm, err := configdb.VMs.Get(w.mem.Local(), simID(2, i))
		must(t, err)
		vol := api.Volume{Meta: api.NewMeta(api.KindVolume, "", fmt.Sprintf("v%d-disk0", i)), Spec: api.VolumeSpec{Pool: "ceph"}}
		vol.Meta.ID = simID(4, i)
		must(t, configdb.Volumes.Create(tx, &vol))
		vm.Spec.Disks = []api.VMDisk{{Volume: vol.Meta.Name}}
		must(t, configdb.VMs.UpdateSpec(w.mem.Local(), tx, &vm))
		w.pool.on[vm.Meta.ID] = true
	}
	_, err := w.mem.Txn(ctx, tx)
	must(t, err)
	for _, n := range w.nodes {
		n.view = w.mem.Local()
		n.svc.storage = n
	}
	return w
}

// LockOut implements StorageFencer.
func (n *simNode) LockOut(ctx context.Context, f *api.StorageFence, _ []string, before func(context.Context) error) error {
	var host *simNode
	for _, o := range n.w.nodes {
		if s, err := configdb.Nodes.Get(n.w.mem.Local(), o.id); err == nil {
			if own, ok := s.Status.FenceOf(f.PoolID); ok && own.ID == f.ID {
				host = o
			}
		}
	}
	n.w.meanwhile(4, 60)
	if err := before(ctx); err != nil {
		return err
	}
	if host == nil || n.w.rng.IntN(8) == 0 {
		return errors.New("no answer")
	}
	if n.w.off == lockedOutFirst {
		return nil
	}
	if n.w.rng.IntN(8) == 0 { // commanded now, in force late, and nobody was told
		n.w.after(n.w.upTo(60*time.Second), func() { n.w.pool.barred[host.i] = true })
		return errors.New("no answer")
	}
	n.w.meanwhile(4, 60)
	n.w.pool.barred[host.i] = true
	n.w.pool.fenced++
	f.Epoch = uint64(n.w.pool.fenced)
	n.w.meanwhile(2, 150)
	return nil
}

// Admit implements Admitter.
func (n *simNode) Admit(context.Context, api.StorageFence) error {
	n.w.meanwhile(3, 150)
	if n.w.rng.IntN(6) == 0 {
		return errors.New("no answer")
	}
	n.w.pool.barred[n.i] = false
	n.w.meanwhile(2, 150)
	return nil
}

// Barred implements Admitter.
func (n *simNode) Barred(context.Context) ([]api.StorageFence, error) {
	if !n.w.pool.barred[n.i] {
		return nil, nil
	}
	return []api.StorageFence{{PoolID: n.w.pool.id, Pool: "ceph"}}, nil
}

func (n *simNode) fenced(v *configdb.View) bool {
	o, err := configdb.Nodes.Get(v, n.id)
	if err != nil {
		return false
	}
	_, out := o.Status.FenceOf(n.w.pool.id)
	return out
}

func (n *simNode) quietPool(context.Context, string) (string, error) {
	if n.w.off == takeBackWaits {
		return "", nil
	}
	if n.guest().pending > 0 {
		return "a start", nil
	}
	for vm := range n.running {
		if n.w.pool.on[vm] {
			return "a VM", nil
		}
	}
	return "", nil
}

// sparedFromKill reports that the guard does not end a VM with the lease.
func (n *simNode) sparedFromKill(vm string) bool {
	return n.w.pool != nil && n.guest().spared[vm]
}

// actPool is what the hypervisor module does for the VMs in the pool; it reports
// whether it is one.
func (n *simNode) actPool(b *api.Binding, session, revision uint64, lease bool) bool {
	if n.w.pool == nil || !n.w.pool.on[b.Meta.ID] {
		return false
	}
	g, vm := n.guest(), b.Meta.ID
	here, fenced := b.Spec.NodeID == n.id, n.fenced(n.view)
	if n.w.off == fencedStartsNothing {
		fenced = false
	}
	kill, running := n.running[vm]
	switch {
	case running && kill == 0 && (!here || fenced):
		n.running[vm] = n.w.now + n.w.killTime()
	case running && kill == 0 && lease && !g.spared[vm] && n.w.rng.IntN(5) == 0:
		n.spare(g, b)
	case !running && here && !fenced && lease && n.view.Revision() >= revision:
		n.startPool(g, b, session)
	}
	return true
}

// spare takes a VM from the guard's kill.
func (n *simNode) spare(g *guest, b *api.Binding) {
	vm := b.Meta.ID
	if n.w.off == promisedFirst {
		g.spared[vm] = true
	}
	if len(b.Spec.Guarding()) == 0 {
		tx, at := &configdb.Txn{}, *b
		at.Spec.StorageGuard = &api.StorageGuard{Epoch: b.Spec.Epoch, Pools: []string{n.w.pool.id}}
		must(n.w.t, configdb.Bindings.UpdateSpec(n.view, tx, &at))
		if _, err := n.Txn(context.Background(), tx); err != nil {
			return
		}
	}
	if _, still := n.running[vm]; still && n.guests == g && g.life == n.life {
		g.spared[vm] = true
	}
}

// startPool sends a start to the guard. The promise of an earlier process is taken
// back first.
func (n *simNode) startPool(g *guest, b *api.Binding, session uint64) {
	vm := b.Meta.ID
	if len(b.Spec.Guarding()) > 0 {
		tx, at := &configdb.Txn{}, *b
		at.Spec.StorageGuard = nil
		must(n.w.t, configdb.Bindings.UpdateSpec(n.view, tx, &at))
		_, _ = n.Txn(context.Background(), tx)
		return
	}
	delay := n.w.upTo(time.Second)
	if n.w.rng.IntN(10) == 0 {
		delay = n.w.upTo(60 * time.Second)
	}
	g.pending++
	n.w.after(delay, func() {
		if n.guests != g || g.life != n.life {
			return
		}
		g.pending--
		if _, there := n.running[vm]; !there {
			g.spared[vm] = false
			n.start(session, vm)
		}
	})
}

// governPool is what the leader and each node do about fences.
func (n *simNode) governPool() {
	if n.w.pool == nil {
		return
	}
	if n.leads {
		n.svc.lockOutSilent(n.believes.Term, func(attempt func(context.Context)) { attempt(context.Background()) })
	}
	g := n.guest()
	if g.inBack || n.w.rng.IntN(5) != 0 {
		return
	}
	g.inBack = true
	if n.w.rng.IntN(10) == 0 {
		g.back.found = time.Time{}
		_ = g.back.find(context.Background())
	}
	g.back.look(context.Background())
	g.inBack = false
}

// lockedAway reports that what a VM on a node writes is refused.
func (w *world) lockedAway(n *simNode, vm string) bool {
	return w.pool != nil && w.pool.on[vm] && w.pool.barred[n.i]
}

// poolRules are those of the storage guard.
var poolRules = map[rule]ruleOff{
	promisedFirst:       {"a VM is spared by the guard only after its binding says so", 35},
	lockedOutFirst:      {"a guarded VM moves only when its node is locked out", 1},
	takeBackWaits:       {"a fence is taken back only when nothing is left that uses the pool", 14},
	fencedStartsNothing: {"a node with a fence starts nothing that uses the pool", 197},
}
