// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
	"github.com/muster-vm/muster/ha/plan"
)

// chaosFree is a world without chance: five nodes, node 0 leads, nothing moves.
func chaosFree(t *testing.T) *world {
	w := newWorld(t, 1, 5, everyRule)
	w.nested = true // no decision is interrupted by itself
	return w
}

// votedFor makes node i the leader of a term by the votes of these, of which nobody knows yet.
func (w *world) votedFor(i int, term uint64, voters ...int) {
	w.lead, w.term = i, term
	for _, v := range voters {
		w.nodes[v].voter = term
	}
}

func (w *world) phase(i int) api.NodePhase {
	n, err := configdb.Nodes.Get(w.mem.Local(), w.nodes[i].id)
	must(w.t, err)
	return n.Status.Phase
}

func (w *world) bindingOn(i int) api.Binding {
	w.t.Helper()
	bindings, err := configdb.Bindings.List(w.mem.Local())
	must(w.t, err)
	for j := range bindings {
		if bindings[j].Spec.NodeID == w.nodes[i].id {
			return bindings[j]
		}
	}
	w.t.Fatalf("no vm is bound to node %d", i)
	return api.Binding{}
}

// lose makes the leader declare node i lost, all others having renewed.
func (w *world) lose(i int) {
	w.t.Helper()
	leader, ctx := w.nodes[0], context.Background()
	leader.svc.grant.overdue(1, nil) // the leadership begins here
	for w.phase(i) != api.NodeLost {
		w.now += time.Second
		for _, n := range w.nodes {
			if n.i != i {
				_, err := leader.svc.grant.renew(ctx, n.id)
				must(w.t, err)
			}
		}
		for _, id := range leader.svc.grant.overdue(1, leader.svc.readyNodes()) {
			leader.svc.declareLost(ctx, 1, id)
		}
		if w.now > time.Minute {
			w.t.Fatal("a silent node is never declared lost")
		}
	}
}

func TestSilentNodeIsLostAfterTheBoundAndNotBefore(t *testing.T) {
	w := chaosFree(t)
	w.nodes[0].rate = 1
	w.lose(3)
	if w.now < LostAfter || w.now > LostAfter+2*time.Second {
		t.Errorf("lost after %v, want %v", w.now, LostAfter)
	}
	if _, err := w.nodes[0].svc.grant.renew(context.Background(), w.nodes[3].id); err == nil {
		t.Error("a lost node was granted a lease")
	}
}

func TestProtectedVMMovesOnceAndKeepsItsDecision(t *testing.T) {
	w := chaosFree(t)
	b := w.bindingOn(3)
	w.lose(3)
	for range 2 {
		if _, err := w.nodes[0].svc.recover(context.Background(), 1); err != nil {
			t.Fatal(err)
		}
	}
	got, err := configdb.Bindings.Get(w.mem.Local(), b.Meta.ID)
	must(t, err)
	if got.Spec.Epoch != 2 || got.Spec.NodeID == b.Spec.NodeID || !got.Spec.Protected {
		t.Errorf("binding after recovery: %+v", got.Spec)
	}
	vm, err := configdb.VMs.Get(w.mem.Local(), b.Meta.ID)
	must(t, err)
	if vm.Status.Epoch != 2 || vm.Status.Phase != api.VMStarting || vm.Status.Node != got.Spec.Node {
		t.Errorf("status was not handed over: %+v", vm.Status)
	}
	tasks, err := configdb.Tasks.List(w.mem.Local())
	must(t, err)
	if len(tasks) != 1 || tasks[0].Spec.Action != api.ActionVMRecover || tasks[0].Spec.TargetEpoch != 2 {
		t.Errorf("recovery tasks: %+v", tasks)
	}
}

