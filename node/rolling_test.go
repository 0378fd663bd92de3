// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
)

// otherPlace is placement that takes the first other node which takes VMs, and refuses
// some VMs while they run.
type otherPlace struct {
	restPlacer
	refuse map[string]bool
}

func (p otherPlace) ChooseOther(v *configdb.View, vm api.VM, exclude map[string]string, _ string, _ []string) (string, string, error) {
	nodes, err := configdb.Nodes.List(v)
	for _, n := range nodes {
		if !p.refuse[vm.Meta.Name] && exclude[n.Meta.ID] == "" && !n.Spec.Maintenance && n.Status.Phase == api.NodeReady {
			return n.Meta.ID, n.Meta.Name, nil
		}
	}
	return "", "", errors.Join(err, api.Errorf(api.CodeUnplaceable, "no node has its device"))
}

func (p otherPlace) Reserve(*configdb.View, *configdb.Txn, string) {}

// rollingKit is a cluster of three nodes, with all that the leader does for a rolling
// reboot. Hosts reboot when they are told to, unless they are stuck.
type rollingKit struct {
	*evacKit
	refuse  map[string]bool
	leader  string // the ID
	votes   []string
	clock   time.Time     // of the day
	boot    time.Duration // CLOCK_BOOTTIME
	stuck   map[string]bool
	ill     map[string]string
	e       *evacuation
	reboots *reboots
	rolling *rolling
	order   []string // nodes as they got their commands
	boots   int
	leads   []string // who led at each command
}

func newRollingKit(t *testing.T, nodes ...string) *rollingKit {
	k := &rollingKit{evacKit: &evacKit{T: t, db: storetest.New(t)}, votes: []string{"n1", "n2", "n3"}, refuse: map[string]bool{}, clock: time.Unix(1e9, 0), stuck: map[string]bool{}, ill: map[string]string{}}
	for _, id := range []string{"n1", "n2", "n3"} {
		n := api.Node{Meta: api.NewMeta(api.KindNode, "", "m"+id[1:]), Status: api.NodeStatus{Phase: api.NodeReady, HostBoot: "first"}}
		n.Meta.ID = id
		k.do(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Nodes.Create(tx, &n) })
	}
	task := api.Task{Meta: api.NewMeta(api.KindTask, "", "t")}
	task.Meta.ID = "t"
	rr := api.RollingReboot{Meta: api.NewMeta(api.KindRollingReboot, "", "c"), Spec: api.RollingRebootSpec{
		TaskID: "t", WithinSeconds: 900, Evacuate: api.EvacuateRequest{Level: api.EvacuateLive, Parallel: 2},
	}}
	rr.Meta.ID = "c"
	for _, id := range nodes {
		rr.Spec.Nodes = append(rr.Spec.Nodes, api.RollingNode{ID: id, Node: "m" + id[1:], HostBoot: "first"})
	}
	k.do(func(_ *configdb.View, tx *configdb.Txn) error {
		return errors.Join(configdb.Tasks.CreateUnnamed(tx, &task), configdb.RollingReboots.CreateUnnamed(tx, &rr))
	})
	k.lead("n1")
	return k
}

// lead gives the leadership to a node, whose services know nothing but the database.
func (k *rollingKit) lead(id string) {
	placer, log := otherPlace{refuse: k.refuse}, slog.New(slog.NewTextHandler(k.Output(), nil))
	voters := func() ([]string, error) { return k.votes, nil }
	silence := func(id string) time.Duration {
		if k.away(id) {
			return time.Minute
		}
		return 0
	}
	now := func() time.Time { return k.clock }
	k.leader = id
	k.e = newEvacuation(k.db, placer, 1, log)
	k.e.now = now
	k.reboots = &reboots{db: k.db, placer: placer, log: log, term: 1, self: id, voters: voters, silence: silence, now: now, told: map[string]time.Time{}}
	k.rolling = &rolling{
		db: k.db, log: log, term: 1, self: id, voters: voters, silence: silence, now: now, clock: func() time.Duration { return k.boot }, forecast: forecaster{placer}.Forecast,
		replicas: func(context.Context) (map[string]string, error) { return k.ill, nil },
	}
}

