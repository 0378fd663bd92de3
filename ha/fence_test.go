// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
)

// The hosts of the simulation have power devices, too: they are slow, take
// commands that come to effect late, are unreachable, and hosts come back by
// themselves.

// cut is what the loss of power does to a host: everything is gone at once, and
// it boots after a while, with an old replica and without a lease.
func (n *simNode) cut(bootsAfter time.Duration) {
	n.life++
	n.noPower = n.w.now + bootsAfter
	n.frozen, n.stopped, n.leads = n.noPower, 0, false // whatever hung hangs no more
	n.petted = n.clock() + bootsAfter
	if n.w.rng.IntN(2) == 0 {
		n.cutOff = false
	}
	n.session, n.deadline, n.lapsed, n.running = 0, 0, false, map[string]time.Duration{}
	n.keeper = n.newKeeper()
}

// Can implements Fencer.
func (n *simNode) Can(*configdb.View, string) bool { return n.w.power != nil }

// Off implements Fencer.
func (n *simNode) Off(ctx context.Context, nodeID string, before func(context.Context) error) ([]api.PowerStep, error) {
	return n.w.power(n, nodeID, func() error { return before(ctx) })
}

// chancy is the power device of a world with chance.
func (w *world) chancy(by *simNode, nodeID string, before func() error) ([]api.PowerStep, error) {
	var n *simNode
	for _, o := range w.nodes {
		if o.id == nodeID {
			n = o
		}
	}
	w.meanwhile(4, 40) // the login takes its time
	if err := before(); err != nil {
		return nil, err
	}
	if w.rng.IntN(8) == 0 {
		w.meanwhile(1, 20) // a majority has just agreed, and now the leader is deposed
	}
	boots := time.Second + w.upTo(5*time.Second)
	switch w.rng.IntN(6) {
	case 0: // unreachable
		return nil, errors.New("no answer")
	case 1: // it takes the command, and carries it out late
		w.after(w.upTo(60*time.Second), func() { n.cut(boots) })
	case 2: // it takes the command and does nothing
	default:
		n.cut(boots)
	}
	for range 2 {
		if n.noPower <= w.now {
			return nil, errors.New("still on")
		}
		w.meanwhile(3, 20)
	}
	w.meanwhile(1, 200) // it is on again before anybody hears of it
	w.shot++
	return switchedOff(), nil
}

// inline runs an attempt at once.
func inline(attempt func(context.Context)) { attempt(context.Background()) }

// powered is a world without chance in which node 3 is silent and its device
// works.
// switchedOff is what a device answers that switches its host off.
func switchedOff() []api.PowerStep {
	read := api.PowerStep{Device: "bmc", Do: api.PowerRead, Answer: "off", OK: true}
	return []api.PowerStep{{Device: "bmc", Do: api.PowerOff, Answer: "accepted", OK: true}, read, read}
}

func powered(t *testing.T) *world {
	w := chaosFree(t)
	w.nodes[0].svc.grant.overdue(1, nil) // the leadership begins here
	w.power = func(_ *simNode, id string, before func() error) ([]api.PowerStep, error) {
		if err := before(); err != nil {
			return nil, err
		}
		w.cuts = append(w.cuts, id)
		return switchedOff(), nil
	}
	return w
}

// pass lets time pass in which all nodes but the silent ones ask.
func (w *world) pass(d time.Duration, silent ...int) {
	for end := w.now + d; w.now < end; {
		w.now += 500 * time.Millisecond
		for _, n := range w.nodes {
			quiet := false
			for _, i := range silent {
				quiet = quiet || n.i == i
			}
			if !quiet {
				_, _ = w.nodes[0].svc.grant.renew(context.Background(), n.id)
			}
		}
	}
}

func (w *world) status(i int) api.NodeStatus {
	n, err := configdb.Nodes.Get(w.mem.Local(), w.nodes[i].id)
	must(w.t, err)
	return n.Status
}

func (w *world) actions() []api.PowerAction {
	list, err := configdb.PowerActions.List(w.mem.Local())
	must(w.t, err)
	return list
}