// The place of a VM that is to follow others is held at once; its start is the new
// owner's business, who is told in the same transaction.
func TestAVMThatFollowsOthersIsBoundAtOnce(t *testing.T) {
	w := chaosFree(t)
	b := w.bindingOn(3)
	_, err := configdb.Transact(context.Background(), w.mem, "test", 4, func(v *configdb.View, tx *configdb.Txn) error {
		vm, err := configdb.VMs.Get(v, b.Meta.ID)
		if err != nil {
			return err
		}
		vm.Spec.Recovery = &api.VMRecovery{StartAfter: api.StartAfter{After: []string{"db1"}, AfterWaitSeconds: 600}}
		return configdb.VMs.UpdateSpec(v, tx, &vm)
	})
	must(t, err)
	w.lose(3)
	_, err = w.nodes[0].svc.recover(context.Background(), 1)
	must(t, err)
	vm, err := configdb.VMs.Get(w.mem.Local(), b.Meta.ID)
	must(t, err)
	if vm.Status.Epoch != 2 || vm.Status.Awaits == nil || vm.Status.Awaits.Epoch != 2 {
		t.Errorf("%+v", vm.Status)
	}
	tasks, err := configdb.Tasks.List(w.mem.Local())
	must(t, err)
	if len(tasks) != 1 || time.Until(tasks[0].Spec.Deadline) < 10*time.Minute {
		t.Errorf("recovery tasks: %+v", tasks)
	}
}

// A node that was recovered into a later life has no lease here, and runs its VMs.
func TestVMsOfANodeOfALaterLifeStay(t *testing.T) {
	w := chaosFree(t)
	b := w.bindingOn(3)
	w.lose(3)
	tx := &configdb.Txn{}
	tx.Put(configdb.LaterLifeKey(b.Spec.NodeID), []byte("it said so"))
	_, err := w.mem.Txn(context.Background(), tx)
	must(t, err)
	if _, err := w.nodes[0].svc.recover(context.Background(), 1); err != nil {
		t.Fatal(err)
	}
	got, err := configdb.Bindings.Get(w.mem.Local(), b.Meta.ID)
	must(t, err)
	if got.Spec.Epoch != b.Spec.Epoch || got.Spec.NodeID != b.Spec.NodeID {
		t.Errorf("it was moved: %+v", got.Spec)
	}
}

// interruptedPlacer readmits the lost node while its VM is being placed.
type interruptedPlacer struct {
	Placer
	interrupt func()
}

func (p interruptedPlacer) Load(s *plan.State) (plan.Fleet, error) {
	p.interrupt()
	return p.Placer.Load(s)
}

func TestMoveDoesNotLandAfterReadmission(t *testing.T) {
	w := chaosFree(t)
	leader, b := w.nodes[0], w.bindingOn(3)
	w.lose(3)
	leader.svc.placer = interruptedPlacer{leader.svc.placer, func() {
		must(t, leader.svc.readmit(context.Background(), 1, w.nodes[3].id))
	}}
	_, _, err := leader.svc.recoverSome(context.Background(), 1, recoverBatch)
	if !errors.Is(err, configdb.ErrConflict) {
		t.Errorf("recover: %v, want a conflict", err)
	}
	got, err := configdb.Bindings.Get(w.mem.Local(), b.Meta.ID)
	must(t, err)
	if got.Spec.Epoch != 1 {
		t.Error("the vm was moved away from a node that is back")
	}
}

// slowLeader does something while a majority is being asked.
type slowLeader struct {
	Leader
	meanwhile func()
}

func (l slowLeader) Confirm(ctx context.Context, term uint64) error {
	l.meanwhile()
	return l.Leader.Confirm(ctx, term)
}

func TestGrantUnderWayWhileTheNodeIsDeclaredLostIsRefused(t *testing.T) {
	w := chaosFree(t)
	leader, n := w.nodes[0], w.nodes[3]
	grant := leader.svc.grant
	grant.overdue(1, nil)
	w.now = LostAfter + time.Second
	for _, silent := range []struct {
		name string
		do   func()
	}{
		{"barred, not yet declared", func() { grant.overdue(1, []string{n.id}) }},
		{"declared", func() { leader.svc.declareLost(context.Background(), 1, n.id) }},
	} {
		grant.leader = slowLeader{leader, silent.do}
		if _, err := grant.renew(context.Background(), n.id); err == nil {
			t.Errorf("%s: the lease was granted", silent.name)
		}
	}
}