func (k *rollingKit) pass(d time.Duration) { k.clock, k.boot = k.clock.Add(d), k.boot+d }

// away reports that a host has its command, and does not come back.
func (k *rollingKit) away(id string) bool {
	rb, err := configdb.Reboots.Get(k.db.Local(), id)
	return err == nil && rb.Status.Step == api.RebootLeaving && k.stuck[id]
}

func (k *rollingKit) node(id string, f func(*api.Node)) {
	k.do(func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Get(v, id)
		if err != nil {
			return err
		}
		f(&n)
		return errors.Join(configdb.Nodes.UpdateSpec(v, tx, &n), configdb.Nodes.UpdateStatus(v, tx, &n))
	})
}

// look lets everybody do one step.
func (k *rollingKit) look() api.RollingRebootStatus {
	k.Helper()
	for _, f := range []func(context.Context) error{k.rolling.look, k.reboots.look, k.e.look} {
		if err := f(k.Context()); err != nil {
			k.Fatal(err)
		}
	}
	k.arrive()
	if n, err := configdb.Nodes.Get(k.db.Local(), k.leader); err == nil && n.Spec.Maintenance { // as voters.go does
		k.lead(map[string]string{"n1": "n2", "n2": "n3", "n3": "n1"}[k.leader])
	}
	all, err := configdb.Reboots.List(k.db.Local())
	if err != nil {
		k.Fatal(err)
	}
	for _, rb := range all {
		if rb.Status.Step != api.RebootLeaving {
			continue
		}
		if !slices.Contains(k.order, rb.Meta.ID) {
			k.order, k.leads = append(k.order, rb.Meta.ID), append(k.leads, k.leader)
		}
		if !k.stuck[rb.Meta.ID] {
			k.boots++
			k.node(rb.Meta.ID, func(n *api.Node) { n.Status.HostBoot = fmt.Sprintf("boot %d", k.boots) })
		}
	}
	return k.status()
}

// arrive ends every migration well.
func (k *rollingKit) arrive() {
	ops, _ := configdb.Operations.List(k.db.Local())
	for _, op := range ops {
		k.do(func(v *configdb.View, tx *configdb.Txn) error {
			arr, err := configdb.Arrivals.Get(v, op.Meta.ID)
			b, berr := configdb.Bindings.Get(v, op.Meta.ID)
			vm, verr := configdb.VMs.Get(v, op.Meta.ID)
			if err := errors.Join(err, berr, verr); err != nil {
				return err
			}
			configdb.Operations.DeleteUnnamed(tx, &op)
			configdb.Arrivals.DeleteUnnamed(tx, &arr)
			b.Spec.NodeID, b.Spec.Node = op.Spec.Migration.NodeID, op.Spec.Migration.Node
			b.Spec.Epoch++
			vm.Status.Node, vm.Status.Epoch = b.Spec.Node, b.Spec.Epoch
			return errors.Join(configdb.Bindings.UpdateSpec(v, tx, &b), configdb.VMs.UpdateStatus(v, tx, &vm))
		})
	}
}

func (k *rollingKit) status() api.RollingRebootStatus {
	k.Helper()
	rr, err := configdb.RollingReboots.Get(k.db.Local(), "c")
	if err != nil {
		k.Fatal(err)
	}
	return rr.Status
}

// until looks until a condition holds.
func (k *rollingKit) until(what string, ok func(api.RollingRebootStatus) bool) api.RollingRebootStatus {
	k.Helper()
	var st api.RollingRebootStatus
	for range 60 {
		if st = k.look(); ok(st) {
			return st
		}
	}
	k.Fatalf("%s: not reached: %+v", what, st)
	return st
}

func (k *rollingKit) ends(phase api.TaskPhase, words ...string) api.RollingRebootStatus {
	k.Helper()
	st := k.until("the end", func(st api.RollingRebootStatus) bool { return st.Phase.Final() })
	for _, w := range words {
		if !strings.Contains(st.Message, w) {
			k.Errorf("%q is not in %q", w, st.Message)
		}
	}
	if st.Phase != phase {
		k.Fatalf("%+v", st)
	}
	return st
}

