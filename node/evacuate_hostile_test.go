// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// A node that is removed while it is emptied left an evacuation behind that no leader
// could end, and of which each complained once a second.
func TestEvacuationOfARemovedNodeIsForgotten(t *testing.T) {
	k := newEvacKit(t)
	k.wish(api.EvacuateLive, 1)
	k.do(func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Get(v, "n1")
		if err != nil {
			return err
		}
		configdb.Nodes.Delete(tx, &n)
		return nil
	})
	if err := k.e.look(context.Background()); err != nil {
		t.Error(err)
	}
	if _, err := configdb.Evacuations.Get(k.db.Local(), "n1"); api.CodeOf(err) != api.CodeNotFound {
		t.Errorf("it is still there: %v", err)
	}
}

// asked counts how often a place was looked for.
type asked struct {
	oneTarget
	n map[string]int
}

func (a asked) ChooseOther(v *configdb.View, vm api.VM, not map[string]string, only string, copied []string) (string, string, error) {
	a.n[vm.Meta.Name]++
	return a.oneTarget.ChooseOther(v, vm, not, only, copied)
}

// The end of one evacuation made all others forget which VMs cannot be moved, and
// try them again.
func TestEndOfAnEvacuationLeavesTheOthersAlone(t *testing.T) {
	k := newEvacKit(t, "stuck")
	count := asked{k.e.placer.(oneTarget), map[string]int{}}
	k.e.placer = count
	k.vm("stuck", api.PowerRunning)
	k.vm("moves", api.PowerRunning)
	k.wish(api.EvacuateLive, 2)
	if st := k.look(); !strings.Contains(st.Message, "stuck: ") || st.Phase.Final() {
		t.Fatalf("%+v", st)
	}
	n := api.Node{Meta: api.NewMeta(api.KindNode, "", "m3"), Status: api.NodeStatus{Phase: api.NodeReady}}
	n.Meta.ID, n.Spec.Maintenance = "n3", true
	ev := api.Evacuation{Meta: api.NewMeta(api.KindEvacuation, "", "m3"), Spec: api.EvacuationSpec{TaskID: "t3", Node: "m3", Level: api.EvacuateLive, Parallel: 1}}
	ev.Meta.ID = "n3"
	k.do(func(_ *configdb.View, tx *configdb.Txn) error {
		if err := configdb.Nodes.Create(tx, &n); err != nil {
			return err
		}
		return configdb.Evacuations.CreateUnnamed(tx, &ev)
	})
	for range 3 {
		k.look()
	}
	if other, err := configdb.Evacuations.Get(k.db.Local(), "n3"); err != nil || other.Status.Phase != api.TaskSucceeded {
		t.Fatalf("%+v, %v", other.Status, err)
	}
	if count.n["stuck"] != 1 {
		t.Errorf("a place for the VM that stays was looked for %d times", count.n["stuck"])
	}
}
