// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/accel"
	"github.com/muster-vm/muster/internal/qmptest"
	"github.com/muster-vm/muster/reconcile"
)

// pair is two nodes on one database, with a leader that ends operations as the
// task service does. It fails the test as soon as the guests of two fake QEMUs
// run at once.
type pair struct {
	*env  // node-1, the source
	other *env
	links *links
	real  bool

	mu      sync.Mutex
	running int
	most    int
}

// links carry streams between the nodes of a pair.
type links struct {
	mu    sync.Mutex
	to    map[string]*env
	cut   bool
	conns []net.Conn
	ctx   context.Context
}

type link struct {
	*links
	from string
}

func (l link) Stream(_ context.Context, node string) (net.Conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut || l.to[node] == nil {
		return nil, fmt.Errorf("node %s cannot be reached", node)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer ln.Close()
	a, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		return nil, err
	}
	b, err := ln.Accept()
	if err != nil {
		return nil, err
	}
	l.conns = append(l.conns, a, b)
	to := l.to[node]
	to.mu.Lock()
	h := to.h
	to.mu.Unlock()
	go h.ServeStream(l.ctx, b, l.from)
	return a, nil
}

// sever breaks all streams, and refuses new ones while on.
func (l *links) sever(on bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = on
	for _, c := range l.conns {
		_ = c.Close()
	}
	l.conns = nil
}

func newPair(t *testing.T, real bool) *pair {
	t.Helper()
	p := &pair{env: newEnv(t, real), real: real}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	p.links = &links{to: map[string]*env{}, ctx: ctx}
	dir, err := os.MkdirTemp("", "hv")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	p.other = &env{t: t, db: p.db, fakes: &fakes{}, ports: &testPorts{}, runDir: dir, clock: p.clock, node: "node-2", name: "node-2"}
	p.env.name = "node-1"
	p.other.guard = &testGuard{launch: p.other.fakes.launch, session: 1, procs: map[string]*testProc{}}
	if real {
		if _, _, err := accel.FindQEMU(t.Context(), ""); err != nil {
			t.Fatal(err)
		}
		p.other.guard.launch = execQEMU
	} else {
		p.fakes.tune, p.other.fakes.tune = p.watch, p.watch
	}
	node := api.Node{Meta: api.NewMeta(api.KindNode, "", "n2"), Spec: api.NodeSpec{Accelerator: api.AccelTCG}}
	node.Meta.ID, node.Status.Phase = "node-2", api.NodeReady
	tx := &configdb.Txn{}
	must(t, configdb.Nodes.Create(tx, &node))
	p.commit(tx)
	p.links.to["node-1"], p.links.to["node-2"] = p.env, p.other
	t.Cleanup(p.other.guard.killAll)
	t.Cleanup(func() { p.other.stop() })
	p.other.vols = &testVolumes{paths: map[string]string{}, dir: dir}
	p.other.vols.put("web1-disk0", p.runDir+"/disk.qcow2")
	p.vols.dir = p.runDir
	p.stop()
	p.env.streams, p.other.streams = link{p.links, "node-1"}, link{p.links, "node-2"}
	p.env.begin()
	p.other.begin()
	done := make(chan struct{})
	go p.lead(ctx, done)
	t.Cleanup(func() { cancel(); <-done })
	return p
}

// lead takes over the last word about operations.
func (p *pair) lead(ctx context.Context, done chan struct{}) {
	defer close(done)
	for ctx.Err() == nil {
		v := p.db.Local()
		ops, _ := configdb.Operations.List(v)
		for _, op := range ops {
			arr, err := configdb.Arrivals.Get(v, op.Meta.ID)
			if !op.Status.Phase.Final() || err != nil {
				continue
			}
			tx := &configdb.Txn{}
			tx.RequireRevision(configdb.Operations.StatusKey(op.Meta.ID), op.Meta.StatusRevision)
			configdb.Operations.DeleteUnnamed(tx, &op)
			configdb.Arrivals.DeleteUnnamed(tx, &arr)
			tx.Put("test/ended", []byte(string(op.Status.Phase)+": "+op.Status.Message))
			_, _ = p.db.Txn(ctx, tx)
		}
		_, _ = p.db.WaitRevision(ctx, v.Revision()+1)
	}
}

