// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/rest"
)

// rebootKit reboots m1, of which n2 is the leader.
type rebootKit struct {
	*evacKit
	r     *reboots
	clock time.Time
	quiet time.Duration
	votes []string
}

func newRebootKit(t *testing.T, action api.RebootAction, change func(*api.RebootSpec)) *rebootKit {
	k := &rebootKit{evacKit: newEvacKit(t), clock: time.Unix(1e9, 0), votes: []string{"n2"}}
	k.r = &reboots{
		db: k.db, placer: oneTarget{}, log: slog.New(slog.NewTextHandler(t.Output(), nil)), term: 1, self: "n2",
		voters: func() ([]string, error) { return k.votes, nil }, silence: func(string) time.Duration { return k.quiet }, now: func() time.Time { return k.clock },
		told: map[string]time.Time{},
	}
	k.host("old")
	task := api.Task{Meta: api.NewMeta(api.KindTask, "", "t")}
	task.Meta.ID = "t"
	rb := api.Reboot{Meta: api.NewMeta(api.KindReboot, "", "m1"), Spec: api.RebootSpec{TaskID: "t", Node: "m1", Action: action, Evacuate: api.EvacuateRequest{Level: api.EvacuateLive, Parallel: 2}}}
	if rb.Meta.ID = "n1"; action == api.RebootHost {
		rb.Spec.WithinSeconds = 900
	}
	if change != nil {
		change(&rb.Spec)
	}
	k.do(func(_ *configdb.View, tx *configdb.Txn) error {
		if err := configdb.Tasks.CreateUnnamed(tx, &task); err != nil {
			return err
		}
		return configdb.Reboots.CreateUnnamed(tx, &rb)
	})
	return k
}

func (k *rebootKit) host(boot string) {
	k.node(func(n *api.Node) { n.Status.HostBoot = boot })
}