// TestRollingRebootOfTheLeaderNeedsAnotherOne: that nobody could lead in its turn, which
// is the last, is told before the first.
func TestRollingRebootOfTheLeaderNeedsAnotherOne(t *testing.T) {
	k := newRollingKit(t, "n1", "n2", "n3")
	for _, id := range []string{"n2", "n3"} {
		k.node(id, func(n *api.Node) { n.Spec.Maintenance = true })
	}
	k.ends(api.TaskFailed, "node m1 leads, and no other voter could lead", "node m2 is in maintenance", "node m3 is in maintenance", "left: m2, m3, m1")
	if len(k.order) > 0 {
		t.Errorf("%v were rebooted", k.order)
	}
	// Without the leader in it there is nothing to be said.
	k = newRollingKit(t, "n2")
	for _, id := range []string{"n2", "n3"} {
		k.node(id, func(n *api.Node) { n.Spec.Maintenance = true })
	}
	k.until("the first one is told", func(api.RollingRebootStatus) bool { return len(k.order) > 0 })
}

// TestRollingRebootOfTheLeaderWaitsForAnotherOne: that nobody could lead any more when
// its turn comes is waited for as anything else is that is not well, and nothing is emptied.
func TestRollingRebootOfTheLeaderWaitsForAnotherOne(t *testing.T) {
	k := newRollingKit(t, "n1")
	web := k.vm("web", api.PowerRunning)
	k.ill["n2"] = "lacks 5000 entries"
	k.until("it is checked", func(st api.RollingRebootStatus) bool { return st.Checked && st.WaitsSince != nil })
	maintenance := func(on bool) {
		for _, id := range []string{"n2", "n3"} {
			k.node(id, func(n *api.Node) { n.Spec.Maintenance = on })
		}
	}
	maintenance(true)
	clear(k.ill)
	k.until("it waits", func(st api.RollingRebootStatus) bool {
		return strings.Contains(st.Message, "waits: node m1 leads, and no other voter could lead")
	})
	if rb, _ := configdb.Reboots.List(k.db.Local()); len(rb) > 0 || k.at(web) != "m1" {
		t.Errorf("it has begun: %+v", rb)
	}
	maintenance(false)
	k.ends(api.TaskSucceeded, "rebooted: m1")
}

func TestRollingRebootTakesTheLeaderLast(t *testing.T) {
	k := newRollingKit(t, "n1", "n2", "n3")
	a, b := k.vm("a", api.PowerRunning), k.vm("b", api.PowerRunning)
	st := k.ends(api.TaskSucceeded, "rebooted: m1, m2, m3")
	if !slices.Equal(k.order, []string{"n2", "n3", "n1"}) || !slices.Equal(k.leads, []string{"n1", "n1", "n2"}) {
		t.Errorf("%v, led by %v", k.order, k.leads)
	}
	if st.Current != "" || st.Failed != "" || len(st.Left) > 0 {
		t.Errorf("%+v", st)
	}
	for _, id := range []string{"n1", "n2", "n3"} {
		if n, _ := configdb.Nodes.Get(k.db.Local(), id); n.Spec.Maintenance || n.Status.Absence != nil {
			t.Errorf("%+v %+v", n.Spec, n.Status)
		}
	}
	if left, _ := configdb.Reboots.List(k.db.Local()); len(left) > 0 {
		t.Errorf("%+v", left)
	}
	for _, id := range []string{a, b} {
		if vm, _ := configdb.VMs.Get(k.db.Local(), id); vm.Spec.Power != api.PowerRunning || k.at(id) == "m1" {
			t.Errorf("%s: %+v", k.at(id), vm.Spec)
		}
	}
}

// The leader dies while a node is away; the next one knows the database alone.
func TestRollingRebootGoesOnUnderTheNextLeader(t *testing.T) {
	k := newRollingKit(t, "n1", "n2", "n3")
	k.vm("a", api.PowerRunning)
	k.stuck["n2"] = true
	k.until("m2 is away", func(api.RollingRebootStatus) bool { return k.away("n2") })
	k.lead("n3")
	k.look()
	if st := k.look(); st.Current != "n2" {
		t.Fatalf("%+v", st)
	}
	k.stuck["n2"] = false
	k.ends(api.TaskSucceeded)
	if !slices.Equal(k.order, []string{"n2", "n1", "n3"}) {
		t.Errorf("%v", k.order)
	}
}