func (p *pair) watch(q *qmptest.QEMU) {
	q.Watch(func(on bool) {
		p.mu.Lock()
		defer p.mu.Unlock()
		if !on {
			p.running--
			return
		}
		p.running++
		p.most = max(p.most, p.running)
	})
}

// migrate wishes for a migration to the other node.
func (p *pair) migrate(id string, change func(*api.MigrationSpec)) {
	p.t.Helper()
	v := p.db.Local()
	vm, err := configdb.VMs.Get(v, id)
	must(p.t, err)
	b, err := configdb.Bindings.Get(v, id)
	must(p.t, err)
	to := map[string]string{"node-1": "node-2", "node-2": "node-1"}[b.Spec.NodeID]
	m := &api.MigrationSpec{NodeID: to, Node: to}
	if change != nil {
		change(m)
	}
	task := api.NewID()
	op := api.Operation{Meta: api.NewMeta(api.KindOperation, "", vm.Meta.Name)}
	op.Meta.ID = id
	op.Spec = api.OperationSpec{Action: api.ActionVMMigrate, VM: vm.Meta.Name, TaskID: task, NodeID: b.Spec.NodeID, Epoch: b.Spec.Epoch, Migration: m}
	arr := api.Arrival{Meta: api.NewMeta(api.KindArrival, "", vm.Meta.Name), Spec: api.ArrivalSpec{TaskID: task, NodeID: to, Epoch: b.Spec.Epoch + 1}}
	arr.Meta.ID = id
	tx := &configdb.Txn{}
	must(p.t, configdb.Operations.CreateUnnamed(tx, &op))
	must(p.t, configdb.Arrivals.CreateUnnamed(tx, &arr))
	tx.Delete("test/ended")
	p.commit(tx)
}

func (p *pair) cancel(id string) {
	p.t.Helper()
	_, err := configdb.Transact(p.t.Context(), p.db, "test", 20, func(v *configdb.View, tx *configdb.Txn) error {
		op, err := configdb.Operations.Get(v, id)
		if err != nil {
			return err
		}
		op.Spec.Cancel = true
		return configdb.Operations.UpdateSpec(v, tx, &op)
	})
	must(p.t, err)
}

// over waits for the operation's end and checks that it was the wished one.
func (p *pair) over(id, want string) {
	p.t.Helper()
	if last := p.ended(id); !strings.Contains(last, want) {
		p.t.Fatalf("it ended with %q; want %q", last, want)
	}
}

// ended waits until the migration is over and returns how it ended.
func (p *pair) ended(id string) (last string) {
	p.t.Helper()
	p.until("the migration is over", func() bool {
		v := p.db.Local()
		e, _ := v.Get("test/ended")
		last = string(e.Value)
		_, err := configdb.Operations.Get(v, id)
		return err != nil && last != ""
	}, func() string {
		v := p.db.Local()
		op, _ := configdb.Operations.Get(v, id)
		arr, _ := configdb.Arrivals.Get(v, id)
		b, _ := configdb.Bindings.Get(v, id)
		vm, _ := configdb.VMs.Get(v, id)
		return fmt.Sprintf("operation %+v, arrival %+v, binding %+v, status %+v", op.Status, arr.Status, b.Spec, vm.Status)
	})
	return last
}

