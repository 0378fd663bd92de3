// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// backTo is placement that lets a VM go where it is to go.
type backTo struct{ oneTarget }

func (backTo) ChooseOther(_ *configdb.View, _ api.VM, _ map[string]string, only string, _ []string) (string, string, error) {
	if only == "" {
		return "", "", api.Errorf(api.CodeInternal, "a failback knows its node")
	}
	return "n" + only[1:], only, nil
}

type failbackKit struct {
	*evacKit
	f     *failback
	clock time.Time
	quiet map[string]time.Duration
}

// newFailbackKit has the nodes m1, from which VMs were recovered, and m2.
func newFailbackKit(t *testing.T) *failbackKit {
	k := &failbackKit{evacKit: newEvacKit(t), clock: time.Now(), quiet: map[string]time.Duration{}}
	k.f = newFailback(k.db, backTo{}, 1, func(id string) time.Duration { return k.quiet[id] }, slog.New(slog.NewTextHandler(t.Output(), nil)))
	k.f.now = func() time.Time { return k.clock }
	k.node("n1", func(n *api.Node) { n.Spec.Maintenance = false })
	return k
}

func (k *failbackKit) node(id string, f func(*api.Node)) {
	k.Helper()
	k.do(func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Get(v, id)
		if err != nil {
			return err
		}
		f(&n)
		if err := configdb.Nodes.UpdateSpec(v, tx, &n); err != nil {
			return err
		}
		return configdb.Nodes.UpdateStatus(v, tx, &n)
	})
}

// recovered makes a VM that runs on m2 and was taken from m1.
func (k *failbackKit) recovered(name string, r api.VMRecovery) string {
	id := k.vm(name, api.PowerRunning)
	k.do(func(v *configdb.View, tx *configdb.Txn) error {
		vm, err := configdb.VMs.Get(v, id)
		if err != nil {
			return err
		}
		b, err := configdb.Bindings.Get(v, id)
		if err != nil {
			return err
		}
		lost, err := configdb.Nodes.Get(v, "n1")
		if err != nil {
			return err
		}
		vm.Spec.Recovery = &r
		b.Spec.RecoveredFrom = b.Spec.Recovered(&lost, "n2")
		b.Spec.NodeID, b.Spec.Node, b.Spec.Epoch = "n2", "m2", 2
		if err := configdb.VMs.UpdateSpec(v, tx, &vm); err != nil {
			return err
		}
		vm.Status.Node, vm.Status.Epoch, vm.Status.ObservedGeneration = "m2", 2, vm.Meta.Generation
		if err := configdb.VMs.UpdateStatus(v, tx, &vm); err != nil {
			return err
		}
		return configdb.Bindings.UpdateSpec(v, tx, &b)
	})
	return id
}

// after looks twice, with a time between.
func (k *failbackKit) after(d time.Duration) (moving []string) {
	k.Helper()
	for range 2 {
		if err := k.f.look(context.Background()); err != nil {
			k.Fatal(err)
		}
		k.clock = k.clock.Add(d / 2)
	}
	if err := k.f.look(context.Background()); err != nil {
		k.Fatal(err)
	}
	ops, err := configdb.Operations.List(k.db.Local())
	if err != nil {
		k.Fatal(err)
	}
	for i := range ops {
		if m := ops[i].Spec.Migration; m == nil || m.Node != "m1" {
			k.Fatalf("%+v", ops[i].Spec)
		}
		moving = append(moving, ops[i].Spec.VM)
	}
	return moving
}

func back(priority api.RecoveryPriority) api.VMRecovery {
	return api.VMRecovery{Priority: priority, Failback: api.Failback{Failback: api.FailbackReturn, FailbackAfterMinutes: 20}}
}

func TestRecoveredVMsGoBackOneAtATime(t *testing.T) {
	k := newFailbackKit(t)
	k.recovered("low", back(api.PriorityLow))
	k.recovered("high", back(api.PriorityHigh))
	k.recovered("stays", api.VMRecovery{})
	if m := k.after(19 * time.Minute); len(m) != 0 {
		t.Fatal("too early:", m)
	}
	for _, want := range []string{"high", "low"} {
		m := k.after(2 * time.Minute)
		if len(m) != 1 || m[0] != want {
			t.Fatalf("%v, want %s alone", m, want)
		}
		ops, _ := configdb.Operations.List(k.db.Local())
		k.do(func(v *configdb.View, tx *configdb.Txn) error { // it has arrived
			arr, err := configdb.Arrivals.Get(v, ops[0].Meta.ID)
			if err != nil {
				return err
			}
			b, err := configdb.Bindings.Get(v, ops[0].Meta.ID)
			if err != nil {
				return err
			}
			configdb.Operations.DeleteUnnamed(tx, &ops[0])
			configdb.Arrivals.DeleteUnnamed(tx, &arr)
			b.Spec.NodeID, b.Spec.Node, b.Spec.Epoch = "n1", "m1", 3
			return configdb.Bindings.UpdateSpec(v, tx, &b)
		})
	}
	if m := k.after(time.Hour); len(m) != 0 {
		t.Error("one goes that is there, or was not asked to:", m)
	}
	events, err := configdb.Events.List(k.db.Local())
	if err != nil || len(events) != 2 || events[0].Spec.Type != eventFailback {
		t.Error(events, err)
	}
}