func TestRollingRebootStopsAtANodeThatDoesNotComeBack(t *testing.T) {
	k := newRollingKit(t, "n1", "n2", "n3")
	k.stuck["n2"] = true
	k.until("m2 is away", func(api.RollingRebootStatus) bool { return k.away("n2") })
	k.clock = k.clock.Add(901 * time.Second)
	st := k.ends(api.TaskFailed, "node m2: it is not back after 900 s", "rebooted: none", "left: m3, m1", "--continue")
	if st.Failed != "m2" || !slices.Equal(k.order, []string{"n2"}) {
		t.Errorf("%+v, %v", st, k.order)
	}
	if n, _ := configdb.Nodes.Get(k.db.Local(), "n2"); !n.Spec.Maintenance {
		t.Error("it takes VMs")
	}
	// It comes back by itself; the next one goes on, when its maintenance is over.
	k.node("n2", func(n *api.Node) { n.Status.HostBoot = "late" })
	k.again()
	k.until("it waits", func(st api.RollingRebootStatus) bool {
		return strings.Contains(st.Message, "node m2 is in maintenance: muster node maintenance off m2")
	})
	k.node("n2", func(n *api.Node) { n.Spec.Maintenance = false })
	k.ends(api.TaskSucceeded, "rebooted: m1, m2, m3")
	if !slices.Equal(k.order, []string{"n2", "n3", "n1"}) {
		t.Errorf("%v", k.order)
	}
}

// again is --continue, as rest writes it.
func (k *rollingKit) again() {
	k.do(func(v *configdb.View, tx *configdb.Txn) error {
		rr, err := configdb.RollingReboots.Get(v, "c")
		if err != nil {
			return err
		}
		rr.Spec.Cancel = false
		rr.Status = api.RollingRebootStatus{Phase: api.TaskPending}
		return errors.Join(configdb.RollingReboots.UpdateSpec(v, tx, &rr), configdb.RollingReboots.UpdateStatus(v, tx, &rr))
	})
}

func (k *rollingKit) cancel() {
	k.do(func(v *configdb.View, tx *configdb.Txn) error {
		rr, err := configdb.RollingReboots.Get(v, "c")
		if err != nil {
			return err
		}
		rr.Spec.Cancel = true
		return configdb.RollingReboots.UpdateSpec(v, tx, &rr)
	})
}

func TestRollingRebootIsCancelled(t *testing.T) {
	t.Run("while a node is being emptied", func(t *testing.T) {
		k := newRollingKit(t, "n1", "n2", "n3")
		k.until("m2 is next", func(st api.RollingRebootStatus) bool { return st.Current == "n2" })
		k.cancel()
		k.ends(api.TaskCancelled, "given up", "rebooted: none", "left: m2, m3, m1")
		if len(k.order) > 0 {
			t.Errorf("%v", k.order)
		}
		if n, _ := configdb.Nodes.Get(k.db.Local(), "n2"); n.Spec.Maintenance {
			t.Error("it stays in maintenance")
		}
	})
	t.Run("after a host has its command", func(t *testing.T) {
		k := newRollingKit(t, "n1", "n2", "n3")
		k.stuck["n2"] = true
		k.until("m2 is away", func(api.RollingRebootStatus) bool { return k.away("n2") })
		k.cancel()
		k.until("it says so", func(st api.RollingRebootStatus) bool { return strings.Contains(st.Message, "given up after node m2") })
		k.stuck["n2"] = false
		k.ends(api.TaskCancelled, "given up", "rebooted: m2", "left: m3, m1")
		k.again()
		k.ends(api.TaskSucceeded)
		if !slices.Equal(k.order, []string{"n2", "n3", "n1"}) {
			t.Errorf("%v", k.order)
		}
	})
}