// settled waits until the guest runs on one node and nothing is left on the
// other.
func (p *pair) settled(id, node string) {
	p.t.Helper()
	here, there := p.env, p.other
	if node == "node-2" {
		here, there = there, here
	}
	p.until("the guest runs on "+node+" and nowhere else", func() bool {
		vm, err := configdb.VMs.Get(p.db.Local(), id)
		b, berr := configdb.Bindings.Get(p.db.Local(), id)
		proc, ok := here.guard.get(id)
		_, left := there.guard.get(id)
		plugged, _ := there.ports.left()
		p.mu.Lock()
		defer p.mu.Unlock()
		return (p.real || p.running == 1) && err == nil && berr == nil && ok && proc.State == ProcessRunning && !left && b.Spec.NodeID == node && plugged == 0 &&
			vm.Status.Phase == api.VMRunning && vm.Status.PID == proc.PID && vm.Status.Epoch == b.Spec.Epoch && here.mark(id) == "" && there.mark(id) == ""
	}, func() string {
		a, aok := here.guard.get(id)
		o, ook := there.guard.get(id)
		plugged, calls := there.ports.left()
		return fmt.Sprintf("status %+v, binding %+v; here %+v %v %q; there %+v %v %q; plugged there %d: %v", p.vm(id).Status, p.binding(id).Spec, a, aok, here.mark(id), o, ook, there.mark(id), plugged, calls)
	})
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.most > 1 {
		p.t.Fatalf("%d guests ran at once", p.most)
	}
}

func (e *env) mark(id string) string {
	task, err := e.h.marked(id)
	must(e.t, err)
	return task
}

func (p *pair) begun(spec api.VMSpec) string {
	p.t.Helper()
	spec.NICs = []api.VMNIC{{Network: "lan", MAC: "52:54:00:00:00:01", Address: "10.0.0.1"}}
	id, _ := p.env.running(spec)
	return id
}

// lateLook returns a look at the source of a migration whose memory flows, and the
// operation as it saw it. It has begun, and whatever happens now comes after its view.
func lateLook(t *testing.T) (*pair, *step, api.Operation) {
	t.Helper()
	p := newPair(t, false)
	id := p.begun(api.VMSpec{})
	p.fakes.qemu().Hold()
	p.migrate(id, nil)
	p.atStep("active")
	p.stop()
	v := p.db.Local()
	op, err := configdb.Operations.Get(v, id)
	must(t, err)
	return p, &step{h: p.env.h, v: v, vm: p.vm(id), b: p.binding(id), in: &instance{id: id}, now: p.clock.now(), result: reconcile.Result{}}, op
}

// atStep waits until the source's QEMU is at a step.
func (p *pair) atStep(status string) {
	p.t.Helper()
	p.until("migration status "+status, func() bool { return p.fakes.qemu().Migration() == status }, func() string { return p.fakes.qemu().Migration() })
}

// flows waits until a stream between the nodes is open.
func (p *pair) flows() {
	p.t.Helper()
	p.until("a stream is open", func() bool {
		p.links.mu.Lock()
		defer p.links.mu.Unlock()
		return len(p.links.conns) > 0
	}, nothing)
}

func TestMigrationMovesTheGuestAndBack(t *testing.T) {
	p := newPair(t, false)
	id := p.begun(api.VMSpec{HA: api.HARestart, CPUs: 1})
	p.change(id, func(vm *api.VM) { vm.Spec.Watchdog = &api.VMWatchdog{Action: api.WatchdogPause} }) // takes a restart: what moves is what runs
	p.migrate(id, nil)
	p.over(id, "succeeded: it runs on node node-2")
	p.settled(id, "node-2")
	if b := p.binding(id); b.Spec.Epoch != 2 || !b.Spec.Protected {
		t.Errorf("binding %+v", b.Spec)
	}
	if pr, _ := p.other.guard.get(id); pr.Epoch != 2 || !pr.Protected {
		t.Errorf("process %+v", pr)
	}
	argv := strings.Join(p.other.guard.starts[0].Argv, " ")
	if strings.Contains(argv, "i6300esb") || !strings.Contains(argv, "-S -incoming defer") {
		t.Errorf("the target's QEMU: %s", argv)
	}
	p.wait(id, "still pending there", func(vm api.VM) bool {
		return strings.Contains(condition(vm, ConditionPendingRestart), ": watchdog") && vm.Status.Hardware.Watchdog == nil
	})
	p.migrate(id, nil)
	p.over(id, "succeeded: it runs on node node-1")
	p.settled(id, "node-1")
	if n := p.guard.startCount() + p.other.guard.startCount(); n != 3 {
		t.Errorf("%d processes were started, want 3", n)
	}
}