func TestConfirmedOffShortensTheWait(t *testing.T) {
	w := powered(t)
	leader, ctx := w.nodes[0].svc, context.Background()
	b := w.bindingOn(3)
	w.pass(FenceAfter-500*time.Millisecond, 3)
	leader.fenceSilent(1, inline)
	if len(w.cuts) != 0 {
		t.Fatal("a node was switched off before it was silent for long enough")
	}
	w.pass(time.Second, 3)
	leader.fenceSilent(1, inline)
	s := w.status(3)
	if len(w.cuts) != 1 || w.cuts[0] != w.nodes[3].id || s.Phase != api.NodeLost || s.Fencing != "" || s.LostTerm != 1 {
		t.Fatalf("cuts %v, status %+v", w.cuts, s)
	}
	if w.now >= LostAfter/2 {
		t.Errorf("lost after %v, hardly sooner than without", w.now)
	}
	all := w.actions()
	if len(all) != 1 || all[0].Meta.ID != s.LostAction || all[0].Status.Phase != api.PowerActionConfirmed || len(all[0].Status.Steps) != 3 ||
		all[0].Spec.Term != 1 || all[0].Spec.Trigger != api.TriggerHA || all[0].Spec.Via != "m0" || all[0].Status.EndedAt == nil {
		t.Errorf("evidence: %+v", all)
	}
	_, err := leader.recover(ctx, 1)
	must(t, err)
	got, err := configdb.Bindings.Get(w.mem.Local(), b.Meta.ID)
	must(t, err)
	if got.Spec.Epoch != 2 {
		t.Error("the protected vm was not moved")
	}
	// It boots, asks, is readmitted and keeps what it gets.
	if _, err := leader.grant.renew(ctx, w.nodes[3].id); err == nil {
		t.Error("a lost node was granted a lease")
	}
	for _, id := range leader.takeReturning() {
		must(t, leader.readmit(ctx, 1, id))
	}
	if _, err := leader.grant.renew(ctx, w.nodes[3].id); err != nil || w.phase(3) != api.NodeReady {
		t.Errorf("the readmitted node is %s, %v", w.phase(3), err)
	}
	// It falls again: no second shot so soon, but the lease still decides.
	w.pass(FenceAfter+time.Second, 3)
	leader.fenceSilent(1, inline)
	if len(w.cuts) != 1 {
		t.Error("a node was switched off twice within minutes")
	}
}

func TestWhatIsNotSwitchedOff(t *testing.T) {
	cases := map[string]func(w *world) (silent []int){
		"a node without devices":    func(w *world) []int { w.power = nil; return []int{3} },
		"more than half are silent": func(*world) []int { return []int{1, 2, 3} },
		"a node in maintenance": func(w *world) []int {
			w.change(func(v *configdb.View, tx *configdb.Txn) error {
				n, err := configdb.Nodes.Get(v, w.nodes[3].id)
				must(w.t, err)
				n.Spec.Maintenance = true
				return configdb.Nodes.UpdateSpec(v, tx, &n)
			})
			return []int{3}
		},
		"a node that was stopped in order": func(w *world) []int {
			w.change(func(v *configdb.View, tx *configdb.Txn) error {
				n, err := configdb.Nodes.Get(v, w.nodes[3].id)
				must(w.t, err)
				n.Status.Stopping = true
				return configdb.Nodes.UpdateStatus(v, tx, &n)
			})
			return []int{3}
		},
		"a node without protected vms": func(w *world) []int {
			b := w.bindingOn(3)
			w.change(func(v *configdb.View, tx *configdb.Txn) error {
				b.Spec.Protected = false
				return configdb.Bindings.UpdateSpec(v, tx, &b)
			})
			return []int{3}
		},
		"a node of a later life": func(w *world) []int {
			tx := &configdb.Txn{}
			tx.Put(configdb.LaterLifeKey(w.nodes[3].id), []byte("it said so"))
			_, err := w.mem.Txn(context.Background(), tx)
			must(w.t, err)
			return []int{3}
		},
		"the leader itself": func(*world) []int { return []int{0} },
		"a node that asks and gets nothing": func(w *world) []int {
			w.nodes[0].svc.grant.barred[w.nodes[3].id] = true
			return nil
		},
	}
	for name, set := range cases {
		t.Run(name, func(t *testing.T) {
			w := powered(t)
			silent := set(w)
			w.pass(FenceAfter+time.Second, silent...)
			w.nodes[0].svc.fenceSilent(1, inline)
			if len(w.cuts) != 0 || len(w.actions()) != 0 || w.phase(3) != api.NodeReady {
				t.Errorf("cuts %v, actions %+v, node 3 is %s", w.cuts, w.actions(), w.phase(3))
			}
		})
	}
}