// A new leader may know that nobody was granted anything for a while before it led; of
// the node that led, it may know that it was silent, too.
func TestANewLeaderCountsFromWhatTheVotersRemember(t *testing.T) {
	for name, x := range map[string]struct {
		ago, sooner time.Duration
		by          int
	}{
		"nothing":                       {0, 0, 3},
		"what came after its beginning": {500 * time.Millisecond, 0, 3},
		"two seconds before it":         {3 * time.Second, 2*time.Second - 30*time.Millisecond, 3}, // less the drift
		"a long time":                   {time.Hour, maxCredit, 3},
		"not who led":                   {time.Hour, 0, -1},
	} {
		t.Run(name, func(t *testing.T) {
			w := chaosFree(t)
			g := w.nodes[0].svc.grant
			former, other := w.nodes[3].id, w.nodes[4].id
			both := []string{former, other}
			g.begin(5)
			since := func(d time.Duration) {
				for end := w.now + d - (g.now() - g.since); w.now < end; g.looks(5) {
					w.now = min(end, w.now+detectEvery)
				}
			}
			since(time.Second)
			g.credit(4, configdb.Confirmed{Ago: time.Hour, By: other}) // of an earlier leadership
			c := configdb.Confirmed{Ago: x.ago}
			if x.by >= 0 {
				c.By = w.nodes[x.by].id
			}
			g.credit(5, c)
			const bit = 50 * time.Millisecond
			sooner := min(x.sooner, maxFenceCredit) // a request that hangs, and the next, fit in
			since(FenceAfter - sooner - bit)
			if got := g.silentOf(5, both); len(got) != 0 {
				t.Errorf("too soon silent: %v", got)
			}
			since(FenceAfter - sooner + bit)
			want := []string{former}
			if sooner == 0 {
				want = both
			}
			if got := g.silentOf(5, both); !slices.Equal(got, want) {
				t.Errorf("silent are %v, want %v", got, want)
			}
			since(LostAfter - x.sooner - bit)
			if got := g.overdue(5, both); len(got) != 0 {
				t.Errorf("too soon overdue: %v", got)
			}
			since(LostAfter - x.sooner + bit)
			_, from := g.leaseless(other)
			if got := g.overdue(5, both); !slices.Equal(got, both) || (from == api.SinceEarlier) != (x.sooner > 0) {
				t.Errorf("overdue are %v, which counts from %q", got, from)
			}
		})
	}
}

// A leader that stands still for seconds as soon as it is elected hears nobody, and the
// node that led before is not sooner silent than the others by that.
func TestALeaderThatWasAsleepShootsNoFormerLeader(t *testing.T) {
	for _, early := range []bool{true, false} { // the voters' answer comes before, or after
		w := chaosFree(t)
		g := w.nodes[0].svc.grant
		former := w.nodes[3].id
		credit := func() { g.credit(5, configdb.Confirmed{Ago: time.Hour, By: former}) }
		g.begin(5)
		if early {
			credit()
		}
		w.now += FenceAfter - 500*time.Millisecond
		g.looks(5)
		if !early {
			credit()
		}
		if got := g.silentOf(5, []string{former}); len(got) != 0 {
			t.Errorf("silent: %v", got)
		}
		w.now += time.Second
		g.looks(5)
		if got := g.silentOf(5, []string{former}); len(got) != 1 {
			t.Error("it is never silent")
		}
	}
}

// reach cuts off all but some nodes.
func (w *world) reach(nodes ...int) {
	for _, o := range w.nodes {
		o.cutOff = !slices.Contains(nodes, o.i)
	}
}