// An older QEMU that emulates processors misses writes of a guest that runs while its
// memory is sent. Guests crashed after migrations, in lists whose pages were stale.
func TestGuestOfAnOldEmulatorStandsStillWhileItMoves(t *testing.T) {
	for _, c := range []struct {
		name string
		held func(p *pair, id string) // while memory flows
		ends string
		at   string
	}{
		{"it moves", func(p *pair, _ string) { p.fakes.qemu().Release() }, "succeeded: it runs on node node-2", "node-2"},
		{"it is cancelled", func(p *pair, id string) { p.cancel(id) }, "cancelled", "node-1"},
		{"the target's QEMU dies", func(p *pair, _ string) { p.other.fakes.qemu().Exit(-1, 9) }, "failed", "node-1"},
		{"the source's daemon dies", func(p *pair, _ string) { p.stop(); p.links.sever(false); p.begin() }, "failed", "node-1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t, false)
			old := func(q *qmptest.QEMU) { q.Major = 7; p.watch(q) }
			p.fakes.tune, p.other.fakes.tune = old, old
			id := p.begun(api.VMSpec{})
			q := p.fakes.qemu()
			q.Hold()
			p.migrate(id, nil)
			p.atStep("active")
			if q.Count("stop") != 1 || q.State() != "paused" {
				t.Fatalf("halted %d times, it is %s", q.Count("stop"), q.State())
			}
			c.held(p, id)
			p.over(id, c.ends)
			p.settled(id, c.at)
			if c.at == "node-1" {
				p.until("it goes on", func() bool { return q.State() == "running" }, q.State)
			}
		})
	}
}

func TestPausedGuestMovesAndStaysPaused(t *testing.T) {
	p := newPair(t, false)
	id := p.begun(api.VMSpec{})
	p.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerPaused })
	p.wait(id, "paused", func(vm api.VM) bool { return vm.Status.Phase == api.VMPaused })
	p.migrate(id, nil)
	p.over(id, "succeeded")
	p.wait(id, "paused there", func(vm api.VM) bool {
		return vm.Status.Phase == api.VMPaused && vm.Status.Node == "node-2" && vm.Status.PID != 0
	})
	if n := p.other.fakes.qemu().Count("cont"); n != 0 {
		t.Errorf("the guest was continued %d times", n)
	}
	p.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
	p.settled(id, "node-2")
}