func TestNothingGoesBackWhile(t *testing.T) {
	ready := func(n *api.Node) {
		n.Status = api.NodeStatus{Phase: api.NodeReady}
		n.Spec.Maintenance = false
	}
	for name, change := range map[string]func(k *failbackKit, id string, on bool){
		"a node is lost": func(k *failbackKit, _ string, on bool) {
			k.flip("n2", on, ready, func(n *api.Node) { n.Status.Phase = api.NodeLost })
		},
		"a node is stopping": func(k *failbackKit, _ string, on bool) {
			k.flip("n2", on, ready, func(n *api.Node) { n.Status.Stopping = true })
		},
		"a node is being fenced": func(k *failbackKit, _ string, on bool) {
			k.flip("n2", on, ready, func(n *api.Node) { n.Status.Fencing = "a" })
		},
		"a node is in maintenance": func(k *failbackKit, _ string, on bool) {
			k.flip("n1", on, ready, func(n *api.Node) { n.Spec.Maintenance = true })
		},
		"a node is silent": func(k *failbackKit, _ string, on bool) {
			k.quiet["n1"] = 0
			if on {
				k.quiet["n1"] = failbackSilence + 1
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			k := newFailbackKit(t)
			id := k.recovered("web1", back(""))
			k.after(19 * time.Minute)
			change(k, id, true)
			if m := k.after(time.Hour); len(m) != 0 {
				t.Fatal("it went", m)
			}
			change(k, id, false)
			if m := k.after(19 * time.Minute); len(m) != 0 {
				t.Fatal("the time did not begin anew:", m)
			}
			if m := k.after(2 * time.Minute); len(m) != 1 {
				t.Fatal("it never goes")
			}
		})
	}
}

func (k *failbackKit) flip(id string, on bool, well, ill func(*api.Node)) {
	if on {
		k.node(id, ill)
		return
	}
	k.node(id, well)
}

func TestAVMThatWasMovedSinceStays(t *testing.T) {
	k := newFailbackKit(t)
	id := k.recovered("web1", back(""))
	k.do(func(v *configdb.View, tx *configdb.Txn) error {
		b, err := configdb.Bindings.Get(v, id)
		if err != nil {
			return err
		}
		b.Spec.Epoch++ // somebody migrated it away and back
		return configdb.Bindings.UpdateSpec(v, tx, &b)
	})
	if m := k.after(time.Hour); len(m) != 0 {
		t.Fatal(m)
	}
}

func TestAFailbackThatFailsTwiceIsLeft(t *testing.T) {
	k := newFailbackKit(t)
	k.recovered("web1", back(""))
	k.after(21 * time.Minute)
	for i := range 3 {
		if ended := k.finish(false); ended != 1 && i < failbackTries || ended != 0 && i >= failbackTries {
			t.Fatalf("try %d: %d operations", i+1, ended)
		}
		k.after(time.Minute)
	}
}

func TestTheFirstNodeStaysTheOrigin(t *testing.T) {
	node := func(id string) *api.Node {
		n := &api.Node{Meta: api.NewMeta(api.KindNode, "", id)}
		n.Meta.ID = id
		return n
	}
	b := api.BindingSpec{NodeID: "n1", Epoch: 1}
	move := func(lost *api.Node, to string) {
		b.RecoveredFrom = b.Recovered(lost, to)
		b.NodeID, b.Epoch = to, b.Epoch+1
	}
	move(node("n1"), "n2")
	move(node("n2"), "n3")
	move(nil, "n4") // which could not start it
	if o := b.Origin(); o == nil || o.NodeID != "n1" {
		t.Fatalf("%+v", o)
	}
	if move(node("n4"), "n1"); b.Origin() != nil {
		t.Fatalf("%+v", b)
	}
	if move(nil, "n2"); b.Origin() != nil {
		t.Fatalf("a failed start alone is no recovery: %+v", b)
	}
}
