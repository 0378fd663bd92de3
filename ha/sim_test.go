// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/feature"
	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/configdb/raftnode"
	"github.com/muster-vm/muster/ha/plan"
)

// The simulation runs the real grantor, service and keepers against a model of
// the world: clocks that differ in rate, links that are cut, leaders that come
// and go, daemons that are frozen in the middle of a decision, and guards that
// take their time to kill. After every step it looks whether two nodes run one
// VM. A failure prints its seed.

type world struct {
	t      *testing.T
	rng    *rand.Rand
	off    rule // is not kept in this world
	state  *fsm.State
	levels feature.Reader
	mem    *configdb.Offline
	now    time.Duration
	term   uint64
	lead   int // the true leader; -1 while there is none
	nodes  []*simNode
	todo   []event
	// nested is set while the world moves inside a decision
	nested bool
	busy   map[uint64]bool // terms in which a leader is deciding
	resets int             // of hosts, by their watchdogs
	steps  int             // also those in the middle of decisions
	broken string          // what went wrong, at the first time
	// stubborn: starts fail now and then, and are counted
	stubborn bool
	// drilling: VMs are ended and given up on purpose, too
	drilling bool
	drills   int
	pool     *simPool  // nil: no VM has a storage guard
	notes    *simNotes // nil: there are no notes
	carried  int       // calls that carried questions to a leader
	credits  int       // times that voters remembered something
	// by term: when the last lease was asked for that was granted in it, and what its leader
	// has learned of earlier ones
	grants, earlier map[uint64]time.Duration
	strict          bool // it is wrong already if a leader has learned what is not true
	// restarting worlds restart daemons alone, too
	restarting bool
	restarts   int
	// changing worlds change the list of voters, too
	changing           bool
	changes, rollbacks int
	shot               int      // attempts to switch a node off that were confirmed
	cuts               []string // nodes that were switched off, without chance
	// power is what a device does for node by; nil: there is none
	power func(by *simNode, nodeID string, before func() error) ([]api.PowerStep, error)
}

type event struct {
	at time.Duration
	do func()
}

type simNode struct {
	w       *world
	i       int
	id      string
	offset  time.Duration
	rate    float64
	cutOff  bool          // from the majority
	noPower time.Duration // it is switched off until then
	frozen  time.Duration // the daemon does nothing until then
	view    *configdb.View
	// what the node believes of its own leadership, perhaps wrongly
	believes configdb.Leadership
	leads    bool
	svc      *Service
	keeper   *Keeper
	// detecting is set while this leader's one goroutine for it is at work.
	detecting bool
	// the guard
	session  uint64
	deadline time.Duration
	lapsed   bool
	running  map[string]time.Duration // when SIGKILL takes effect; 0: not being killed
	stopped  time.Duration            // the guard does nothing until then
	petted   time.Duration            // the watchdog, for the last time
	life     int                      // counts the host's boots
	daemon   int                      // and this its daemons
	inside   int                      // its daemon is in the middle of something
	tries    *tries                   // of VMs that do not start
	drilled  map[string]int           // what was killed for a drill, by the life of the host: the guard keeps it
	guests   *guest                   // of VMs with a storage guard
	heart    *simHeart                // nil: there are no notes
	voter    uint64                   // the term that it is in, where there are no notes
	told     *raftnode.Told
	asking   bool   // its voters, about earlier leaders
	answered uint64 // the term of which they have said it
	roster   roster
}

func (n *simNode) clock() time.Duration { return n.offset + time.Duration(float64(n.w.now)*n.rate) }

// leaderClock is what the leader measures silence with. That it waits for too
// short a time looks the same as a clock that is too fast.
func (n *simNode) leaderClock() time.Duration {
	if n.w.off == leaderWaits {
		return 3 * n.clock() / 2
	}
	return n.clock()
}

// clockRate is within half of what two clocks may differ by.
func (w *world) clockRate() float64 {
	if w.off == clocksAgree {
		return 0.7 + 0.6*w.rng.Float64()
	}
	const each = float64(driftPerMille) / 1000 / 2
	return 1 - each + 2*each*w.rng.Float64()
}