func TestRollingRebootWaitsUntilAllIsWellButNotForEver(t *testing.T) {
	for name, c := range map[string]struct {
		spoil, mend func(k *rollingKit)
		words       string
	}{
		"a replica lags": {func(k *rollingKit) { k.ill["n2"] = "lacks 5000 entries" }, func(k *rollingKit) { clear(k.ill) }, "node m2: lacks 5000 entries"},
		"a node is lost": {
			func(k *rollingKit) { k.node("n3", func(n *api.Node) { n.Status.Phase = api.NodeLost }) },
			func(k *rollingKit) { k.node("n3", func(n *api.Node) { n.Status.Phase = api.NodeReady }) }, "node m3 is lost",
		},
		"another is cut off": {
			func(k *rollingKit) { k.node("n1", func(n *api.Node) { n.Status.CutOff = &api.CutOff{} }) },
			func(k *rollingKit) { k.node("n1", func(n *api.Node) { n.Status.CutOff = nil }) }, "node m1 is cut off",
		},
		"a VM is being recovered": {
			func(k *rollingKit) { k.recovery(api.TaskRunning) }, func(k *rollingKit) { k.recovery(api.TaskSucceeded) }, "vm db1 is being recovered",
		},
	} {
		for _, mended := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, mended %v", name, mended), func(t *testing.T) {
				k := newRollingKit(t, "n2", "n3")
				k.stuck["n2"] = true
				k.until("m2 is away", func(api.RollingRebootStatus) bool { return k.away("n2") })
				c.spoil(k)
				k.stuck["n2"] = false
				k.until("it waits", func(st api.RollingRebootStatus) bool { return strings.Contains(st.Message, "waits: "+c.words) })
				if !mended {
					k.pass(settleWithin + time.Second)
					k.ends(api.TaskFailed, "within 10m0s: "+c.words, "rebooted: m2", "left: m3")
					return
				}
				k.pass(settleWithin - time.Second)
				k.look()
				c.mend(k)
				k.ends(api.TaskSucceeded)
			})
		}
	}
}

// TestRollingRebootWaitsAsLongWhateverTheClock: the clock of the leader is set by hours, or
// that of the next one differs.
func TestRollingRebootWaitsAsLongWhateverTheClock(t *testing.T) {
	for _, step := range []time.Duration{-3 * time.Hour, 3 * time.Hour} {
		for _, next := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v, another leads %v", step, next), func(t *testing.T) {
				k := newRollingKit(t, "n2", "n3")
				k.ill["n2"] = "lacks 5000 entries"
				waits := func() {
					t.Helper()
					if st := k.look(); st.Phase.Final() || st.WaitsSince == nil {
						t.Fatalf("%+v", st)
					}
				}
				k.until("it waits", func(st api.RollingRebootStatus) bool { return st.WaitsSince != nil })
				k.pass(time.Minute)
				k.clock = k.clock.Add(step)
				left := settleWithin - time.Minute
				if next {
					k.boot = 5 * time.Hour // that of another host
					k.lead("n3")
					left = settleWithin // it counts anew
				}
				waits()
				k.pass(left)
				waits()
				k.pass(time.Second)
				k.ends(api.TaskFailed, "within 10m0s: node m2: lacks 5000 entries")
			})
		}
	}
}

func (k *rollingKit) recovery(phase api.TaskPhase) {
	k.do(func(v *configdb.View, tx *configdb.Txn) error {
		task, err := configdb.Tasks.Get(v, "recovery")
		task.Status.Phase = phase
		if err == nil {
			return configdb.Tasks.UpdateStatus(v, tx, &task)
		}
		task.Meta = api.NewMeta(api.KindTask, "", "recovery")
		task.Meta.ID, task.Spec.Action, task.Spec.Target = "recovery", api.ActionVMRecover, "db1"
		return configdb.Tasks.CreateUnnamed(tx, &task)
	})
}

