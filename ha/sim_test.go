// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
	"github.com/muster-vm/muster/ha/plan"
)

// The simulation runs the real grantor, service and keepers against a model of
// the world: clocks that differ in rate, links that are cut, leaders that come
// and go, daemons that are frozen in the middle of a decision, and guards that
// take their time to kill. After every step it looks whether two nodes run one
// VM. A failure prints its seed.

type world struct {
	t     *testing.T
	rng   *rand.Rand
	mem   *storetest.Mem
	now   time.Duration
	term  uint64
	lead  int // the true leader; -1 while there is none
	nodes []*simNode
	todo  []event
	// nested is set while the world moves inside a decision
	nested bool
	busy   map[uint64]bool // terms in which a leader is deciding
}

type event struct {
	at time.Duration
	do func()
}

type simNode struct {
	w      *world
	i      int
	id     string
	offset time.Duration
	rate   float64
	cutOff bool          // from the majority
	frozen time.Duration // the daemon does nothing until then
	view   *configdb.View
	// what the node believes of its own leadership, perhaps wrongly
	believes configdb.Leadership
	leads    bool
	svc      *Service
	keeper   *Keeper
	// the guard
	session  uint64
	deadline time.Duration
	lapsed   bool
	running  map[string]time.Duration // when SIGKILL takes effect; 0: not being killed
}

func (n *simNode) clock() time.Duration { return n.offset + time.Duration(float64(n.w.now)*n.rate) }

// The guard, as its protocol promises.
func (n *simNode) Session(context.Context) (uint64, error) { return n.session, nil }

func (n *simNode) Extend(_ context.Context, session uint64, deadline time.Duration) error {
	n.enforce()
	switch {
	case session < n.session, session == n.session && n.lapsed:
		return ErrLapsed
	case n.lapsed && len(n.running) > 0, deadline <= n.clock():
		return errors.New("refused")
	case session > n.session:
		n.session, n.deadline, n.lapsed = session, deadline, false
	default:
		n.deadline = max(n.deadline, deadline)
	}
	return nil
}

func (n *simNode) start(session uint64, vm string) {
	n.enforce()
	if _, there := n.running[vm]; !there && session == n.session && !n.lapsed {
		n.running[vm] = 0
	}
}

func (n *simNode) enforce() {
	if n.session == 0 || n.clock() < n.deadline {
		return
	}
	n.lapsed = true
	for vm, kill := range n.running {
		if kill == 0 {
			n.running[vm] = n.w.now + n.w.upTo(KillTime)
		}
	}
}

// The leader, as configdb promises.
func (n *simNode) Leadership() (configdb.Leadership, bool) { return n.believes, n.leads }

func (n *simNode) Confirm(_ context.Context, term uint64) error {
	n.w.meanwhile(100, 150) // the request waits its turn
	if n.w.lead != n.i || n.w.term != term || n.cutOff {
		return errors.New("not confirmed")
	}
	return nil
}

// The database, as this node sees it.
func (n *simNode) Local() *configdb.View {
	if !n.cutOff && n.w.lead == n.i {
		n.view = n.w.mem.Local() // a leader has applied what it committed
	}
	return n.view
}

func (n *simNode) View(context.Context) (*configdb.View, error) { return n.Local(), nil }

func (n *simNode) Txn(ctx context.Context, tx *configdb.Txn) (uint64, error) {
	if n.cutOff || n.w.lead < 0 {
		return 0, configdb.ErrNoQuorum
	}
	rev, err := n.w.mem.Txn(ctx, tx)
	if n.w.rng.IntN(20) == 0 {
		return 0, configdb.ErrUncertain // decided, but the answer was lost
	}
	n.view = n.w.mem.Local()
	return rev, err
}

func (n *simNode) WaitRevision(context.Context, uint64) (*configdb.View, error) {
	n.view = n.w.mem.Local()
	return n.view, nil
}

func (n *simNode) Watch(string, uint64) *configdb.Watch { panic("not used") }

func (n *simNode) Staleness() (time.Duration, bool) { return 0, true }

// Placement: any other node that the database does not call lost.
func (n *simNode) Load(s *plan.State) (plan.Fleet, error) {
	n.w.busy[n.believes.Term] = true // one worker
	n.w.meanwhile(6, 150)
	delete(n.w.busy, n.believes.Term)
	return simFleet{n, s, map[string]string{}}, nil
}

type simFleet struct {
	n     *simNode
	s     *plan.State
	avoid map[string]string
}

func (f simFleet) Fork() plan.Fleet { panic("not used") }

func (f simFleet) Avoid(nodeID, reason string) { f.avoid[nodeID] = reason }

