// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package task

import (
	"errors"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
)

// A task that reboots nodes and runs out of time says which step it was at, what is left
// and what to do.
func TestARebootPastItsDeadlineSaysWhatIsLeft(t *testing.T) {
	db := storetest.New(t)
	tx := &configdb.Txn{Actor: "test"}
	for _, name := range []string{"a", "b", "c"} {
		vm, b := api.VM{Meta: api.NewMeta(api.KindVM, "", name)}, api.Binding{Meta: api.NewMeta(api.KindBinding, "", name)}
		vm.Meta.ID, b.Meta.ID = "vm-"+name, "vm-"+name
		if b.Spec.NodeID = "n2"; name == "c" {
			b.Spec.NodeID = "n3"
		}
		if err := errors.Join(configdb.VMs.Create(tx, &vm), configdb.Bindings.CreateUnnamed(tx, &b)); err != nil {
			t.Fatal(err)
		}
	}
	reboot := func(step api.RebootStep, stopped ...string) *api.Reboot {
		r := &api.Reboot{Meta: api.NewMeta(api.KindReboot, "", "m2"), Spec: api.RebootSpec{TaskID: "t", Node: "m2", Action: api.RebootHost}}
		r.Meta.ID = "n2"
		r.Status = api.RebootStatus{Step: step, Phase: api.TaskRunning, Message: "said", Stopped: stopped}
		return r
	}
	if err := configdb.Reboots.CreateUnnamed(tx, reboot(api.RebootEmptying)); err != nil {
		t.Fatal(err)
	}
	if _, err := db.Txn(t.Context(), tx); err != nil {
		t.Fatal(err)
	}
	rolling := func(current string, left ...string) *api.RollingReboot {
		return &api.RollingReboot{Status: api.RollingRebootStatus{Phase: api.TaskRunning, Message: "said", Done: []string{"m3"}, Current: current, Left: left}}
	}
	for name, c := range map[string]struct {
		what target
		left string
	}{
		"being emptied":          {target{reboot: reboot(api.RebootEmptying)}, "still on node m2: vm a, vm b; it is given up before its command; see to what holds it up, and try again: muster node reboot m2"},
		"told to leave":          {target{reboot: reboot(api.RebootLeaving)}, "node m2 has its command and runs no other boot yet; see to its host, or if it is to stay as it is: muster node maintenance off m2"},
		"what was shut down":     {target{reboot: reboot(api.RebootReturning, "vm-a", "vm-c")}, "not started again yet: vm a, vm c; that is tried further: muster vm ls"},
		"rolling, one under way": {target{rolling: rolling("n2", "m1")}, "rebooted: m3; under way: m2; still on node m2: vm a, vm b; it is given up before its command; see to what holds it up, and try again: muster cluster reboot --rolling --continue; left: m1"},
		"rolling, between two":   {target{rolling: rolling("", "m2", "m1")}, "rebooted: m3; left: m2, m1; to go on: muster cluster reboot --rolling --continue"},
		"another task":           {target{node: &api.Node{}}, ""},
	} {
		got, err := leftToDo(db.Local(), c.what)
		if err != nil || got != c.left {
			t.Errorf("%s: %q, %v; want %q", name, got, err, c.left)
		}
	}
	// And the task's error has it.
	what := target{exists: true, node: &api.Node{}, reboot: reboot(api.RebootEmptying), undone: "this is left"}
	task := api.NewTask(api.ActionNodeReboot, api.KindNode, api.Meta{ID: "n2", Name: "m2", Generation: 1}, "me", time.Minute, t0)
	for over, want := range map[bool]string{false: "said", true: "not done within its deadline: said; this is left"} {
		if got, _ := evaluate(task, what, t0, over); got.Message != want {
			t.Errorf("its time is over: %v: %q, want %q", over, got.Message, want)
		}
	}
}

// The service reads what is left when the deadline has passed.
func TestTheServiceSaysWhatIsLeft(t *testing.T) {
	f := &fixture{t, storetest.New(t)}
	f.db.SetTerm(1)
	defer f.run(1, nil)()
	n := api.Node{Meta: api.NewMeta(api.KindNode, "", "m2"), Status: api.NodeStatus{Phase: api.NodeReady}}
	task := api.NewTask(api.ActionNodeReboot, api.KindNode, n.Meta, "me", 50*time.Millisecond, time.Now())
	r := api.Reboot{Meta: api.NewMeta(api.KindReboot, "", "m2"), Spec: api.RebootSpec{TaskID: task.Meta.ID, Node: "m2", Action: api.RebootHost}, Status: api.RebootStatus{Phase: api.TaskRunning, Message: "said"}}
	r.Meta.ID = n.Meta.ID
	f.do(func(_ *configdb.View, tx *configdb.Txn) error {
		return errors.Join(configdb.Nodes.Create(tx, &n), configdb.Reboots.CreateUnnamed(tx, &r), configdb.Tasks.CreateUnnamed(tx, &task))
	})
	const want = "not done within its deadline: said; no VM is left on node m2; it is given up before its command; see to what holds it up, and try again: muster node reboot m2"
	f.until("the task's end", func(v *configdb.View) bool {
		got, err := configdb.Tasks.Get(v, task.Meta.ID)
		if err == nil && got.Status.Phase == api.TaskFailed && got.Status.Message != want {
			t.Fatalf("%q", got.Status.Message)
		}
		return err == nil && got.Status.Phase == api.TaskFailed
	})
}