// leased has a node get a lease of a leader, at once.
func (n *simNode) leased(leader *simNode) {
	n.w.t.Helper()
	ctx, sent := context.Background(), n.clock()
	a, err := leader.svc.grant.renew(ctx, n.id)
	must(n.w.t, err)
	must(n.w.t, n.keeper.extend(ctx, sent+LeaseDuration, a))
}

// loses has a new leader ask the voters, and then goes on until a silent node is lost.
func (n *simNode) loses(silent *simNode) {
	n.w.t.Helper()
	ctx, end := context.Background(), n.w.now+time.Minute
	n.svc.Begin(n.w.term)
	must(n.w.t, n.svc.learn(ctx, n.w.term))
	for n.w.phase(silent.i) != api.NodeLost {
		if n.w.now += 100 * time.Millisecond; n.w.now > end {
			n.w.t.Fatal("it is never lost")
		}
		n.detect(impatient{ctx}, n.w.term)
	}
}

// It takes a majority of them: the last lease of an earlier leader may have been granted
// with the voices of others than those who answer.
func TestAMajorityOfTheVotersRemembers(t *testing.T) {
	for _, c := range []struct {
		off      rule
		restarts bool // the daemon of the voter that both have asked
	}{{everyRule, false}, {majorityRemembers, false}, {everyRule, true}, {whoBeginsAnewMayHaveTold, true}} {
		off := c.off
		w := chaosFree(t)
		ctx := context.Background()
		w.off, w.now = off, time.Minute
		n, former, leader := w.nodes[1], w.nodes[0], w.nodes[4]
		w.reach(0, 3, 4)
		must(t, former.Confirm(ctx, 1))
		w.now += time.Minute
		w.reach(0, 1, 2)
		n.leased(former)
		w.reach(2, 3, 4)
		if c.restarts {
			w.nodes[2].restartDaemon()
			w.nodes[2].frozen = 0
		}
		w.votedFor(leader.i, 2, 2, 3, 4)
		former.leads = false
		leader.leads, leader.believes = true, configdb.Leadership{Term: w.term}
		leader.loses(n)
		if early := n.clock() < n.deadline+KillTime; early != (off != everyRule) {
			t.Errorf("lost before its guard is done: %v; the rule is off: %v", early, off != everyRule)
		}
	}
}

// The list of voters may change twice after a grant was asked for, and then nobody of the
// majority that confirmed it is asked.
func TestVotersRememberWhenTheirListChanged(t *testing.T) {
	for _, off := range []rule{everyRule, listIsTakenDown} {
		w := chaosFree(t)
		ctx := context.Background()
		w.off, w.now, w.changing = off, time.Minute, true
		n, former, leader := w.nodes[1], w.nodes[0], w.nodes[2]
		list := func(voters []int, storedBy ...int) {
			next := former.roster.with(1, voters)
			for _, i := range storedBy {
				w.nodes[i].keep(next)
			}
		}
		list([]int{0, 1, 2}, 0, 1, 2, 3)
		w.now += time.Minute
		w.reach(0, 2)
		must(t, former.Confirm(ctx, 1))
		w.now += time.Minute
		w.reach(0, 1)
		n.leased(former)
		w.reach(0, 2, 3)
		list([]int{0, 1, 2, 3}, 0, 2, 3)
		list([]int{0, 2, 3}, 0, 2)
		w.reach(2, 3, 4)
		w.elect()
		if w.lead != leader.i {
			t.Fatalf("node %d leads", w.lead)
		}
		former.leads = false
		leader.loses(n)
		if early := n.clock() < n.deadline+KillTime; early != (off != everyRule) {
			t.Errorf("lost before its guard is done: %v; the rule is off: %v", early, off != everyRule)
		}
	}
}

