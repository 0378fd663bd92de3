// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// deafPool answers nobody.
type deafPool struct{ asked int }

// LockOut implements StorageFencer.
func (p *deafPool) LockOut(ctx context.Context, _ *api.StorageFence, _ []string, before func(context.Context) error) error {
	p.asked++
	return errors.Join(before(ctx), errors.New("no answer"))
}

// guardedWorld is one without chance, in which the VM on node 2 has a storage guard.
func guardedWorld(t *testing.T) (*world, *deafPool) {
	w, p := newPoolWorld(t, 1, 4, everyRule), &deafPool{}
	w.nested = true
	w.nodes[0].svc.storage = p
	w.nodes[0].svc.grant.begin(1)
	w.change(func(v *configdb.View, tx *configdb.Txn) error {
		b, err := configdb.Bindings.Get(v, simID(2, 2))
		if err != nil {
			return err
		}
		b.Spec.StorageGuard = &api.StorageGuard{Epoch: b.Spec.Epoch, Pools: []string{w.pool.id}}
		return configdb.Bindings.UpdateSpec(v, tx, &b)
	})
	w.nodes[0].Local()
	return w, p
}

func TestAPoolThatDoesNotAnswerIsAskedAgainAndNothingIsWritten(t *testing.T) {
	w, p := guardedWorld(t)
	leader := w.nodes[0].svc
	w.pass(FenceAfter+time.Second, 2)
	attempts := func(n int) {
		for range n {
			leader.lockOutSilent(1, inline)
			w.pass(lockOutPause+time.Second, 2)
		}
	}
	attempts(4)
	st := w.status(2)
	f, marked := st.FenceOf(w.pool.id)
	if !marked || f.InForceAt != nil || p.asked < 2 {
		t.Fatalf("asked %d times, fence %+v", p.asked, f)
	}
	before, asked := w.mem.Local().Revision(), p.asked
	attempts(10)
	if p.asked < asked+10 {
		t.Errorf("asked %d times more", p.asked-asked)
	}
	if n := w.mem.Local().Revision() - before; n != 0 {
		t.Errorf("10 attempts wrote %d times", n)
	}
	st = w.status(2)
	if again, _ := st.FenceOf(w.pool.id); again.ID != f.ID {
		t.Errorf("another mark: %+v", again)
	}
}

func TestANodeWithNothingToBeLockedOutOfIsLeftToRest(t *testing.T) {
	w, p := guardedWorld(t)
	leader, id := w.nodes[0].svc, w.nodes[3].id
	w.lose(3)
	leader.lockOutSilent(1, inline)
	w.pass(lockOutPause+time.Second, 3)
	if p.asked != 0 || leader.grant.beginLocking(1, id) {
		t.Fatalf("looked at again so soon; the pool was asked %d times", p.asked)
	}
	leader.grant.hear(1, id) // it may have VMs again
	w.pass(lockOutPause+time.Second, 3)
	if !leader.grant.beginLocking(1, id) {
		t.Fatal("it rests although it was back")
	}
}

func TestAPoolWithoutAddressesKeepsNoOtherFromBeingLocked(t *testing.T) {
	w, p := guardedWorld(t)
	leader := w.nodes[0].svc
	other := api.Pool{Meta: api.NewMeta(api.KindPool, "", "another"), Spec: api.PoolSpec{Type: api.PoolRBD}}
	w.change(func(v *configdb.View, tx *configdb.Txn) error {
		b, err := configdb.Bindings.Get(v, simID(2, 2))
		if err != nil {
			return err
		}
		b.Spec.StorageGuard = &api.StorageGuard{Epoch: b.Spec.Epoch, Pools: []string{w.pool.id, other.Meta.ID}}
		return errors.Join(configdb.Pools.Create(tx, &other), configdb.Bindings.UpdateSpec(v, tx, &b))
	})
	w.pass(FenceAfter+time.Second, 2)
	for range 3 {
		leader.lockOutSilent(1, inline)
		w.pass(lockOutPause+time.Second, 2)
	}
	st := w.status(2)
	_, marked := st.FenceOf(w.pool.id)
	if _, blind := st.FenceOf(other.Meta.ID); !marked || blind || p.asked == 0 {
		t.Fatalf("asked %d times, fences %+v", p.asked, st.StorageFences)
	}
}

// latePool has another attempt win while this one is under way.
type latePool struct {
	w   *world
	err error
}

func (p *latePool) LockOut(ctx context.Context, f *api.StorageFence, _ []string, before func(context.Context) error) error {
	p.w.change(func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Get(v, p.w.nodes[2].id)
		if err != nil {
			return err
		}
		now := time.Now()
		n.Status.StorageFences = slices.Clone(n.Status.StorageFences)
		for i := range n.Status.StorageFences {
			n.Status.StorageFences[i].InForceAt = &now
		}
		return configdb.Nodes.UpdateStatus(v, tx, &n)
	})
	p.w.nodes[0].Local()
	p.err = before(ctx)
	return p.err
}

// Once a fence is in force the VMs start elsewhere: carried out late, it would lock out
// who has their volumes then.
func TestALockOutIsNotCarriedOutTwice(t *testing.T) {
	w, _ := guardedWorld(t)
	p := &latePool{w: w}
	w.nodes[0].svc.storage = p
	w.pass(FenceAfter+time.Second, 2)
	w.nodes[0].svc.lockOutSilent(1, inline)
	if !errors.Is(p.err, errNotMarked) {
		t.Errorf("a lock-out that is late may go on: %v", p.err)
	}
}