// The guard, as its protocol promises.
func (n *simNode) Session(context.Context) (uint64, error) {
	if n.stopped > n.w.now {
		return 0, errors.New("no answer")
	}
	return n.session, nil
}

func (n *simNode) Extend(_ context.Context, session uint64, deadline time.Duration) error {
	if n.stopped > n.w.now {
		return errors.New("no answer")
	}
	n.enforce()
	switch {
	case session == n.session && n.lapsed && (n.w.off == lapseIsForGood || n.w.off == onlyWhatRunsGoesOn):
		n.deadline, n.lapsed = deadline, false
		return nil
	case session < n.session, session == n.session && n.lapsed:
		return ErrLapsed
	case n.lapsed && len(n.running) > n.sparedVMs(), deadline <= n.clock():
		return errors.New("refused")
	case session > n.session:
		n.session, n.deadline, n.lapsed = session, deadline, false
	default:
		n.deadline = max(n.deadline, deadline)
	}
	return nil
}

func (n *simNode) start(session uint64, vm string) {
	if n.stopped > n.w.now {
		return
	}
	n.enforce()
	current := session == n.session && !n.lapsed || n.w.off == startNeedsSession
	if _, there := n.running[vm]; !there && current {
		n.running[vm] = 0
	}
}

func (n *simNode) enforce() {
	if n.session == 0 || n.clock() < n.deadline || n.stopped > n.w.now {
		return
	}
	n.lapsed = true
	if n.w.off == lapseKills {
		return
	}
	for _, vm := range n.vms() {
		switch {
		case n.sparedFromKill(vm):
			n.w.pool.outlived++
		case n.running[vm] == 0:
			n.running[vm] = n.w.now + n.w.killTime()
		}
	}
}

// spared counts the VMs that outlive the lease.
func (n *simNode) sparedVMs() (count int) {
	for vm := range n.running {
		if n.sparedFromKill(vm) {
			count++
		}
	}
	return count
}

// watchdogTimeout is what the guard asks its device for.
const watchdogTimeout = 5 * time.Second

// hasWatchdog is not true for all: where one is, it makes up for other rules.
func (n *simNode) hasWatchdog() bool { return n.i%2 == 1 }

// watchdog resets the host when the guard has not petted it for its timeout.
func (n *simNode) watchdog() {
	if !n.hasWatchdog() {
		return
	}
	timeout := watchdogTimeout
	inTime := n.clock()+timeout <= n.deadline+KillTime
	if n.w.off == lastPettingInTime { // petted for as long as the guard can
		timeout, inTime = 6*watchdogTimeout, true
	}
	if n.stopped <= n.w.now && (len(n.running) == n.sparedVMs() || inTime) {
		n.petted = n.clock()
	}
	if n.clock()-n.petted < timeout {
		return
	}
	n.w.resets++
	n.life++
	n.session, n.deadline, n.lapsed, n.stopped, n.running = 0, 0, false, 0, map[string]time.Duration{}
	n.frozen, n.leads = n.w.now+10*time.Second+n.w.upTo(time.Minute), false // it boots
	n.petted = n.clock() + n.w.upTo(time.Minute)                            // nobody has opened the device yet
	n.keeper = n.newKeeper()
	n.told = raftnode.NewTold(n.voterTerm(), n.clock())
}

func (n *simNode) newKeeper() *Keeper {
	return NewKeeper(KeeperConfig{NodeID: n.id, Guard: n, Log: slog.New(slog.DiscardHandler), Now: n.clock})
}

// beginDaemon gives the node what its daemon has in memory.
func (n *simNode) beginDaemon() {
	n.daemon++
	n.keeper = n.newKeeper()
	n.svc = NewService(ServiceConfig{
		DB: n, Leader: n, Placer: n, Log: slog.New(slog.DiscardHandler), Now: n.leaderClock,
		NodeID: n.id, NodeName: fmt.Sprintf("m%d", n.i), Fencer: n,
	})
	if n.w.off == lostGetsNoLease {
		n.svc.grant.readmit = nil
	}
}

