// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package monitor

import (
	"fmt"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// TestWhatWasDeletedWhileNobodyLedIsToldOf: the next leader finds no object
// that could wake it, only the mark.
func TestWhatWasDeletedWhileNobodyLedIsToldOf(t *testing.T) {
	k := newKit(t)
	stop := k.lead(k.service("m2"), 1)
	k.settle()
	stop()
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		vm, err := configdb.VMs.Get(v, k.vm.Meta.ID)
		if err != nil {
			return err
		}
		b, err := configdb.Bindings.Get(v, k.vm.Meta.ID)
		if err != nil {
			return err
		}
		n, err := configdb.Nodes.Get(v, k.nodes["m1"].Meta.ID)
		if err != nil {
			return err
		}
		configdb.Bindings.DeleteUnnamed(tx, &b)
		configdb.VMs.Delete(tx, &vm)
		configdb.Nodes.Delete(tx, &n)
		return nil
	})
	k.lead(k.service("m3"), 2)
	for key, typ := range map[string]string{
		markKey(api.KindVM, k.vm.Meta.ID):            "vm.deleted",
		markKey(api.KindNode, k.nodes["m1"].Meta.ID): "node.removed",
	} {
		k.eventually(typ, func(v *configdb.View) bool {
			_, marked := v.Get(key)
			return !marked && len(k.events(typ)) == 1
		})
	}
	k.settle()
	for _, typ := range []string{"vm.deleted", "node.removed"} {
		if n := len(k.events(typ)); n != 1 {
			t.Errorf("%d events %s", n, typ)
		}
	}
}

// TestAMendedReceiverIsTriedAtOnce: who has just corrected an address does not
// want to wait for the end of a pause of minutes.
func TestAMendedReceiverIsTriedAtOnce(t *testing.T) {
	k := newKit(t)
	sink := newMailSink(t, 0)
	wrong := sink.spec()
	wrong.Address = "127.0.0.1:1"
	k.receiver("ops", wrong)
	s := k.service("m2")
	s.timing.backoff, s.timing.maxBackoff = time.Hour, time.Hour
	k.lead(s, 1)
	k.settle()
	k.rule("node-lost", func(r *api.RuleSpec) { r.ForSeconds = 0 })
	k.lose("m1", "m3")
	k.eventually("the receiver fails", func(v *configdb.View) bool {
		r, err := configdb.Receivers.Find(v, "", "ops")
		return err == nil && r.Status.Phase == ReceiverFailing
	})
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		r, err := configdb.Receivers.Find(v, "", "ops")
		if err != nil {
			return err
		}
		r.Spec.Address = sink.addr
		return configdb.Receivers.UpdateSpec(v, tx, &r)
	})
	k.eventually("mail", func(*configdb.View) bool { return len(sink.all()) == 1 })
}

func (k *kit) manyEvents(typ string, first, count int, put func(tx *configdb.Txn, e *api.Event) error) {
	k.t.Helper()
	for at := first; at < first+count; at += 500 {
		k.txn(func(_ *configdb.View, tx *configdb.Txn) error {
			for i := at; i < min(at+500, first+count); i++ {
				e := api.NewEvent(typ, api.SeverityInfo, "", api.Meta{}, "", time.Now())
				e.Meta.ID = fmt.Sprintf("00000000-0000-7000-8000-%012d", i)
				if err := put(tx, &e); err != nil {
					return err
				}
			}
			return nil
		})
	}
}

// An earlier version gave events of the shell a status, which must go with them.
func TestOldEventsGoWhole(t *testing.T) {
	k := newKit(t)
	s := k.service("m2")
	k.manyEvents("test.event", 0, 500, configdb.Events.CreateUnnamed)
	k.manyEvents("test.event", 500, s.keep.events, configdb.PutEvent)
	k.lead(s, 1)
	k.eventually("the oldest are gone", func(v *configdb.View) bool { return countEvents(v) == s.keep.events })
	k.eventually("no statuses of events that are gone", func(v *configdb.View) bool { return v.Empty(configdb.Events.StatusPrefix()) })
}

// TestLoginsDoNotPushOutWhatHappened: any user can log in all day long.
func TestLoginsDoNotPushOutWhatHappened(t *testing.T) {
	k := newKit(t)
	s := k.service("m2")
	k.manyEvents("audit.vm.delete", 0, 300, configdb.PutEvent)
	k.manyEvents("audit.login", 300, s.keep.events-150, configdb.PutEvent)
	k.manyEvents("audit.logout", 1_000_000, 150, configdb.PutEvent)
	k.lead(s, 1)
	k.eventually("the limit holds", func(v *configdb.View) bool { return countEvents(v) == s.keep.events })
	k.settle()
	if n := len(k.events("audit.vm.delete")); n != 300 {
		t.Errorf("%d of 300 changes are left", n)
	}
	if n := len(k.events("audit.logout")); n != 150 {
		t.Errorf("%d of the newest 150 logouts are left", n)
	}
}

// TestAReceiverOfTheSameNameIsAnother: what its predecessor was told is not known
// to it.
func TestAReceiverOfTheSameNameIsAnother(t *testing.T) {
	k := newKit(t)
	one, two := newMailSink(t, 0), newMailSink(t, 0)
	old := k.receiver("ops", one.spec())
	k.lead(k.service("m2"), 1)
	k.settle()
	k.rule("node-lost", func(r *api.RuleSpec) { r.ForSeconds = 0 })
	k.lose("m1", "m3")
	k.eventually("the first mail", func(*configdb.View) bool { return len(one.all()) == 1 })
	k.settle()
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		r, err := configdb.Receivers.Get(v, old.Meta.ID)
		if err != nil {
			return err
		}
		configdb.Receivers.Delete(tx, &r)
		return nil
	})
	k.receiver("ops", two.spec())
	k.eventually("the second mail", func(*configdb.View) bool { return len(two.all()) == 1 })
	k.settle()
	if len(one.all()) != 1 || len(two.all()) != 1 {
		t.Errorf("%d and %d mails", len(one.all()), len(two.all()))
	}
}