// Each case does harm at a step and says how the migration ends and where the
// guest then runs. newlife means that it was started anew.
func TestMigrationSurvivesHarmAtEveryStep(t *testing.T) {
	source := func(p *pair) *qmptest.QEMU { return p.fakes.qemu() }
	target := func(p *pair) *qmptest.QEMU { return p.other.fakes.qemu() }
	restart := func(e *env) { e.stop(); e.begin() }
	for _, c := range []struct {
		name    string
		before  func(p *pair, id string) // before it is wished for
		held    func(p *pair, id string) // while memory flows
		after   func(p *pair, id string) // when it may come to the switch
		ends    string
		at      string
		newlife bool
	}{
		{name: "nothing", ends: "succeeded", at: "node-2"},
		{name: "cancel while memory flows", held: func(p *pair, id string) { p.cancel(id) }, ends: "cancelled: cancelled as wished", at: "node-1"},
		{name: "the streams break", held: func(p *pair, _ string) { p.flows(); p.links.sever(false) }, ends: "failed", at: "node-1"},
		{name: "the target cannot be reached", before: func(p *pair, _ string) { p.links.sever(true) }, ends: "failed: the transfer was broken off", at: "node-1"},
		{name: "the source's daemon dies while memory flows", held: func(p *pair, _ string) { restart(p.env) }, ends: "failed", at: "node-1"},
		{name: "the target's daemon dies while memory flows", held: func(p *pair, _ string) { p.flows(); p.other.stop(); p.links.sever(false); p.other.begin() }, ends: "failed", at: "node-1"},
		{name: "the target's QEMU dies while memory flows", held: func(p *pair, _ string) { target(p).Exit(-1, 9) }, ends: "failed", at: "node-1"},
		{name: "the source's QEMU dies while memory flows", held: func(p *pair, _ string) { source(p).Exit(-1, 9) }, ends: "failed: QEMU of vm web1 ended", at: "node-1", newlife: true},
		{name: "the target cannot plug", before: func(p *pair, _ string) { p.other.ports.set(fmt.Errorf("no bridge")) }, ends: "cancelled", at: "node-1"},
		{name: "the guard of the target refuses", before: func(p *pair, _ string) { p.other.fakes.broken = "qemu: no such machine" }, ends: "no such machine", at: "node-1"},
		{name: "the target's QEMU dies in the switch", held: func(p *pair, _ string) {
			q := target(p)
			source(p).On("migrate-continue", func() { q.Exit(-1, 9) })
		}, ends: "failed", at: "node-1"},
		{name: "the source's daemon dies in the switch", held: func(p *pair, _ string) {
			done := make(chan struct{})
			source(p).On("migrate-continue", func() { close(done) })
			source(p).Release()
			<-done
			restart(p.env)
		}, ends: "", at: ""},
		{name: "the target's QEMU refuses to run", held: func(p *pair, _ string) { target(p).Refuse("cont", `Failed to get "write" lock`) },
			ends: "refuses to run the guest there", at: "node-1"},
		{name: "the target's QEMU dies instead of running", held: func(p *pair, _ string) { p.other.guard.lease(0) }, after: func(p *pair, id string) {
			p.until("handed over", func() bool { return p.binding(id).Spec.Epoch == 2 }, nothing)
			target(p).Exit(-1, 9)
			p.other.guard.lease(2)
			p.other.h.Wake()
		}, ends: "the vm goes on on node node-1", at: "node-1"},
		{name: "both QEMUs die after the hand-over", held: func(p *pair, _ string) { p.other.guard.lease(0) }, after: func(p *pair, id string) {
			p.until("handed over", func() bool { return p.binding(id).Spec.Epoch == 2 }, nothing)
			source(p).Exit(-1, 9)
			target(p).Exit(-1, 9)
			p.other.guard.lease(2)
			p.other.h.Wake()
		}, ends: "it starts anew there", at: "node-2"},
		{name: "both daemons die after the hand-over", held: func(p *pair, _ string) { p.other.guard.lease(0) }, after: func(p *pair, id string) {
			p.until("handed over", func() bool { return p.binding(id).Spec.Epoch == 2 }, nothing)
			restart(p.env)
			p.other.stop()
			p.other.guard.lease(2)
			p.other.begin()
		}, ends: "succeeded", at: "node-2"},
		{name: "the source loses its lease in the switch", held: func(p *pair, _ string) { p.guard.lease(0) }, ends: "failed: this node lost its lease", at: "node-1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t, false)
			id := p.begun(api.VMSpec{})
			if c.before != nil {
				c.before(p, id)
			}
			p.fakes.qemu().Hold()
			p.migrate(id, nil)
			if c.held != nil {
				p.atStep("active")
				c.held(p, id)
			}
			if c.name == "the target cannot plug" {
				p.until("the reason is said", func() bool {
					a, err := configdb.Arrivals.Get(p.db.Local(), id)
					return err == nil && strings.Contains(a.Status.Message, "no bridge")
				}, nothing)
				p.cancel(id)
			}
			p.fakes.qemu().Release()
			if c.after != nil {
				c.after(p, id)
			}
			p.over(id, c.ends)
			at := c.at
			if at == "" { // either is right, but only one
				at = p.binding(id).Spec.NodeID
			}
			if strings.Contains(c.name, "lease") {
				p.guard.lease(2)
				p.h.Wake()
			}
			p.settled(id, at)
			if n := p.guard.startCount(); n > 1 != c.newlife && at == "node-1" {
				t.Errorf("the source's guest was started %d times", n)
			}
		})
	}
}