func (f simFleet) Choose(*api.VM, map[string]string, bool) (string, string, error) {
	for _, i := range f.n.w.rng.Perm(len(f.n.w.nodes)) {
		id := f.n.w.nodes[i].id
		if o := f.s.Nodes[id]; o != nil && o.Status.Phase == api.NodeReady && f.avoid[id] == "" {
			return id, o.Meta.Name, nil
		}
	}
	return "", "", api.Errorf(api.CodeUnplaceable, "no node is ready")
}

func (f simFleet) Put(*api.VM, string) {}

func (f simFleet) Reserve(*configdb.Txn, string) error { return nil }

// meanwhile lets the world go on in the middle of a decision, now and then.
func (w *world) meanwhile(oneIn, steps int) {
	if w.nested || w.rng.IntN(oneIn) != 0 {
		return
	}
	w.nested = true
	for range w.rng.IntN(steps) {
		w.step(200 * time.Millisecond)
		w.check()
	}
	w.nested = false
}

func (w *world) upTo(d time.Duration) time.Duration { return time.Duration(w.rng.Int64N(int64(d))) }

func (w *world) after(d time.Duration, do func()) { w.todo = append(w.todo, event{w.now + d, do}) }

func newWorld(t *testing.T, seed uint64, vms int) *world {
	w := &world{t: t, busy: map[uint64]bool{}, rng: rand.New(rand.NewPCG(seed, 7)), mem: storetest.New(t), term: 1, lead: 0}
	log := slog.New(slog.DiscardHandler)
	tx := &configdb.Txn{}
	for i := range 5 {
		n := &simNode{w: w, i: i, id: api.NewID(), offset: w.upTo(time.Hour), rate: 0.995 + w.rng.Float64()/100, running: map[string]time.Duration{}}
		w.nodes = append(w.nodes, n)
		o := api.Node{Meta: api.NewMeta(api.KindNode, "", fmt.Sprintf("m%d", i)), Status: api.NodeStatus{Phase: api.NodeReady}}
		o.Meta.ID = n.id
		must(t, configdb.Nodes.Create(tx, &o))
		n.svc = NewService(ServiceConfig{DB: n, Leader: n, Placer: n, Log: log, Now: n.clock})
		n.keeper = NewKeeper(KeeperConfig{NodeID: n.id, Guard: n, Log: log, Now: n.clock})
	}
	for i := range vms {
		vm := api.VM{Meta: api.NewMeta(api.KindVM, "", fmt.Sprintf("v%d", i)), Spec: api.VMSpec{CPUs: 1, Memory: 64 * api.MiB, Power: api.PowerRunning, HA: api.HARestart}}
		n := w.nodes[i%len(w.nodes)]
		b := api.Binding{Meta: api.NewMeta(api.KindBinding, "", vm.Meta.Name), Spec: api.BindingSpec{NodeID: n.id, Epoch: 1, Protected: true}}
		b.Meta.ID = vm.Meta.ID
		must(t, configdb.VMs.Create(tx, &vm))
		must(t, configdb.Bindings.CreateUnnamed(tx, &b))
	}
	_, err := w.mem.Txn(context.Background(), tx)
	must(t, err)
	for _, n := range w.nodes {
		n.view = w.mem.Local()
	}
	w.nodes[0].leads, w.nodes[0].believes = true, configdb.Leadership{Term: 1}
	return w
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// chaos makes something happen to the world now and then.
func (w *world) chaos() {
	n := w.nodes[w.rng.IntN(len(w.nodes))]
	switch w.rng.IntN(220) {
	case 0, 1:
		if cut := w.countCut(); cut < 2 || n.cutOff {
			n.cutOff = !n.cutOff
		}
	case 2:
		n.frozen = w.now + w.upTo(40*time.Second)
	case 3: // the leader loses its office, and may not know
		w.elect()
	case 4: // guard killed: its VMs die with it, a new one knows nothing
		n.session, n.deadline, n.lapsed, n.running = 0, 0, false, map[string]time.Duration{}
	}
	if w.lead >= 0 && w.nodes[w.lead].cutOff && w.rng.IntN(10) == 0 {
		w.elect()
	}
	for _, n := range w.nodes {
		if n.leads && (n.i != w.lead || n.believes.Term != w.term) && w.rng.IntN(15) == 0 {
			n.leads = false // it finds out
		}
		if !n.cutOff && n.frozen < w.now && w.rng.IntN(25) == 0 {
			n.view = w.mem.Local() // replication
		}
	}
}

func (w *world) countCut() (cut int) {
	for _, n := range w.nodes {
		if n.cutOff {
			cut++
		}
	}
	return cut
}

func (w *world) elect() {
	var can []*simNode
	for _, n := range w.nodes {
		if !n.cutOff && n.frozen < w.now {
			can = append(can, n)
		}
	}
	if len(can) < 3 {
		w.lead = -1
		return
	}
	n := can[w.rng.IntN(len(can))]
	w.term++
	w.mem.SetTerm(w.term)
	w.lead = n.i
	n.view = w.mem.Local()
	n.leads, n.believes = true, configdb.Leadership{Term: w.term}
}

// renew is one request for a lease, with delays on the way there and back.
func (n *simNode) renew() {
	sent := n.clock()
	n.w.after(n.w.upTo(2*time.Second), func() {
		for _, l := range n.w.nodes {
			if !l.leads || l.cutOff != n.cutOff || l.frozen > n.w.now {
				continue
			}
			a, err := l.svc.grant.renew(context.Background(), n.id)
			if err != nil {
				continue
			}
			n.w.after(n.w.upTo(2*time.Second), func() {
				if n.frozen < n.w.now {
					_ = n.keeper.extend(context.Background(), sent+LeaseDuration, a)
				}
			})
			return
		}
	})
}

// act is what the hypervisor module does: start what is bound here, kill what
// is bound elsewhere. A start reaches the guard late, sometimes very late.
func (n *simNode) act() {
	session, revision, ok := n.keeper.Current()
	bindings, err := configdb.Bindings.List(n.view)
	must(n.w.t, err)
	for i := range bindings {
		vm, here := bindings[i].Meta.ID, bindings[i].Spec.NodeID == n.id
		kill, running := n.running[vm]
		switch {
		case running && !here && kill == 0:
			n.running[vm] = n.w.now + n.w.upTo(KillTime)
		case !running && here && ok && n.view.Revision() >= revision:
			delay := n.w.upTo(time.Second)
			if n.w.rng.IntN(10) == 0 {
				delay = n.w.upTo(60 * time.Second)
			}
			n.w.after(delay, func() { n.start(session, vm) })
		}
	}
}

// govern is one look of the leader's service, by whoever believes to lead.
func (n *simNode) govern() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	term := n.believes.Term
	for _, id := range n.svc.takeReturning() {
		_ = n.svc.readmit(ctx, term, id)
	}
	for _, id := range n.svc.grant.overdue(term, n.svc.readyNodes()) {
		n.svc.declareLost(ctx, term, id)
	}
	if n.w.rng.IntN(4) == 0 && !n.w.busy[term] {
		_, _ = n.svc.recover(ctx, term)
	}
}