func TestLeaderWithoutAMajorityCommandsNothing(t *testing.T) {
	for name, cut := range map[string]func(w *world){
		"before the mark": func(w *world) { w.nodes[0].cutOff = true },
		"after the mark": func(w *world) {
			power := w.power
			w.power = func(by *simNode, id string, before func() error) ([]api.PowerStep, error) {
				w.votedFor(1, 2, 1, 2, 4) // another leads; this one does not know
				w.mem.SetTerm(2)
				return power(by, id, before)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := powered(t)
			w.pass(FenceAfter+time.Second, 3)
			cut(w)
			ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
			defer cancel()
			w.nodes[0].svc.fenceSilent(1, func(attempt func(context.Context)) { attempt(ctx) })
			if len(w.cuts) != 0 || w.phase(3) != api.NodeReady {
				t.Errorf("cuts %v, node 3 is %s", w.cuts, w.phase(3))
			}
		})
	}
}

func TestDeviceThatConfirmsNothingLeavesItToTheLease(t *testing.T) {
	w := powered(t)
	leader := w.nodes[0].svc
	w.power = func(*simNode, string, func() error) ([]api.PowerStep, error) {
		return []api.PowerStep{{Device: "bmc", Do: api.PowerOff, Answer: "accepted", OK: true}}, errors.New("device bmc: still on")
	}
	w.pass(FenceAfter+time.Second, 3)
	leader.fenceSilent(1, inline)
	s, all := w.status(3), w.actions()
	if s.Phase != api.NodeReady || s.Fencing != "" || len(all) != 1 || all[0].Status.Phase != api.PowerActionFailed || !strings.Contains(all[0].Status.Message, "still on") {
		t.Fatalf("status %+v, actions %+v", s, all)
	}
	w.pass(LostAfter-w.now-500*time.Millisecond, 3)
	if late := leader.grant.overdue(1, leader.readyNodes()); len(late) != 0 {
		t.Fatal("lost before its lease has ended")
	}
	w.pass(time.Second, 3)
	for _, id := range leader.grant.overdue(1, leader.readyNodes()) {
		leader.declareLost(context.Background(), 1, id)
	}
	if s := w.status(3); s.Phase != api.NodeLost || s.LostAction != "" {
		t.Errorf("after the lease: %+v", s)
	}
}

func TestNodeGetsNoLeaseWhileItIsSwitchedOff(t *testing.T) {
	w := powered(t)
	leader, power, refused := w.nodes[0].svc, w.power, 0
	w.power = func(by *simNode, id string, before func() error) ([]api.PowerStep, error) {
		steps, err := power(by, id, before)
		// It is on again at once, and asks, before the second reading is committed.
		if _, rerr := leader.grant.renew(context.Background(), id); rerr != nil {
			refused++
		}
		for _, back := range leader.takeReturning() {
			must(t, leader.readmit(context.Background(), 1, back))
		}
		return steps, err
	}
	w.pass(FenceAfter+time.Second, 3)
	leader.fenceSilent(1, inline)
	if refused != 1 || w.phase(3) != api.NodeLost {
		t.Errorf("refused %d times, node 3 is %s", refused, w.phase(3))
	}
}

// deposed makes node 1 the leader of term 2 while node 0 reads "off".
func deposed(t *testing.T) *world {
	w := powered(t)
	power := w.power
	w.power = func(by *simNode, id string, before func() error) ([]api.PowerStep, error) {
		steps, err := power(by, id, before)
		w.votedFor(1, 2, 1, 2, 4)
		w.mem.SetTerm(2)
		w.nodes[1].leads, w.nodes[1].believes = true, configdb.Leadership{Term: 2}
		w.power = power
		return steps, err
	}
	w.pass(FenceAfter+time.Second, 3)
	w.nodes[0].svc.fenceSilent(1, inline)
	w.nodes[0].leads = false
	w.nodes[1].view = w.mem.Local()
	if s := w.status(3); len(w.cuts) != 1 || s.Phase != api.NodeReady || s.Fencing == "" {
		t.Fatalf("after the change of leaders: cuts %v, %+v", w.cuts, s)
	}
	w.nodes[1].svc.grant.overdue(2, nil)
	return w
}