// A start may be on its way from a daemon that has ended, to a guard that began after the
// lease of that start: who comes after both begins no lease with its number.
func TestASessionIsNeverUsedTwice(t *testing.T) {
	w := chaosFree(t)
	w.now = time.Minute
	n := w.nodes[1]
	begin := func() uint64 {
		t.Helper()
		n.leased(w.nodes[0])
		session, _, ok := n.keeper.Current()
		if !ok || session != n.session {
			t.Fatalf("session %d, of the guard %d, holds: %v", session, n.session, ok)
		}
		return session
	}
	first := begin()
	n.session, n.deadline, n.lapsed = 0, 0, false // another guard
	n.restartDaemon()
	w.now += time.Second
	second := begin()
	w.now += time.Minute
	n.enforce()
	if third := begin(); first == second || second >= third {
		t.Errorf("sessions %d, %d, %d", first, second, third)
	}
	n.start(first, "late")
	if len(n.running) != 0 {
		t.Error("a start of the first session is carried out in the third")
	}
}

func TestConfirmationFailureGrantsNothing(t *testing.T) {
	w := chaosFree(t)
	w.nodes[0].cutOff = true
	if _, err := w.nodes[0].svc.grant.renew(context.Background(), w.nodes[0].id); err == nil {
		t.Error("a leader without a majority granted a lease")
	}
	w.nodes[1].leads = false
	if _, err := w.nodes[1].svc.grant.renew(context.Background(), w.nodes[1].id); err == nil {
		t.Error("a follower granted a lease")
	}
}

func TestNodeRenewsOnlyItsOwnLease(t *testing.T) {
	w := chaosFree(t)
	_, err := w.nodes[0].svc.Serve(context.Background(), w.nodes[1].id, []byte(`{"nodeID":"`+w.nodes[2].id+`"}`))
	if err == nil || !strings.Contains(err.Error(), "own lease") {
		t.Errorf("foreign lease: %v", err)
	}
	if _, err := w.nodes[0].svc.Serve(context.Background(), w.nodes[1].id, []byte(`{`)); err == nil {
		t.Error("malformed request was answered")
	}
}

func (w *world) change(f func(v *configdb.View, tx *configdb.Txn) error) {
	w.t.Helper()
	_, err := configdb.Transact(context.Background(), w.mem, "test", 1, f)
	must(w.t, err)
}

func TestUnprotectedVMStaysAndBecomesUnknown(t *testing.T) {
	w := chaosFree(t)
	b := w.bindingOn(3)
	w.change(func(v *configdb.View, tx *configdb.Txn) error {
		b.Spec.Protected = false
		return configdb.Bindings.UpdateSpec(v, tx, &b)
	})
	w.lose(3)
	_, err := w.nodes[0].svc.recover(context.Background(), 1)
	must(t, err)
	got, err := configdb.Bindings.Get(w.mem.Local(), b.Meta.ID)
	must(t, err)
	vm, err := configdb.VMs.Get(w.mem.Local(), b.Meta.ID)
	must(t, err)
	if got.Spec.Epoch != 1 || vm.Status.Phase != api.VMUnknown || !strings.Contains(vm.Status.Message, "not protected") {
		t.Errorf("unprotected vm: epoch %d, %+v", got.Spec.Epoch, vm.Status)
	}
	rev := w.mem.Local().Revision()
	_, err = w.nodes[0].svc.recover(context.Background(), 1)
	must(t, err)
	if w.mem.Local().Revision() != rev {
		t.Error("a second look wrote again")
	}
}

func TestStoppedVMMovesWithoutBeingStarted(t *testing.T) {
	w := chaosFree(t)
	b := w.bindingOn(3)
	w.change(func(v *configdb.View, tx *configdb.Txn) error {
		vm, err := configdb.VMs.Get(v, b.Meta.ID)
		must(t, err)
		vm.Spec.Power = api.PowerStopped
		return configdb.VMs.UpdateSpec(v, tx, &vm)
	})
	w.lose(3)
	_, err := w.nodes[0].svc.recover(context.Background(), 1)
	must(t, err)
	vm, err := configdb.VMs.Get(w.mem.Local(), b.Meta.ID)
	must(t, err)
	if vm.Status.Phase != api.VMStopped || vm.Status.Epoch != 2 {
		t.Errorf("stopped vm after recovery: %+v", vm.Status)
	}
}