func (w *world) step(d time.Duration) {
	w.now += d
	for _, n := range w.nodes {
		n.enforce()
		for vm, kill := range n.running {
			if kill != 0 && kill <= w.now {
				delete(n.running, vm)
			}
		}
	}
	due := w.todo
	w.todo = nil
	for _, e := range due {
		if e.at <= w.now {
			e.do()
		} else {
			w.todo = append(w.todo, e)
		}
	}
	w.chaos()
	for _, n := range w.nodes {
		if n.frozen > w.now {
			continue
		}
		if w.rng.IntN(5) == 0 {
			n.renew()
		}
		n.act()
		if n.leads {
			n.govern()
		}
	}
}

func (w *world) check() (running int) {
	where := map[string]int{}
	for _, n := range w.nodes {
		for vm := range n.running {
			if other, twice := where[vm]; twice {
				w.t.Fatalf("at %v: vm %s runs on nodes %d and %d", w.now, vm, other, n.i)
			}
			where[vm] = n.i
			running++
		}
	}
	return running
}

func TestNoTwoNodesRunOneVM(t *testing.T) {
	seeds, steps := 8, 2000 // seven minutes of cluster time each
	if n, err := strconv.Atoi(os.Getenv("MUSTER_SIM_SEEDS")); err == nil {
		seeds = n // for a longer hunt
	}
	moved, ran := uint64(0), 0
	for s := range seeds {
		seed := uint64(s) + 1
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			w := newWorld(t, seed, 4)
			for range steps {
				w.step(200 * time.Millisecond)
				ran += w.check()
			}
			bindings, err := configdb.Bindings.List(w.mem.Local())
			must(t, err)
			for i := range bindings {
				moved += bindings[i].Spec.Epoch - 1
			}
		})
	}
	t.Logf("%d moves, VMs were running in %d %% of the looks", moved, 100*ran/(seeds*steps*4))
	if moved < uint64(seeds) || ran < seeds*steps {
		t.Error("the simulation is too quiet to prove anything")
	}
}
