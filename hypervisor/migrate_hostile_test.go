// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"fmt"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/reconcile"
)

// later moves the clock on until something is so.
func (p *pair) later(what string, ok func() bool) {
	p.t.Helper()
	p.laterWithin(1<<62, what, ok)
}

// laterWithin is later for what must not take so long: the clock is moved on by less.
func (p *pair) laterWithin(most time.Duration, what string, ok func() bool) {
	p.t.Helper()
	ahead := time.Second
	p.until(what, func() bool {
		if ok() {
			return true
		}
		if ahead < most {
			ahead += time.Second
			p.clock.advance(time.Second)
		}
		p.env.h.Wake()
		return false
	}, func() string {
		vm := p.vm(vmOf(p))
		op, _ := configdb.Operations.Get(p.db.Local(), vm.Meta.ID)
		return fmt.Sprintf("%+v; operation %+v", vm.Status, op.Status)
	})
}

func vmOf(p *pair) string {
	all, err := configdb.VMs.List(p.db.Local())
	must(p.t, err)
	return all[0].Meta.ID
}

// A QEMU in the switch of its migration has halted its guest, waits for the other
// end and answers nothing. No connection breaks if that end is halted, or its host
// has no power; then it is this node's turn.
func TestSwitchToANodeThatDoesNotReadIsBrokenOff(t *testing.T) {
	for _, c := range []struct {
		name, ends string
		harm       func(p *pair, id string)
	}{
		{"its host is lost", "node-2 is lost", func(p *pair, _ string) {
			_, err := configdb.Transact(p.t.Context(), p.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
				n, err := configdb.Nodes.Get(v, "node-2")
				if err != nil {
					return err
				}
				n.Status.Phase = api.NodeLost
				return configdb.Nodes.UpdateStatus(v, tx, &n)
			})
			must(p.t, err)
		}},
		{"it is cancelled", "cancelled: cancelled as wished", func(p *pair, id string) { p.cancel(id) }},
		{"nobody says anything", "the guest stood still for more than", func(*pair, string) {}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t, false)
			id := p.begun(api.VMSpec{})
			q := p.fakes.qemu()
			q.StallSwitch()
			p.migrate(id, nil)
			p.atStep("device")
			c.harm(p, id)
			p.later("it ends", func() bool { _, err := configdb.Operations.Get(p.db.Local(), id); return err != nil })
			p.over(id, c.ends)
			p.settled(id, "node-1")
			if n := p.guard.startCount(); n != 1 {
				t.Errorf("the guest was started %d times", n)
			}
		})
	}
}

// Just after a transfer has ended QEMU refuses the next one; told to send all the same, it
// took itself to be sending for ever, and the VM could not leave its node any more.
func TestATransferBeginsWhenTheOneBeforeIsClearedAway(t *testing.T) {
	p := newPair(t, false)
	id := p.begun(api.VMSpec{})
	p.fakes.qemu().KeepTransfer(5)
	p.migrate(id, nil)
	p.over(id, "succeeded")
	p.settled(id, "node-2")
}

// The target ends its QEMU when it sees a cancellation. A look at the source that had
// begun before saw a transfer that failed, and said so.
func TestCancellationIsNotAnsweredWithAFailure(t *testing.T) {
	p, s, op := lateLook(t)
	id := s.vm.Meta.ID
	p.cancel(id)
	if err := s.endOperation(t.Context(), &op, api.TaskFailed, api.CodeInternal, "the transfer was broken off"); err == nil {
		t.Error("it failed although it was cancelled")
	}
	p.begin()
	p.over(id, "cancelled")
}

// While memory flows the guest runs, but its VM is closed for all other work: a target
// that reads no more kept it so for a day.
func TestTransferThatStandsStillIsGivenUp(t *testing.T) {
	p := newPair(t, false)
	id := p.begun(api.VMSpec{})
	p.fakes.qemu().Hold()
	p.migrate(id, nil)
	p.atStep("active")
	p.later("it ends", func() bool { _, err := configdb.Operations.Get(p.db.Local(), id); return err != nil })
	p.over(id, "nothing has reached node node-2 for more than 1m0s")
	p.fakes.qemu().Release()
	p.settled(id, "node-1")
}

// After the hand-over, with the source gone, the target has the only copy of the
// guest. That its QEMU is slow to answer is no reason to end it.
func TestOnlyCopyOfAGuestIsNotEndedForASlowMonitor(t *testing.T) {
	p := newPair(t, false)
	id := p.begun(api.VMSpec{})
	q := p.fakes.qemu()
	q.Hold()
	p.migrate(id, nil)
	p.atStep("active")
	p.other.guard.lease(0)
	q.Release()
	p.until("handed over", func() bool { return p.binding(id).Spec.Epoch == 2 }, nothing)
	p.stop()
	p.guard.killAll()
	p.other.stop()
	op, err := configdb.Operations.Get(p.db.Local(), id)
	must(t, err)
	arr, err := configdb.Arrivals.Get(p.db.Local(), id)
	must(t, err)
	tx := &configdb.Txn{}
	configdb.Operations.DeleteUnnamed(tx, &op)
	configdb.Arrivals.DeleteUnnamed(tx, &arr)
	p.commit(tx)
	p.other.begin()
	p.until("attached", func() bool { in := p.other.h.instance(id); return in.openConn() != nil }, nothing)
	target := p.other.fakes.qemu()
	target.Hang(true)
	p.other.guard.lease(2)
	p.other.h.Wake()
	p.until("it was not answered", func() bool { in := p.other.h.instance(id); return in.openConn() == nil || p.other.guard.killed(id) }, nothing)
	target.Hang(false)
	p.until("the guest runs", func() bool {
		p.clock.advance(time.Second)
		p.other.h.Wake()
		return target.Count("cont") > 0 || p.other.guard.killed(id)
	}, func() string { return fmt.Sprintf("%+v", p.vm(id).Status) })
	if p.other.guard.killed(id) || p.other.guard.startCount() != 1 || target.Count("cont") != 1 {
		t.Errorf("killed %v, started %d times, continued %d times", p.other.guard.killed(id), p.other.guard.startCount(), target.Count("cont"))
	}
}

// A write that the database refuses says nothing about QEMU, which may be in the
// middle of a switch: its monitor is not let go of, nor left alone for ten seconds.
func TestRefusedWriteIsNotTakenForASilentQEMU(t *testing.T) {
	p := newPair(t, false)
	id := p.begun(api.VMSpec{})
	p.fakes.qemu().Hold()
	p.migrate(id, nil)
	p.atStep("active")
	op, err := configdb.Operations.Get(p.db.Local(), id)
	must(t, err)
	op.Meta.StatusRevision-- // of a moment ago
	proc, _ := p.guard.get(id)
	s := &step{h: p.env.h, v: p.db.Local(), vm: p.vm(id), b: p.binding(id), proc: &proc, in: &instance{id: id, wasUp: true}, now: p.clock.now(), result: reconcile.Result{}}
	for range 2 {
		err := s.updateOperation(t.Context(), &op, func(st *api.OperationStatus) { st.Progress++ })
		if err == nil {
			t.Fatal("an old write was taken")
		}
		must(t, s.unreachable(t.Context(), err))
		op.Status.Progress++
	}
	if left := s.in.quietUntil.Sub(p.clock.now()); left > 0 || len(s.problems) > 0 {
		t.Errorf("QEMU is left alone for %v: %+v", left, s.problems)
	}
	p.fakes.qemu().Release()
	p.over(id, "succeeded")
}
