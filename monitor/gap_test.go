// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package monitor

import (
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