// A forced stop is let through at any moment: whoever has the guest ends it.
func TestForcedStopEndsAGuestThatMoves(t *testing.T) {
	for name, handed := range map[string]bool{"while memory flows": false, "after the hand-over": true} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, false)
			id := p.begun(api.VMSpec{})
			p.fakes.qemu().Hold()
			p.migrate(id, nil)
			p.atStep("active")
			ends := "failed: QEMU of vm web1 ended"
			if handed {
				ends = "succeeded: it " // runs there, or was stopped there, whichever is heard first
				p.other.guard.lease(0)
				p.fakes.qemu().Release()
				p.until("handed over", func() bool { return p.binding(id).Spec.Epoch == 2 }, nothing)
			}
			p.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
			p.other.guard.lease(2)
			p.other.h.Wake()
			p.over(id, ends)
			p.until("no process is left", func() bool {
				_, a := p.guard.get(id)
				_, b := p.other.guard.get(id)
				return !a && !b && p.vm(id).Status.Phase == api.VMStopped
			}, func() string { return fmt.Sprintf("%+v", p.vm(id).Status) })
			if handed && p.other.fakes.qemu().Count("cont") > 1 { // once by a look that began before the wish
				t.Error("the guest was let run again and again")
			}
		})
	}
}

// ha may bind the VM anew at any time; what belongs to an older epoch gives way.
func TestHandedOverGuestGivesWayToALaterEpoch(t *testing.T) {
	for _, node := range []string{"node-1", "node-3"} {
		t.Run("bound to "+node, func(t *testing.T) {
			p := newPair(t, false)
			id := p.begun(api.VMSpec{})
			q := p.fakes.qemu()
			q.Hold()
			p.migrate(id, nil)
			p.atStep("active")
			p.other.guard.lease(0) // so that it does not run there
			q.Release()
			p.until("handed over", func() bool { return p.binding(id).Spec.Epoch == 2 }, nothing)
			p.other.stop()
			p.other.guard.killAll() // the host is gone
			p.rebind(id, node, 3)
			p.until("the old guest is killed", func() bool { return q.State() != "running" && p.guard.killed(id) }, nothing)
			if node == "node-1" {
				p.until("started anew", func() bool { pr, ok := p.guard.get(id); return ok && pr.Epoch == 3 && pr.State == ProcessRunning }, nothing)
			}
			if q.Count("cont") != 0 {
				t.Error("the old guest went on")
			}
		})
	}
}

// ha may choose the very node where a migration that came to nothing has left a
// loaded guest: that is older than the disk, and must not run.
func TestLoadedGuestIsNotRunAfterALaterMove(t *testing.T) {
	p := newPair(t, false)
	late := &lateDB{DB: p.other.db}
	p.other.stop()
	p.other.adapt = func(c *Config) { c.DB = late }
	p.other.begin()
	id := p.begun(api.VMSpec{})
	q := p.fakes.qemu()
	q.Hold()
	p.migrate(id, nil)
	p.atStep("active")
	loadedThere := func() bool { o := p.other.fakes.qemu(); return o != nil && o.Migration() == "completed" }
	q.OnSent(func() {
		for end := time.Now().Add(patience); !loadedThere() && time.Now().Before(end); {
			time.Sleep(time.Millisecond) // what is on the line would be lost with the line
		}
		late.standStill() // its daemon does not see the end
		p.guard.lease(0)  // too late for QEMU, in time for the commit
	})
	q.Release()
	p.until("loaded there", loadedThere, nothing)
	loaded := p.other.fakes.qemu()
	p.other.stop()
	p.over(id, "failed")
	p.stop()
	p.guard.killAll() // the source is lost
	p.rebind(id, "node-2", 2)
	late.goOn()
	p.other.begin()
	p.until("started anew", func() bool {
		pr, ok := p.other.guard.get(id)
		return ok && pr.Epoch == 2 && p.other.guard.startCount() == 2 && pr.State == ProcessRunning
	}, nothing)
	if loaded.Count("cont") != 0 {
		t.Error("the old guest ran")
	}
}