// restartDaemon ends the node's daemon and begins another: guard and VMs know nothing of
// it. What the node had asked for reaches nobody any more; starts on their way go on.
func (n *simNode) restartDaemon() {
	n.leads, n.answered, n.asking, n.detecting = false, 0, false, false
	n.beginDaemon()
	n.told = raftnode.NewTold(n.voterTerm(), n.clock())
	if n.w.off == whoBeginsAnewMayHaveTold {
		n.told = raftnode.NewTold(n.voterTerm(), 0)
	}
	n.frozen = max(n.frozen, n.w.now+1+n.w.upTo(time.Second))
	if n.w.lead == n.i {
		n.w.elect()
	}
}

// The leader, as configdb promises.
func (n *simNode) Leadership() (configdb.Leadership, bool) { return n.believes, n.leads }

// voters are those of its list, itself first and perhaps once more.
func (n *simNode) voters() []int {
	order := append([]int{n.i}, n.w.rng.Perm(len(n.w.nodes))...)
	return slices.DeleteFunc(order, func(i int) bool { return !n.roster.has(i) })
}

func (n *simNode) Confirm(_ context.Context, term uint64) error {
	voices, list := 0, n.roster
	for _, i := range n.voters() {
		n.w.meanwhile(300, 150) // the request, or the question, waits its turn
		o := n.w.nodes[i]
		if n.cutOff || o == n && voices > 0 || o != n && (o.cutOff || o.frozen > n.w.now) {
			continue
		}
		if o.told.Tell(term, n.id, o.voterTerm, o.clock) > term {
			continue
		}
		if voices++; list.majority(voices) {
			break
		}
	}
	n.w.meanwhile(300, 150) // it concludes late
	switch {
	case n.w.off == leaderIsConfirmed:
		return nil
	case !list.majority(voices) || n.voterTerm() != term:
		return errors.New("not confirmed")
	}
	return nil
}

// voterTerm is the term in which this node is as a voter.
func (n *simNode) voterTerm() uint64 {
	if n.heart != nil {
		return n.heart.term
	}
	return n.voter
}

// LastConfirmed is as a majority of the voters remember it.
func (n *simNode) LastConfirmed(_ context.Context, term uint64) (configdb.Confirmed, error) {
	last, answers, list := configdb.Confirmed{Ago: time.Hour}, 0, n.roster
	for _, i := range n.voters() {
		n.w.meanwhile(100, 50)
		o := n.w.nodes[i]
		if o == n && answers > 0 || o != n && (o.cutOff || n.cutOff) || o.frozen > n.w.now {
			continue
		}
		t, err := o.told.Before(term, o.voterTerm)
		if err != nil {
			continue
		}
		if c := (configdb.Confirmed{Ago: o.clock() - t.At, By: t.By}); c.Ago < last.Ago {
			last = c
		}
		if answers++; list.majority(answers) || n.w.off == majorityRemembers {
			return last, nil
		}
	}
	return last, errors.New("too few voters answer")
}

// The database, as this node sees it.
func (n *simNode) Local() *configdb.View {
	if !n.cutOff && n.w.lead == n.i {
		n.view = n.w.mem.Local() // a leader has applied what it committed
	}
	return n.view
}

func (n *simNode) View(context.Context) (*configdb.View, error) { return n.Local(), nil }

func (n *simNode) Txn(_ context.Context, tx *configdb.Txn) (uint64, error) {
	if n.cutOff || n.w.lead < 0 || !n.w.followed() {
		return 0, configdb.ErrNoQuorum
	}
	n.w.meanwhile(8, 100) // it waits for its turn, and for the majority
	if n.cutOff || n.w.lead < 0 || !n.w.followed() {
		return 0, configdb.ErrUncertain
	}
	if n.w.pool != nil && n.w.rng.IntN(40) == 0 { // on its way, when nobody waits for it any more
		n.w.after(n.w.upTo(30*time.Second), func() { _, _ = configdb.Propose(tx, n.w.apply) })
		return 0, configdb.ErrUncertain
	}
	rev, err := configdb.Propose(tx, n.w.apply)
	if n.w.rng.IntN(20) == 0 {
		return 0, configdb.ErrUncertain // decided, but the answer was lost
	}
	n.view = n.w.mem.Local()
	return rev, err
}

