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
	k.remove("n1")
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

// get reads a VM.
func (k *evacKit) get(id string) api.VM {
	vm, err := configdb.VMs.Get(k.db.Local(), id)
	if err != nil {
		k.Fatal(err)
	}
	return vm
}

// reportStopped is the word of a VM's node that it has shut down.
func (k *evacKit) reportStopped(id string) {
	k.do(func(v *configdb.View, tx *configdb.Txn) error {
		vm := k.get(id)
		vm.Status.Phase, vm.Status.PID, vm.Status.ObservedGeneration = api.VMStopped, 0, vm.Meta.Generation
		return configdb.VMs.UpdateStatus(v, tx, &vm)
	})
}

// A VM that the evacuation had shut down was started again although its user had
// said meanwhile that it is to be stopped.
func TestEvacuationLeavesStoppedWhatItsUserStops(t *testing.T) {
	for name, stops := range map[string]bool{"the user stops it": true, "nobody does": false} {
		t.Run(name, func(t *testing.T) {
			k := newEvacKit(t, "pinned")
			id := k.vm("pinned", api.PowerRunning)
			k.do(func(_ *configdb.View, tx *configdb.Txn) error { // what an evacuation left that nobody could end
				tx.Put(configdb.Root+"staystopped/"+id, nil)
				return nil
			})
			k.wish(api.EvacuateStop, 1)
			k.look()
			if stops {
				k.do(func(v *configdb.View, tx *configdb.Txn) error { return configdb.StayStopped(v, tx, id) })
			}
			k.reportStopped(id)
			var st api.EvacuationStatus
			for range 6 {
				if st = k.look(); st.Phase.Final() {
					break
				}
			}
			if st.Phase != api.TaskSucceeded || k.at(id) != "m2" {
				t.Fatalf("%+v, on %s", st, k.at(id))
			}
			if vm := k.get(id); (vm.Spec.Power == api.PowerStopped) != stops {
				t.Errorf("it is to be %s", vm.Spec.Power)
			}
			for e := range k.db.Local().Scan(configdb.Root+"staystopped/", "") {
				t.Errorf("%s is left", e.Key)
			}
		})
	}
}

// What was shut down to be moved stayed down when the evacuation was given up, or its
// node was lost, before it had moved.
func TestEvacuationThatEndsStartsWhatItShutDown(t *testing.T) {
	for name, end := range map[string]func(v *configdb.View, tx *configdb.Txn) error{
		"given up": func(v *configdb.View, tx *configdb.Txn) error {
			ev, err := configdb.Evacuations.Get(v, "n1")
			if err != nil {
				return err
			}
			ev.Spec.Cancel = true
			return configdb.Evacuations.UpdateSpec(v, tx, &ev)
		},
		"its node is lost": func(v *configdb.View, tx *configdb.Txn) error {
			n, err := configdb.Nodes.Get(v, "n1")
			if err != nil {
				return err
			}
			n.Status.Phase = api.NodeLost
			return configdb.Nodes.UpdateStatus(v, tx, &n)
		},
	} {
		t.Run(name, func(t *testing.T) {
			k := newEvacKit(t, "pinned")
			id := k.vm("pinned", api.PowerRunning)
			k.wish(api.EvacuateStop, 1)
			k.look()
			if p := k.get(id).Spec.Power; p != api.PowerStopped {
				t.Fatalf("it is to be %s", p)
			}
			k.do(end)
			var st api.EvacuationStatus
			for range 4 {
				if st = k.look(); st.Phase.Final() {
					break
				}
			}
			if vm := k.get(id); !st.Phase.Final() || vm.Spec.Power != api.PowerRunning || k.at(id) != "m1" {
				t.Errorf("%+v; it is to be %s on %s", st, vm.Spec.Power, k.at(id))
			}
		})
	}
}