// copying makes a migration copy the VM's disk along.
func (p *pair) copying(id string) func(*api.MigrationSpec) {
	vm := p.vm(id)
	vol, err := configdb.Volumes.Find(p.db.Local(), "", vm.Spec.Disks[0].Volume)
	must(p.t, err)
	return func(m *api.MigrationSpec) { m.Volumes = []string{vol.Meta.ID} }
}

func (p *pair) volumeNode(id string) string {
	vm := p.vm(id)
	vol, err := configdb.Volumes.Find(p.db.Local(), "", vm.Spec.Disks[0].Volume)
	must(p.t, err)
	return vol.Spec.Node
}

func TestMigrationWithDisks(t *testing.T) {
	for name, c := range map[string]struct {
		held     func(p *pair, id string)
		ends, at string
	}{
		"nothing happens":                    {ends: "succeeded", at: "node-2"},
		"cancelled":                          {held: func(p *pair, id string) { p.cancel(id) }, ends: "cancelled", at: "node-1"},
		"the copy breaks while memory flows": {held: func(p *pair, _ string) { p.fakes.qemu().BreakMirrors("No space left on device") }, ends: "No space left on device", at: "node-1"},
		"the source's daemon dies":           {held: func(p *pair, _ string) { p.stop(); p.begin() }, ends: "failed", at: "node-1"},
		"the target's QEMU dies":             {held: func(p *pair, _ string) { p.other.fakes.qemu().Exit(-1, 9) }, ends: "failed", at: "node-1"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, false)
			id := p.begun(api.VMSpec{})
			p.fakes.qemu().Hold()
			p.migrate(id, p.copying(id))
			if c.held != nil {
				p.atStep("active")
				c.held(p, id)
			}
			p.fakes.qemu().Release()
			p.over(id, c.ends)
			p.settled(id, c.at)
			want := ""
			if c.at == "node-2" {
				want = c.at
			}
			if got := p.volumeNode(id); got != want || len(p.vols.marks) != 1 {
				t.Errorf("the volume is on %q, want %q; marked %v", got, want, p.vols.marks)
			}
			if c.at == "node-1" {
				p.until("no job is left", func() bool { return len(p.fakes.qemu().JobTypes()) == 0 }, nothing)
			}
		})
	}
}

func TestMigrationOfARealQEMUWithItsDisk(t *testing.T) {
	p := newPair(t, true)
	id, _ := p.env.running(api.VMSpec{Memory: 64 * api.MiB})
	p.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
	p.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	src := p.runDir + "/disk.qcow2"
	if out, err := exec.Command("qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 64k 40M", "-c", "write -P 0x17 900M 2M", src).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	p.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerRunning, false })
	p.wait(id, "running", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning })
	p.migrate(id, p.copying(id))
	p.over(id, "succeeded")
	p.settled(id, "node-2")
	p.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
	p.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	dst, _, err := p.other.vols.Resolve(nil, "", "web1-disk0")
	must(t, err)
	if out, err := exec.Command("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", src, dst).CombinedOutput(); err != nil || src == dst {
		t.Fatalf("%v: %s", err, out)
	}
}

func TestMigrationOfARealQEMU(t *testing.T) {
	p := newPair(t, true)
	id, was := p.env.running(api.VMSpec{Memory: 64 * api.MiB})
	p.until("the firmware has spoken", func() bool { // else it would at the target
		c, err := p.env.h.Console(id)
		return err == nil && strings.Contains(string(c.History(1<<20)), "SeaBIOS")
	}, func() string { return "no word of it" })
	p.migrate(id, nil)
	p.over(id, "succeeded")
	p.settled(id, "node-2")
	c, err := p.other.h.Console(id)
	must(t, err)
	if strings.Contains(string(c.History(1<<20)), "SeaBIOS") {
		t.Error("the firmware began anew")
	}
	p.migrate(id, over4)
	p.over(id, "succeeded")
	p.settled(id, "node-1")
	if now := p.vm(id); now.Status.PID == was.Status.PID || now.Status.Crashes != 0 {
		t.Errorf("%+v", now.Status)
	}
}
