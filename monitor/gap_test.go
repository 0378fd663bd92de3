// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package monitor

import (
	"testing"

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