// What can be known is known before the first node is touched.
func TestRollingRebootChecksEveryNodeFirst(t *testing.T) {
	k := newRollingKit(t, "n2", "n3", "n1")
	k.refuse["pinned"] = true
	k.vm("pinned", api.PowerRunning) // on the node whose turn is last
	k.ends(api.TaskFailed, "node m1 could not be emptied: vm pinned runs", "rebooted: none")
	for _, id := range []string{"n1", "n2", "n3"} {
		if n, _ := configdb.Nodes.Get(k.db.Local(), id); n.Meta.Generation != 1 {
			t.Errorf("%s was touched", id)
		}
	}
}

// A host that was rebooted past Muster, or a node that is gone, has had its turn.
func TestRollingRebootPassesOver(t *testing.T) {
	k := newRollingKit(t, "n2", "n3")
	k.until("m2 is next", func(st api.RollingRebootStatus) bool { return st.Current == "n2" })
	k.node("n3", func(n *api.Node) { n.Status.HostBoot = "by hand" })
	k.ends(api.TaskSucceeded, "rebooted: m2, m3")

	k = newRollingKit(t, "n2", "n3")
	k.until("m2 is next", func(st api.RollingRebootStatus) bool { return st.Current == "n2" })
	k.votes = []string{"n1"} // as it is settled without it
	k.remove("n2")
	k.ends(api.TaskSucceeded, "rebooted: m3")
	if !slices.Equal(k.order, []string{"n3"}) {
		t.Errorf("%v", k.order)
	}
}

func TestForecastSaysWhatWouldBecomeOfEachVM(t *testing.T) {
	k := newRollingKit(t)
	k.refuse["pinned"] = true
	run, off, pinned, starting := k.vm("run", api.PowerRunning), k.vm("off", api.PowerStopped), k.vm("pinned", api.PowerRunning), k.vm("starting", api.PowerStopped)
	k.do(func(v *configdb.View, tx *configdb.Txn) error {
		vm, err := configdb.VMs.Get(v, starting)
		vm.Spec.Power, vm.Status.Phase = api.PowerRunning, api.VMStarting
		return errors.Join(err, configdb.VMs.UpdateSpec(v, tx, &vm), configdb.VMs.UpdateStatus(v, tx, &vm))
	})
	before := k.db.Local().Revision()
	n1, _ := configdb.Nodes.Get(k.db.Local(), "n1")
	for name, c := range map[string]struct {
		level   api.EvacuationLevel
		stay    bool
		fates   map[string]api.PlannedFate
		to      map[string]string
		refusal string
	}{
		"live":       {api.EvacuateLive, false, map[string]api.PlannedFate{"run": api.FateMigrate, "off": api.FateMove, "pinned": api.FateStay, "starting": api.FateStay}, map[string]string{"run": "m2", "off": "m2", "pinned": "m1"}, "vm pinned runs"},
		"stop":       {api.EvacuateStop, false, map[string]api.PlannedFate{"run": api.FateMigrate, "off": api.FateMove, "pinned": api.FateRestart, "starting": api.FateStay}, map[string]string{"pinned": "m1"}, ""},
		"stop, stay": {api.EvacuateStop, true, map[string]api.PlannedFate{"run": api.FateRestart, "off": api.FateStay, "pinned": api.FateRestart, "starting": api.FateStay}, map[string]string{"run": "m1"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			in := api.EvacuateRequest{Level: c.level}
			plan, err := forecaster{otherPlace{refuse: k.refuse}}.Forecast(t.Context(), k.db.Local(), []api.Node{n1}, in, c.stay)
			if err != nil || len(plan) != 1 || len(plan[0].VMs) != 4 {
				t.Fatalf("%+v, %v", plan, err)
			}
			for _, vm := range plan[0].VMs {
				if vm.Fate != c.fates[vm.VM] || c.to[vm.VM] != "" && vm.To != c.to[vm.VM] {
					t.Errorf("%+v", vm)
				}
			}
			if got := plan[0].Refusal; (got == "") != (c.refusal == "") || !strings.Contains(got, c.refusal) {
				t.Errorf("refusal %q", got)
			}
		})
	}
	if k.db.Local().Revision() != before || k.at(run) != "m1" || k.at(off) != "m1" || k.at(pinned) != "m1" {
		t.Error("it changed something")
	}
}