// apply commits a transaction, without the preconditions of the rule that is off.
func (w *world) apply(tx *fsm.Txn) (fsm.Outcome, error) {
	var keep []fsm.Precondition
	for _, p := range tx.Require {
		switch {
		case w.off == moveNeedsTerm && p.Check == fsm.CheckTerm,
			w.off == moveNeedsLostMark && p.Check == fsm.CheckRevision && strings.HasPrefix(p.Key, configdb.Nodes.StatusPrefix()),
			w.off == statusIsCompared && p.Check == fsm.CheckRevision && strings.HasPrefix(p.Key, configdb.VMs.StatusPrefix()):
		default:
			keep = append(keep, p)
		}
	}
	tx.Require = keep
	cmd := fsm.Command{Time: int64(w.now), Level: w.levels.Level(w.state.View()), Txns: []fsm.Txn{*tx}}
	out, err := w.state.Apply(w.state.View().Revision()+1, w.term, cmd.Encode())
	if err != nil {
		return fsm.Outcome{}, err
	}
	return out[0], nil
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

func (f simFleet) Choose(_ *api.VM, exclude map[string]string, _ bool) (string, string, error) {
	for _, i := range f.n.w.rng.Perm(len(f.n.w.nodes)) {
		id := f.n.w.nodes[i].id
		if o := f.s.Nodes[id]; o != nil && o.Status.Phase == api.NodeReady && f.avoid[id] == "" && exclude[id] == "" {
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

func (w *world) killTime() time.Duration {
	if w.off == killInTime {
		return w.upTo(10 * KillTime)
	}
	if w.rng.IntN(4) != 0 {
		return w.upTo(KillTime / 5)
	}
	return w.upTo(KillTime)
}

func (w *world) upTo(d time.Duration) time.Duration { return time.Duration(w.rng.Int64N(int64(d))) }

func (w *world) after(d time.Duration, do func()) { w.todo = append(w.todo, event{w.now + d, do}) }

func newWorld(t *testing.T, seed uint64, vms int, off rule) *world {
	state := fsm.New()
	w := &world{
		t: t, off: off, strict: off == everyRule, busy: map[uint64]bool{}, grants: map[uint64]time.Duration{}, earlier: map[uint64]time.Duration{}, rng: rand.New(rand.NewPCG(seed, 7)),
		state: state, mem: configdb.NewOffline(state, 1), term: 1, lead: 0,
	}
	tx := &configdb.Txn{}
	for i := range 5 {
		n := &simNode{w: w, i: i, id: simID(1, i), offset: w.upTo(time.Hour), rate: w.clockRate(), running: map[string]time.Duration{}, voter: 1, roster: roster{1, []list{{1, 1}}, []int{0, 1, 2, 3, 4}}}
		n.told = raftnode.NewTold(0, n.clock())
		w.nodes = append(w.nodes, n)
		o := api.Node{Meta: api.NewMeta(api.KindNode, "", fmt.Sprintf("m%d", i)), Status: api.NodeStatus{Phase: api.NodeReady}}
		o.Meta.ID = n.id
		must(t, configdb.Nodes.Create(tx, &o))
		n.beginDaemon()
		n.petted = n.clock()
	}
	for i := range vms {
		vm := api.VM{Meta: api.NewMeta(api.KindVM, "", fmt.Sprintf("v%d", i)), Spec: api.VMSpec{CPUs: 1, Memory: 64 * api.MiB, Power: api.PowerRunning, HA: api.HARestart}}
		vm.Meta.ID = simID(2, i)
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

// simID is the same in each run, so that a seed gives the same world.
func simID(kind, i int) string { return fmt.Sprintf("%08x-0000-7000-8000-%012x", kind, i) }

// vms returns the VMs in an order that is the same in each run.
func (n *simNode) vms() []string { return slices.Sorted(maps.Keys(n.running)) }

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
	case 5: // the guard is stopped, as by SIGSTOP or a starving host
		if !n.hasWatchdog() {
			break // nothing would be promised
		}
		n.stopped = w.now + w.upTo(time.Minute)
		if w.rng.IntN(2) == 0 && w.countCut() < 2 { // a host in trouble
			n.cutOff = true
		}
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
			if w.lead >= 0 && !w.nodes[w.lead].cutOff {
				n.voter = max(n.voter, w.term)
			}
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
	n, by := w.candidate(can)
	if n == nil {
		w.lead = -1
		return
	}
	w.term++
	w.lead = n.i
	w.vote(n, can)
	n.voter = w.term
	if !w.changing {
		for _, i := range w.rng.Perm(len(can))[:len(w.nodes)/2+1] {
			by = append(by, can[i])
		}
	}
	for _, o := range by {
		o.voter = w.term
	}
	n.roster.term = w.term // its first entry, without which no list is committed
	n.view = w.mem.Local()
	n.leads, n.believes = true, configdb.Leadership{Term: w.term}
	if g := n.svc.grant; w.off == newLeaderWaits {
		g.enter(w.term)
		g.earlier -= 2 * LostAfter
	}
}

// renew is one request for a lease, with delays on the way there and back.
func (n *simNode) renew() {
	sent, life, daemon, asked := n.clock(), n.life, n.daemon, n.w.now
	n.w.after(n.w.upTo(2*time.Second), func() {
		for _, l := range n.w.nodes {
			if !l.leads || l.cutOff != n.cutOff || l.frozen > n.w.now {
				continue
			}
			l.inside++
			l.svc.grant.onWire(n.id)
			a, err := l.svc.grant.renew(context.Background(), n.id)
			l.inside--
			if err == nil {
				n.w.grantedAt(a.Term, asked)
			}
			if err != nil && n.w.off == lostGetsNoLease && l.i == n.w.lead && n.isLost(l.Local()) {
				a, err = renewAnswer{Term: n.w.term, Revision: l.Local().Revision()}, nil
			}
			if err != nil {
				continue
			}
			n.w.after(n.w.upTo(2*time.Second), func() {
				if daemon == n.daemon {
					n.extend(life, sent, a)
				}
			})
			return
		}
	})
}

func (n *simNode) isLost(v *configdb.View) bool {
	o, err := configdb.Nodes.Get(v, n.id)
	return err == nil && o.Status.Phase == api.NodeLost
}

// extend is the arrival of an answer.
func (n *simNode) extend(life int, sent time.Duration, a renewAnswer) {
	if n.frozen >= n.w.now || life != n.life {
		return
	}
	asked := sent
	switch n.w.off {
	case leaseCountsFromRequest:
		sent = n.clock()
	case lapseIsForGood:
		n.keeper.deadline = n.clock() + time.Hour
	}
	if n.keeper.extend(context.Background(), sent+LeaseDuration, a) == nil {
		n.keeper.asked = max(n.keeper.asked, asked)
	}
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
		case n.actPool(&bindings[i], session, revision, ok):
		case n.w.drilling && here && ok && n.actDrill(&bindings[i], running, kill):
		case running && !here && kill == 0:
			n.running[vm] = n.w.now + n.w.killTime()
		case !running && here && ok && n.w.stubborn && n.view.Revision() >= revision:
			n.tryStart(&bindings[i], session)
		case !running && here && ok && !n.w.stubborn && (n.view.Revision() >= revision || n.w.off == startNeedsRevision):
			delay := n.w.upTo(time.Second)
			if n.w.rng.IntN(10) == 0 {
				delay = n.w.upTo(60 * time.Second)
			}
			life := n.life
			n.w.after(delay, func() {
				if life == n.life {
					n.start(session, vm)
				}
			})
		}
	}
}

// impatient never waits, but goes on with what it is about: time here is the
// world's.
type impatient struct{ context.Context }

func (impatient) Done() <-chan struct{} { return over }

var over = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

func (n *simNode) detect(ctx context.Context, term uint64) {
	n.svc.grant.looks(term)
	for _, id := range n.svc.takeReturning() {
		_ = n.svc.readmit(ctx, term, id)
	}
	for _, id := range n.svc.grant.overdue(term, n.svc.readyNodes()) {
		if n.w.off == overdueIsBarred {
			n.svc.grant.settle(term, id)
		}
		n.svc.declareLost(ctx, term, id)
	}
}

// govern is one look of the leader's service, by whoever believes to lead.
func (n *simNode) govern() {
	ctx := impatient{context.Background()}
	term := n.believes.Term
	if n.answered != term && n.w.off != newLeaderWaits && !n.asking && n.w.rng.IntN(4) == 0 {
		n.asking = true
		if n.svc.learn(ctx, term) == nil {
			n.answered = term
			if g := n.svc.grant; g.earlier < g.since {
				n.w.credits++
				n.w.learned(term, time.Duration(float64(g.earlier-n.offset)/n.rate))
			}
		}
		n.asking = false
	}
	if !n.detecting { // one goroutine, which may be in the middle of it
		n.detecting = true
		n.detect(ctx, term)
		n.detecting = false
	}
	n.svc.fenceSilent(term, func(attempt func(context.Context)) {
		soon, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		attempt(soon)
	})
	if n.w.rng.IntN(4) == 0 && !n.w.busy[term] {
		_, _ = n.svc.recover(ctx, term)
	}
	if n.w.stubborn && n.w.rng.IntN(4) == 0 && !n.w.busy[term] {
		_, _ = n.svc.relocate(ctx, term)
	}
}

func (w *world) step(d time.Duration) {
	w.now += d
	w.steps++
	for _, n := range w.nodes {
		n.enforce()
		for _, vm := range n.vms() {
			if kill := n.running[vm]; kill != 0 && kill <= w.now {
				delete(n.running, vm)
			}
		}
		n.watchdog()
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
	w.chaosOfNotes()
	for _, n := range w.nodes {
		if n.frozen > w.now {
			continue
		}
		n.inside++
		if w.rng.IntN(5) == 0 {
			n.renew()
		}
		n.act()
		if n.leads {
			n.govern()
		}
		n.governPool()
		n.beatHeart()
		n.inside--
	}
	if w.restarting {
		w.restartDaemons()
	}
	if w.changing {
		w.changeVoters()
	}
}

// grantedAt takes down that a lease was granted in a term, which was asked for at a time.
func (w *world) grantedAt(term uint64, asked time.Duration) {
	w.grants[term] = max(w.grants[term], asked)
	for later, since := range w.earlier {
		if term < later {
			w.compare(term, later, since)
		}
	}
}

// learned takes down what a leader believes: that no earlier one has granted a lease
// which was asked for later.
func (w *world) learned(term uint64, since time.Duration) {
	w.earlier[term] = since
	for before := range w.grants {
		if before < term {
			w.compare(before, term, since)
		}
	}
}

func (w *world) compare(before, term uint64, since time.Duration) {
	if asked := w.grants[before]; asked > since && w.broken == "" && w.strict {
		w.broken = fmt.Sprintf("at %v: the leader of term %d believes that nothing was granted after %v, that of term %d granted what was asked for at %v", w.now, term, since, before, asked)
	}
}

// restartDaemons restarts one now and then, and often several at once; none that is in the
// middle of something, which it would go on with. Sometimes the leader is cut off as the
// others begin anew, and those come back that it has not reached.
func (w *world) restartDaemons() {
	if w.rng.IntN(100) != 0 {
		return
	}
	if w.lead >= 0 && w.countCut() == 2 && !w.nodes[w.lead].cutOff {
		for _, n := range w.nodes {
			switch {
			case n.i == w.lead || n.cutOff:
				n.cutOff = n.i == w.lead
			case n.inside == 0:
				n.restartDaemon()
				w.restarts++
			}
		}
		return
	}
	for _, i := range w.rng.Perm(len(w.nodes))[:1+w.rng.IntN(3)] {
		if n := w.nodes[i]; n.inside == 0 {
			n.restartDaemon()
			w.restarts++
		}
	}
}

func (w *world) check() (running int) {
	where := map[string]int{}
	for _, n := range w.nodes {
		for _, vm := range n.vms() {
			if w.lockedAway(n, vm) {
				continue
			}
			if other, twice := where[vm]; twice && w.broken == "" {
				w.broken = fmt.Sprintf("at %v: vm %s runs on nodes %d and %d", w.now, vm, other, n.i)
			}
			where[vm] = n.i
			running++
		}
	}
	return running
}

// run goes on until something is broken.
func (w *world) run(steps int) (ran int) {
	for range steps {
		if w.broken != "" {
			break
		}
		w.step(200 * time.Millisecond)
		ran += w.check()
	}
	return ran
}

// moves counts how often VMs were bound anew.
func (w *world) moves() (n uint64) {
	bindings, err := configdb.Bindings.List(w.mem.Local())
	must(w.t, err)
	for i := range bindings {
		n += bindings[i].Spec.Epoch - 1
	}
	return n
}

// Settings of a longer hunt, by scripts/simulate ha.
const (
	envSteps = "MUSTER_SIM_STEPS"
	envSeed  = "MUSTER_SIM_SEED"
)

func setting(t *testing.T, name string, or int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return or
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("%s: %q is no number of 1 or more", name, text)
	}
	return n
}

// rule is one of those that the safety argument in DESIGN.md rests on, or an
// assumption of it.
type rule int

const (
	everyRule rule = iota
	leaderIsConfirmed
	leaseCountsFromRequest
	leaderWaits
	newLeaderWaits
	majorityRemembers // see TestAMajorityOfTheVotersRemembers
	whoBeginsAnewMayHaveTold
	listIsTakenDown
	overdueIsBarred
	lostGetsNoLease
	moveNeedsTerm
	moveNeedsLostMark
	lapseKills
	lapseIsForGood
	startNeedsSession
	startNeedsRevision
	lastPettingInTime
	killInTime
	clocksAgree
	// Those of "A start that fails"; see relocate_test.go.
	statusIsCompared
	startIsCommitted
	startNeedsBinding
	drillEndsFirst
	// Those of the storage guard; see storagesim_test.go.
	promisedFirst
	lockedOutFirst
	takeBackWaits
	fencedStartsNothing
	// Those of the storage heartbeat; see heartbeatsim_test.go.
	noteCountsFromQuestion
	answerNamesQuestion
	onlyWhatRunsGoesOn
	votersLeaveTheirTerms
	whoHasVotedDoesNotCount
	majorityLeaves
	oneTerm
	abstentionIsRemembered
	whoAnsweredLeaves
)

// ruleOff says what a rule is, and a world that goes wrong without it.
type ruleOff struct {
	what string
	seed uint64
}

var rules = map[rule]ruleOff{
	leaderIsConfirmed:      {"a lease is granted only after a majority has confirmed the leader", 29},
	leaseCountsFromRequest: {"a lease counts from the moment it was asked for", 36},
	leaderWaits:            {"a node is lost only after lease, drift, kill time and margin", 14},
	newLeaderWaits:         {"a new leader waits as if every node had just been granted a lease", 1},
	overdueIsBarred:        {"a node that is being declared lost gets no lease", 82},
	lostGetsNoLease:        {"a lost node gets no lease before it is readmitted", 88},
	moveNeedsTerm:          {"a decision lands only in the term of its leader", 20},
	moveNeedsLostMark:      {"a VM moves only while its node is marked lost", 62},
	lapseKills:             {"the guard kills when the lease has lapsed", 3},
	lapseIsForGood:         {"a lapsed session is not taken up again", 1},
	startNeedsSession:      {"the guard starts a VM only in the session of the decision", 2},
	startNeedsRevision:     {"a decision waits for the revision of its lease", 4},
	lastPettingInTime:      {"the watchdog of a guard that is stopped bites before the VMs move", 38},
	killInTime:             {"assumption: what is killed is dead after the kill time", 36},
	clocksAgree:            {"assumption: clocks differ in rate by less than 1 %", 40},
}

// needed switches each rule off in turn: one of so many worlds, from the rule's seed
// on, must go wrong without it.
func needed(t *testing.T, rules map[rule]ruleOff, worlds int, create func(t *testing.T, seed uint64, off rule) *world) {
	const steps = 2000
	for _, off := range slices.Sorted(maps.Keys(rules)) {
		r := rules[off]
		t.Run(r.what, func(t *testing.T) {
			for seed := r.seed; seed < r.seed+uint64(worlds); seed++ {
				w := create(t, seed, off)
				w.run(steps)
				w.mem.Close()
				if w.broken != "" {
					t.Logf("without %q, world %d: %s", r.what, seed, w.broken)
					return
				}
			}
			t.Errorf("%d worlds of %d steps without this rule, and nothing went wrong", worlds, steps)
		})
	}
}