type noPlace struct{ simFleet }

func (p noPlace) Load(*plan.State) (plan.Fleet, error) { return p, nil }

func (noPlace) Avoid(string, string) {}

func (noPlace) Choose(*api.VM, map[string]string, bool) (string, string, error) {
	return "", "", api.Errorf(api.CodeUnplaceable, "m1: too little memory")
}

func TestVMWithoutAPlaceSaysWhyOnce(t *testing.T) {
	w := chaosFree(t)
	b := w.bindingOn(3)
	w.lose(3)
	w.nodes[0].svc.placer = noPlace{}
	var rev uint64
	for i := range 2 {
		res, err := w.nodes[0].svc.recover(context.Background(), 1)
		must(t, err)
		if res.After != recoverRetry {
			t.Errorf("next look after %v", res.After)
		}
		if i == 0 {
			rev = w.mem.Local().Revision()
		}
	}
	vm, err := configdb.VMs.Get(w.mem.Local(), b.Meta.ID)
	must(t, err)
	if !strings.Contains(vm.Status.Message, "too little memory") || w.mem.Local().Revision() != rev {
		t.Errorf("message %q; written again: %v", vm.Status.Message, w.mem.Local().Revision() != rev)
	}
}

func TestLapsedSessionIsNeverTakenUpAgain(t *testing.T) {
	w := chaosFree(t)
	n := w.nodes[2]
	ctx := context.Background()
	must(t, n.keeper.extend(ctx, n.clock()+LeaseDuration, renewAnswer{Revision: 5}))
	first, rev, ok := n.keeper.Current()
	if !ok || rev != 5 {
		t.Fatalf("lease: session %d revision %d %v", first, rev, ok)
	}
	w.now += LeaseDuration + time.Second
	if _, _, ok := n.keeper.Current(); ok {
		t.Error("the lease outlived its duration")
	}
	n.start(first, "vm")
	if len(n.running) != 0 {
		t.Error("the guard started a vm in a lapsed session")
	}
	must(t, n.keeper.extend(ctx, n.clock()+LeaseDuration, renewAnswer{Revision: 9}))
	second, rev, ok := n.keeper.Current()
	if !ok || second <= first || rev != 9 {
		t.Errorf("after the lapse: session %d revision %d %v", second, rev, ok)
	}
	n.start(first, "vm")
	if len(n.running) != 0 {
		t.Error("a decision of the lapsed session was carried out in the next")
	}
}

// A node that is expected to be away is not missed, unless ha has a VM there to protect.
func TestPlannedAbsenceIsNoLoss(t *testing.T) {
	db := storetest.New(t)
	n := api.Node{Meta: api.NewMeta(api.KindNode, "", "m1"), Status: api.NodeStatus{Phase: api.NodeReady, Absence: &api.Absence{Action: api.RebootHost}}}
	b := api.Binding{Meta: api.Meta{ID: "v", Name: "web1"}, Spec: api.BindingSpec{NodeID: n.Meta.ID, Node: "m1", Epoch: 1}}
	put := func(f func(v *configdb.View, tx *configdb.Txn) error) {
		t.Helper()
		if _, err := configdb.Transact(t.Context(), db, "test", 2, f); err != nil {
			t.Fatal(err)
		}
	}
	put(func(_ *configdb.View, tx *configdb.Txn) error {
		return errors.Join(configdb.Nodes.Create(tx, &n), configdb.Bindings.CreateUnnamed(tx, &b))
	})
	s := NewService(ServiceConfig{DB: db, Log: slog.New(slog.DiscardHandler)})
	if got := s.readyNodes(); len(got) != 0 {
		t.Errorf("it is watched: %v", got)
	}
	put(func(v *configdb.View, tx *configdb.Txn) error {
		b.Spec.Protected = true
		return configdb.Bindings.UpdateSpec(v, tx, &b)
	})
	if got := s.readyNodes(); len(got) != 1 {
		t.Errorf("it is not watched, though it has a protected VM: %v", got)
	}
}