func TestNewLeaderDoesNotTakeTheOldOnesWord(t *testing.T) {
	t.Run("a node that lives is readmitted", func(t *testing.T) {
		w := deposed(t)
		leader, ctx := w.nodes[1].svc, context.Background()
		if _, err := leader.grant.renew(ctx, w.nodes[3].id); err == nil {
			t.Error("a lease was granted under the mark")
		}
		for _, id := range leader.takeReturning() {
			must(t, leader.readmit(ctx, 2, id))
		}
		if _, err := leader.grant.renew(ctx, w.nodes[3].id); err != nil {
			t.Error(err)
		}
		if s := w.status(3); s.Phase != api.NodeReady || s.Fencing != "" || w.actions()[0].Status.Phase != api.PowerActionInterrupted {
			t.Errorf("%+v, %+v", s, w.actions()[0].Status)
		}
	})
	t.Run("one that is silent is switched off anew", func(t *testing.T) {
		w := deposed(t)
		leader := w.nodes[1].svc
		for end := w.now + FenceAfter + time.Second; w.now < end; w.now += 500 * time.Millisecond {
			for _, n := range w.nodes {
				if n.i != 3 {
					_, _ = leader.grant.renew(context.Background(), n.id)
				}
			}
			if w.phase(3) == api.NodeLost {
				t.Fatal("lost by the word of the old leader")
			}
		}
		leader.fenceSilent(2, inline)
		all := w.actions()
		if s := w.status(3); s.Phase != api.NodeLost || s.LostTerm != 2 || len(w.cuts) != 2 || len(all) != 2 || all[0].Status.Phase != api.PowerActionInterrupted || s.LostAction != all[1].Meta.ID {
			t.Errorf("%+v, cuts %v, %d actions", s, w.cuts, len(all))
		}
	})
}

func TestMaintenanceDuringTheMarkSaves(t *testing.T) {
	w := powered(t)
	w.pass(FenceAfter+time.Second, 3)
	w.nodes[0].svc.fenceSilent(1, func(attempt func(context.Context)) {
		w.change(func(v *configdb.View, tx *configdb.Txn) error {
			n, err := configdb.Nodes.Get(v, w.nodes[3].id)
			must(t, err)
			n.Spec.Maintenance = true
			return configdb.Nodes.UpdateSpec(v, tx, &n)
		})
		attempt(context.Background())
	})
	if len(w.cuts) != 0 || w.status(3).Fencing != "" || w.nodes[0].svc.grant.aimedAt(1, w.nodes[3].id) {
		t.Errorf("cuts %v, %+v", w.cuts, w.status(3))
	}
}

// An attempt of ten hours ahead is none of the last ten minutes: the clock was set back.
func TestAnAttemptThatLiesAheadKeepsNobodyFromAnother(t *testing.T) {
	db, now := storetest.New(t), time.Now()
	a := api.NewPowerAction(&api.Node{Meta: api.NewMeta(api.KindNode, "", "n1")}, api.PowerOff, api.TriggerHA, now)
	a.Status.Phase = api.PowerActionFailed
	tx := &configdb.Txn{}
	must(t, configdb.PowerActions.CreateUnnamed(tx, &a))
	_, err := db.Txn(t.Context(), tx)
	must(t, err)
	for set, want := range map[time.Duration]bool{
		0: true, fencePause - time.Second: true, fencePause: false,
		-time.Second: true, -time.Hour: false, -10 * time.Hour: false,
	} {
		if got := triedLately(db.Local(), a.Spec.NodeID, now.Add(set)); got != want {
			t.Errorf("the clock was set by %v: tried lately %v, want %v", set, got, want)
		}
	}
}