func (k *rebootKit) node(f func(*api.Node)) {
	k.do(func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Get(v, "n1")
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

// steps lets evacuation and reboot look, until nothing changes.
func (k *rebootKit) steps() (api.RebootStatus, api.Node) {
	k.Helper()
	for range 12 {
		if err := k.e.look(k.Context()); err != nil {
			k.Fatal(err)
		}
		k.finish(true)
		if err := k.r.look(k.Context()); err != nil {
			k.Fatal(err)
		}
		k.do(func(v *configdb.View, tx *configdb.Txn) error { // guests obey, as their owner says
			vms, err := configdb.VMs.List(v)
			for i := range vms {
				vm := &vms[i]
				if vm.Spec.Power == api.PowerStopped && vm.Status.Phase == api.VMRunning && (vm.Meta.Name != "deaf" || vm.Spec.ForceStop) {
					vm.Status.Phase, vm.Status.PID, vm.Status.ObservedGeneration = api.VMStopped, 0, vm.Meta.Generation
					if err := configdb.VMs.UpdateStatus(v, tx, vm); err != nil {
						return err
					}
				}
			}
			return err
		})
	}
	rb, err := configdb.Reboots.Get(k.db.Local(), "n1")
	if err != nil {
		k.Fatal(err)
	}
	n, err := configdb.Nodes.Get(k.db.Local(), "n1")
	if err != nil {
		k.Fatal(err)
	}
	return rb.Status, n
}

func (k *rebootKit) expect(phase api.TaskPhase, words string, maintenance bool) api.RebootStatus {
	k.Helper()
	st, n := k.steps()
	if st.Phase != phase || !strings.Contains(st.Message, words) || n.Spec.Maintenance != maintenance {
		k.Fatalf("maintenance %v: %+v", n.Spec.Maintenance, st)
	}
	if st.Phase.Final() && st.Step == api.RebootReturning && n.Status.Absence != nil {
		k.Fatal("it is expected to be away still")
	}
	return st
}

func (k *rebootKit) power(id string) api.PowerState {
	vm, err := configdb.VMs.Get(k.db.Local(), id)
	if err != nil {
		k.Fatal(err)
	}
	return vm.Spec.Power
}

func TestRebootEndsWithTheNextBoot(t *testing.T) {
	k := newRebootKit(t, api.RebootHost, nil)
	id := k.vm("web1", api.PowerRunning)
	st, n := k.steps()
	if st.Step != api.RebootLeaving || n.Status.Absence == nil || n.Status.Absence.Until == nil || k.at(id) != "m2" {
		t.Fatalf("%+v, on %s", st, k.at(id))
	}
	k.quiet = time.Minute
	k.expect(api.TaskRunning, "away", true)
	k.host("new") // it says so before it has a lease
	k.expect(api.TaskRunning, "away", true)
	k.quiet = 0
	k.expect(api.TaskSucceeded, "", false)
	k.do(func(v *configdb.View, tx *configdb.Txn) error {
		task, err := configdb.Tasks.Get(v, "t")
		if err != nil {
			return err
		}
		task.Status.Phase = api.TaskSucceeded
		return configdb.Tasks.UpdateStatus(v, tx, &task)
	})
	if err := k.r.look(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := configdb.Reboots.Get(k.db.Local(), "n1"); api.CodeOf(err) != api.CodeNotFound {
		t.Fatalf("it is still there: %v", err)
	}
}

func TestRebootThatFails(t *testing.T) {
	late := func(k *rebootKit) { k.steps(); k.clock = k.clock.Add(901 * time.Second) }
	for name, c := range map[string]struct {
		action      api.RebootAction
		do          func(k *rebootKit)
		words       string
		maintenance bool
	}{
		"not back":        {api.RebootHost, func(k *rebootKit) { late(k); k.quiet = time.Hour }, "not back after 900 s", true},
		"the old boot":    {api.RebootHost, late, "still runs the same boot", true},
		"does not leave":  {api.ShutdownHost, late, "still answers", true},
		"maintenance off": {api.RebootHost, func(k *rebootKit) { k.node(func(n *api.Node) { n.Spec.Maintenance = false }) }, "maintenance was ended", false},
		"lost":            {api.RebootHost, func(k *rebootKit) { k.node(func(n *api.Node) { n.Status.Phase = api.NodeLost }) }, "is lost", false},
		"no majority":     {api.RebootHost, func(k *rebootKit) { k.votes = []string{"n1", "n2"} }, "only 1 of 2 voters", false},
		"the command": {api.RebootHost, func(k *rebootKit) {
			k.steps()
			k.do(func(v *configdb.View, tx *configdb.Txn) error {
				rb, err := configdb.Reboots.Get(v, "n1")
				if err != nil {
					return err
				}
				rb.Status.Refusal = "exit status 1"
				return configdb.Reboots.UpdateStatus(v, tx, &rb)
			})
		}, "command failed: exit status 1", false},
	} {
		t.Run(name, func(t *testing.T) {
			k := newRebootKit(t, c.action, nil)
			c.do(k)
			k.expect(api.TaskFailed, c.words, c.maintenance)
		})
	}
}

func TestRebootIsRefusedForWhatCannotLeave(t *testing.T) {
	k := newRebootKit(t, api.RebootHost, func(s *api.RebootSpec) { s.NoEvacuate = true })
	k.vm("web1", api.PowerRunning)
	k.expect(api.TaskFailed, "vm web1 runs", false)

	k = newRebootKit(t, api.RebootHost, func(s *api.RebootSpec) { s.NoEvacuate, s.Evacuate.Level = true, api.EvacuateStop })
	id := k.vm("db1", api.PowerRunning)
	k.do(func(v *configdb.View, tx *configdb.Txn) error {
		b, err := configdb.Bindings.Get(v, id)
		if err != nil {
			return err
		}
		b.Spec.Protected = true
		return configdb.Bindings.UpdateSpec(v, tx, &b)
	})
	k.expect(api.TaskFailed, "vm db1 is protected", false)
	if k.power(id) != api.PowerRunning {
		t.Error("it is not started again")
	}
}

func TestRebootStartsAgainWhatItShutDown(t *testing.T) {
	k := newRebootKit(t, api.ShutdownHost, func(s *api.RebootSpec) {
		s.NoEvacuate, s.Evacuate.Level, s.Evacuate.ForceStopSeconds = true, api.EvacuateStop, 60
	})
	k.e.now = func() time.Time { return k.clock }
	good, deaf := k.vm("good", api.PowerRunning), k.vm("deaf", api.PowerRunning)
	if st, _ := k.steps(); st.Step != api.RebootEmptying {
		t.Fatalf("a guest ignores the power button: %+v", st)
	}
	k.clock = k.clock.Add(61 * time.Second)
	if st, _ := k.steps(); st.Step != api.RebootLeaving || len(st.Stopped) != 2 {
		t.Fatalf("%+v", st)
	}
	k.quiet = time.Minute
	if st := k.expect(api.TaskSucceeded, "silent", true); st.Step != api.RebootOff {
		t.Fatalf("%+v", st)
	}
	k.host("new")
	k.quiet = 0
	k.expect(api.TaskSucceeded, "", false)
	if k.power(good) != api.PowerRunning || k.power(deaf) != api.PowerRunning || k.at(good) != "m1" {
		t.Error("what was shut down is not started again")
	}
}

func TestRebootIsCancelled(t *testing.T) {
	k := newRebootKit(t, api.RebootHost, func(s *api.RebootSpec) { s.Cancel = true })
	id := k.vm("web1", api.PowerRunning)
	k.expect(api.TaskCancelled, "given up", false)
	if k.at(id) != "m1" {
		t.Error("it moved")
	}
}

func TestRebootWaitsWhileTheNodeLeads(t *testing.T) {
	k := newRebootKit(t, api.RebootHost, nil)
	k.r.self = "n1"
	k.expect(api.TaskRunning, "another node leads", true)
	k.r.self = "n2" // the next leader goes on
	if st, _ := k.steps(); st.Step != api.RebootLeaving {
		t.Fatalf("%+v", st)
	}
}

// TestRebootOfTheLeaderNeedsAnotherOne: nobody hands over to a node in maintenance, so the
// reboot would wait until its deadline. It is told at once, and when that comes to be
// while the node is emptied.
func TestRebootOfTheLeaderNeedsAnotherOne(t *testing.T) {
	maintenance := func(k *rebootKit, on bool) {
		k.do(func(v *configdb.View, tx *configdb.Txn) error {
			n, err := configdb.Nodes.Get(v, "n2")
			if err != nil {
				return err
			}
			n.Spec.Maintenance = on
			return configdb.Nodes.UpdateSpec(v, tx, &n)
		})
	}
	const why = "node m1 leads, and no other voter could lead while it is away: node m2 is in maintenance (muster node maintenance off m2)"
	t.Run("at once", func(t *testing.T) {
		k := newRebootKit(t, api.RebootHost, nil)
		k.r.self, k.votes = "n1", []string{"n1", "n2"}
		web := k.vm("web1", api.PowerRunning)
		maintenance(k, true)
		k.expect(api.TaskFailed, why, false)
		if k.at(web) != "m1" {
			t.Error("it was emptied all the same")
		}
	})
	t.Run("when it is empty", func(t *testing.T) {
		k := newRebootKit(t, api.RebootHost, nil)
		k.r.self, k.votes = "n1", []string{"n1", "n2"}
		k.expect(api.TaskRunning, "another node leads", true)
		maintenance(k, true)
		k.expect(api.TaskFailed, why, false)
	})
	t.Run("who is only away for now is waited for", func(t *testing.T) {
		k := newRebootKit(t, api.RebootHost, nil)
		k.r.self, k.votes = "n1", []string{"n1", "n2"}
		maintenance(k, true)
		k.do(func(_ *configdb.View, tx *configdb.Txn) error {
			rb := api.Reboot{Meta: api.NewMeta(api.KindReboot, "", "m2"), Spec: api.RebootSpec{TaskID: "t2", Node: "m2", Action: api.RebootHost}, Status: api.RebootStatus{Step: api.RebootLeaving}}
			rb.Meta.ID = "n2"
			return configdb.Reboots.CreateUnnamed(tx, &rb)
		})
		if err := rest.AnotherLeads(k.db.Local(), k.votes, "n1", "m1"); err != nil {
			t.Error(err)
		}
	})
}

func TestRebootOfARemovedNodeIsForgotten(t *testing.T) {
	k := newRebootKit(t, api.RebootHost, nil)
	k.steps()
	k.remove("n1")
	if err := k.r.look(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := configdb.Reboots.Get(k.db.Local(), "n1"); api.CodeOf(err) != api.CodeNotFound {
		t.Fatalf("it is still there: %v", err)
	}
}

// Two that were forced, and are due in the same look: the second command would take the
// majority away, which the view of that look does not show.
func TestOfTwoRebootsThatAreDueAtOnceOneLeaves(t *testing.T) {
	k := newRebootKit(t, api.RebootHost, nil)
	k.votes, k.r.self = []string{"n1", "n2", "n3"}, "n3"
	k.node(func(n *api.Node) { n.Status.Phase = api.NodeReady })
	k.do(func(_ *configdb.View, tx *configdb.Txn) error {
		n := api.Node{Meta: api.NewMeta(api.KindNode, "", "m3"), Status: api.NodeStatus{Phase: api.NodeReady, HostBoot: "old"}}
		n.Meta.ID = "n3"
		rb := api.Reboot{Meta: api.NewMeta(api.KindReboot, "", "m2"), Spec: api.RebootSpec{TaskID: "t", Node: "m2", Action: api.RebootHost, NoEvacuate: true, WithinSeconds: 900}}
		rb.Meta.ID = "n2"
		return errors.Join(configdb.Nodes.Create(tx, &n), configdb.Reboots.CreateUnnamed(tx, &rb))
	})
	// Both are judged on the state before either was told.
	v := k.db.Local()
	for _, id := range []string{"n1", "n2"} {
		rb, err := configdb.Reboots.Get(v, id)
		n, nerr := configdb.Nodes.Get(v, id)
		if err := errors.Join(err, nerr, k.r.command(k.Context(), v, &rb, n)); err != nil {
			t.Fatal(err)
		}
	}
	var left []string
	for _, id := range []string{"n1", "n2"} {
		if rb, err := configdb.Reboots.Get(k.db.Local(), id); err != nil || rb.Status.Step == api.RebootLeaving {
			left = append(left, id)
		}
	}
	if len(left) != 1 {
		t.Errorf("told to leave: %v", left)
	}
}

// A voter that is silent is not yet lost: the command waits until it is known what it is.
func TestRebootWaitsForASilentVoter(t *testing.T) {
	k := newRebootKit(t, api.RebootHost, nil)
	k.votes, k.r.self = []string{"n1", "n2", "n3"}, "n3"
	k.do(func(_ *configdb.View, tx *configdb.Txn) error {
		n := api.Node{Meta: api.NewMeta(api.KindNode, "", "m3"), Status: api.NodeStatus{Phase: api.NodeReady}}
		n.Meta.ID = "n3"
		return configdb.Nodes.Create(tx, &n)
	})
	k.quiet = 6 * time.Second
	k.expect(api.TaskRunning, "m2, which votes, is silent", true)
	k.quiet = 0
	k.r.began = k.clock // another leader
	k.expect(api.TaskRunning, "not known yet who answers", true)
	k.clock = k.clock.Add(6 * time.Second)
	if st, _ := k.steps(); st.Step != api.RebootLeaving {
		t.Errorf("%+v", st)
	}
}

// The clock of the leader that gave the command may have been wrong by hours.
func TestARebootHasItsTimeWhateverTheClockOfTheLeaderBefore(t *testing.T) {
	for _, wrong := range []time.Duration{-time.Hour, time.Hour} {
		k := newRebootKit(t, api.RebootHost, nil)
		if st, _ := k.steps(); st.Step != api.RebootLeaving {
			t.Fatalf("%+v", st)
		}
		k.clock, k.quiet = k.clock.Add(-wrong), 20*time.Second
		k.r.began = k.clock // another leader
		clear(k.r.told)
		if st, _ := k.steps(); st.Step != api.RebootLeaving {
			t.Errorf("commanded by a clock that is %v wrong: given up at once: %+v", wrong, st)
		}
		rb, err := configdb.Reboots.Get(k.db.Local(), "n1")
		if err != nil {
			t.Fatal(err)
		}
		k.clock = k.clock.Add(time.Duration(rb.Spec.WithinSeconds)*time.Second + time.Second)
		if st, _ := k.steps(); st.Step == api.RebootLeaving {
			t.Errorf("commanded by a clock that is %v wrong: waited for longer than it may take: %+v", wrong, st)
		}
	}
}

// A shutdown that was cut off before it had its command.
func TestAShutdownThatAnswersAgainIsNoPlannedAbsence(t *testing.T) {
	k := newRebootKit(t, api.ShutdownHost, nil)
	if st, _ := k.steps(); st.Step != api.RebootLeaving {
		t.Fatalf("%+v", st)
	}
	k.quiet, k.clock = 20*time.Second, k.clock.Add(20*time.Second)
	if st, _ := k.steps(); st.Step != api.RebootOff {
		t.Fatalf("%+v", st)
	}
	k.quiet, k.clock = 0, k.clock.Add(time.Minute)
	if st, _ := k.steps(); st.Step != api.RebootOff {
		t.Fatalf("too early: %+v", st)
	}
	k.clock = k.clock.Add(5 * time.Minute)
	if st, n := k.steps(); st.Step != api.RebootReturning || n.Status.Absence != nil || !n.Spec.Maintenance {
		t.Errorf("%+v, %+v", st, n.Status.Absence)
	}
}
