// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
	"github.com/muster-vm/muster/hypervisor/accel"
	"github.com/muster-vm/muster/internal/access"
	"github.com/muster-vm/muster/internal/qmptest"
)

const patience = 2 * time.Minute

// launcher makes a process that calls exited once when it has ended.
type launcher func(r StartRequest, exited func(code, signal int)) (pid int, kill func(), err error)

// testGuard is a Guard inside the test.
type testGuard struct {
	launch launcher
	event  func(vm string)

	mu       sync.Mutex
	session  uint64 // the one whose lease is valid; 0: none
	revision uint64 // what a decision needs in it
	procs    map[string]*testProc
	starts   []StartRequest
	refuse   error // what Protect answers
	calls    []string
}

type testProc struct {
	Process
	kill func()
	done chan struct{}
}

func (g *testGuard) Start(_ context.Context, r StartRequest) (Process, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if r.Session == 0 || r.Session != g.session {
		return Process{}, fmt.Errorf("session %d lapsed", r.Session)
	}
	if p := g.procs[r.VM]; p != nil && p.State != ProcessExited {
		return Process{}, errors.New("exists")
	}
	p := &testProc{done: make(chan struct{})}
	p.Process = Process{VM: r.VM, Epoch: r.Epoch, Protected: r.Protected, State: ProcessRunning, LogPath: r.LogPath}
	if r.User != nil {
		p.UID = r.User.UID
	}
	pid, kill, err := g.launch(r, func(code, signal int) { g.exited(p, code, signal) })
	if err != nil {
		return Process{}, err
	}
	p.PID, p.kill = pid, kill
	g.procs[r.VM] = p
	g.starts = append(g.starts, r)
	return p.Process, nil
}

func (g *testGuard) exited(p *testProc, code, signal int) {
	g.mu.Lock()
	if p.Reason == "" {
		p.Reason = "exited"
	}
	p.State, p.ExitCode, p.Signal = ProcessExited, code, signal
	event := g.event
	g.mu.Unlock()
	close(p.done)
	if event != nil {
		event(p.VM)
	}
}

func (g *testGuard) end(p *testProc, reason string) {
	g.mu.Lock()
	if p.State == ProcessRunning {
		p.State, p.Reason = ProcessKilling, reason
	}
	g.mu.Unlock()
	p.kill()
	<-p.done
}

func (g *testGuard) Kill(_ context.Context, vm string) error {
	g.mu.Lock()
	p := g.procs[vm]
	g.calls = append(g.calls, "kill "+vm)
	running := p != nil && p.State != ProcessExited
	g.mu.Unlock()
	if running {
		g.end(p, ReasonKill)
	}
	return nil
}

func (g *testGuard) Protect(_ context.Context, vm string, on bool) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.calls = append(g.calls, fmt.Sprintf("protect %v", on))
	if g.refuse != nil {
		return g.refuse
	}
	if p := g.procs[vm]; p != nil {
		p.Protected = on
	}
	return nil
}

func (g *testGuard) List(context.Context) ([]Process, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []Process
	for _, p := range g.procs {
		out = append(out, p.Process)
	}
	return out, nil
}

func (g *testGuard) Forget(_ context.Context, vm string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if p := g.procs[vm]; p != nil && p.State == ProcessExited {
		delete(g.procs, vm)
	}
	return nil
}

// Current implements Lease: the same session that the guard knows.
func (g *testGuard) Current() (session, revision uint64, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.session, g.revision, g.session != 0
}

// needs sets the revision that a decision's view must have reached.
func (g *testGuard) needs(revision uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.revision = revision
}

// lease begins a session, or ends it with 0 and kills the protected VMs.
func (g *testGuard) lease(session uint64) {
	g.mu.Lock()
	g.session = session
	var doomed []*testProc
	for _, p := range g.procs {
		if session == 0 && p.Protected && p.State == ProcessRunning {
			doomed = append(doomed, p)
		}
	}
	g.mu.Unlock()
	for _, p := range doomed {
		g.end(p, ReasonLease)
	}
}

func (g *testGuard) get(vm string) (Process, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if p := g.procs[vm]; p != nil {
		return p.Process, true
	}
	return Process{}, false
}

func (g *testGuard) startCount() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.starts)
}

// killed reports whether the VM's process was asked to be killed.
func (g *testGuard) killed(vm string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, c := range g.calls {
		if c == "kill "+vm {
			return true
		}
	}
	return false
}

func (g *testGuard) killAll() {
	g.mu.Lock()
	all := make([]*testProc, 0, len(g.procs))
	for _, p := range g.procs {
		if p.State != ProcessExited {
			all = append(all, p)
		}
	}
	g.event = nil
	g.mu.Unlock()
	for _, p := range all {
		g.end(p, ReasonKill)
	}
}

// execQEMU launches the real program.
func execQEMU(r StartRequest, exited func(code, signal int)) (int, func(), error) {
	log, err := os.OpenFile(r.LogPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return 0, nil, err
	}
	defer log.Close()
	cmd := exec.Command(r.Argv[0], r.Argv[1:]...)
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = r.Env, r.Dir, log, log
	if u := r.User; u != nil {
		cred := &syscall.Credential{Uid: uint32(u.UID), Gid: uint32(u.GID)}
		for _, g := range u.Groups {
			cred.Groups = append(cred.Groups, uint32(g))
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	}
	if err := cmd.Start(); err != nil {
		return 0, nil, err
	}
	go func() {
		_ = cmd.Wait()
		ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
		if ws.Signaled() {
			exited(-1, int(ws.Signal()))
			return
		}
		exited(ws.ExitStatus(), 0)
	}()
	return cmd.Process.Pid, func() { _ = cmd.Process.Kill() }, nil
}

// fakes launches qmptest QEMUs and hands them to the test.
type fakes struct {
	mu     sync.Mutex
	n      int
	last   *qmptest.QEMU
	broken string // written to the log instead of starting
	dumb   bool   // guests ignore the power button
	tune   func(*qmptest.QEMU)
}

func (f *fakes) launch(r StartRequest, exited func(code, signal int)) (int, func(), error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.n++
	if f.broken != "" {
		log, err := os.OpenFile(r.LogPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600) // as the guard does
		if err != nil {
			return 0, nil, err
		}
		_, err = log.WriteString(f.broken)
		if err := errors.Join(err, log.Close()); err != nil {
			return 0, nil, err
		}
		go exited(1, 0)
		return 1000 + f.n, func() {}, nil
	}
	q, err := qmptest.Start(r.Argv, exited)
	if err != nil {
		return 0, nil, err
	}
	q.IgnorePowerButton = f.dumb
	if f.tune != nil {
		f.tune(q)
	}
	f.last = q
	return 1000 + f.n, func() { q.Exit(-1, 9) }, nil
}

func (f *fakes) qemu() *qmptest.QEMU {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.last
}

// testVolumes are files below a directory.
type testVolumes struct {
	mu    sync.Mutex
	paths map[string]string
	dir   string // of copies
	marks []string
	// released are those that were freed before a start, in order.
	released []string
}

func (v *testVolumes) MakeCopy(_ context.Context, view *configdb.View, id string) (string, string, error) {
	vol, err := configdb.Volumes.Get(view, id)
	if err != nil {
		return "", "", err
	}
	path := filepath.Join(v.dir, id+".qcow2")
	size := int64(cmp.Or(vol.Status.Size, api.GiB))
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", path, fmt.Sprint(size)).CombinedOutput(); err != nil {
		return "", "", fmt.Errorf("%w: %s", err, out)
	}
	v.put(vol.Meta.Name, path)
	return path, "qcow2", nil
}

func (v *testVolumes) MarkCopied(_ context.Context, _ *configdb.View, id string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.marks = append(v.marks, id)
	return nil
}

func (v *testVolumes) Resolve(_ *configdb.View, _, name string) (string, string, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if p, ok := v.paths[name]; ok {
		return p, "qcow2", nil
	}
	return "", "", api.Errorf(api.CodeRefused, "volume %s is not ready", name)
}

func (v *testVolumes) ResolveImage(_ *configdb.View, _, name string) (string, string, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if p, ok := v.paths["image "+name]; ok {
		return p, "raw", nil
	}
	return "", "", api.Errorf(api.CodeRefused, "image %s is not ready", name)
}

// GrantImage implements Volumes.
func (v *testVolumes) GrantImage(_ context.Context, view *configdb.View, project, name string, readers int) error {
	path, _, err := v.ResolveImage(view, project, name)
	if err == nil {
		_, err = access.OpenWay(filepath.Dir(path), readers)
	}
	return err
}

// Grant implements Volumes as the storage module does.
func (v *testVolumes) Grant(_ context.Context, view *configdb.View, project, name string, uid, gid, readers int) error {
	path, _, err := v.Resolve(view, project, name)
	if err != nil {
		return err
	}
	if _, err := access.OpenWay(filepath.Dir(path), readers); err != nil {
		return err
	}
	return access.Give(path, uid, gid, 0o600)
}

// Release implements Volumes.
func (v *testVolumes) Release(_ context.Context, _ *configdb.View, _, name string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.released = append(v.released, name)
	return nil
}

func (v *testVolumes) put(name, path string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.paths[name] = path
}

// env is one node with its hypervisor.
type env struct {
	t       *testing.T
	db      *storetest.Mem
	guard   *testGuard
	fakes   *fakes
	vols    *testVolumes
	ports   *testPorts
	runDir  string
	mu      sync.Mutex // while h is set, for streams of the other node
	h       *Hypervisor
	stop    func()
	clock   *clock
	node    string // its ID
	name    string
	streams Streams
	snaps   *testSnapshots
	users   Users
	limits  Limits
	halts   func(api.Accelerator, int) bool
	adapt   func(*Config) // of the daemons that begin later
}

// clock is a real clock that can be moved on, and held.
type clock struct {
	mu    sync.Mutex
	ahead time.Duration
	held  time.Time // when it was held; zero: it goes
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.held.IsZero() {
		return c.held.Add(c.ahead)
	}
	return time.Now().Add(c.ahead)
}

// hold makes it stand still until goOn, so that a pause ends when the test has seen it and
// not before.
func (c *clock) hold() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held = time.Now()
}

func (c *clock) goOn() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held = time.Time{}
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ahead += d
}

func newEnv(t *testing.T, real bool) *env {
	t.Helper()
	dir, err := os.MkdirTemp("", "hv") // t.TempDir is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	e := &env{t: t, db: storetest.New(t), fakes: &fakes{}, vols: &testVolumes{paths: map[string]string{}}, ports: &testPorts{}, runDir: dir, clock: &clock{}, node: "node-1", name: "n1"}
	e.snaps = &testSnapshots{vols: e.vols, fail: map[string]error{}}
	e.guard = &testGuard{launch: e.fakes.launch, session: 1, procs: map[string]*testProc{}}
	if real {
		if _, _, err := accel.FindQEMU(t.Context(), ""); err != nil {
			t.Fatalf("this test needs the real QEMU: %v", err)
		}
		e.guard.launch = execQEMU
	}
	node := api.Node{Meta: api.NewMeta(api.KindNode, "", "n1"), Spec: api.NodeSpec{Accelerator: api.AccelTCG}}
	node.Meta.ID, node.Status.Phase = "node-1", api.NodeReady
	tx := &configdb.Txn{}
	must(t, configdb.Nodes.Create(tx, &node))
	e.commit(tx)
	t.Cleanup(e.guard.killAll)
	t.Cleanup(func() { e.stop() })
	e.begin()
	return e
}

// begin starts a daemon's life.
func (e *env) begin() {
	e.t.Helper()
	c := Config{
		DB: e.db, NodeID: e.node, NodeName: e.name, Streams: e.streams, RunDir: e.runDir, Guard: e.guard, Lease: e.guard, Volumes: e.vols, Copies: e.vols, Ports: e.ports, Snapshots: e.snaps, Users: e.users, Limits: e.limits, halts: e.halts,
		Log: slog.New(slog.NewTextHandler(e.t.Output(), nil)), Now: e.clock.now,
		HostMemory:   func() (total, available api.Size) { return 64 * api.GiB, 60 * api.GiB },
		HostPressure: func() (float64, bool) { return 0, true },
	}
	if e.adapt != nil {
		e.adapt(&c)
	}
	h, err := New(c)
	must(e.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx) }()
	e.guard.mu.Lock()
	e.guard.event = h.GuardEvent
	e.guard.mu.Unlock()
	e.mu.Lock()
	e.h = h
	e.mu.Unlock()
	e.stop = func() {
		cancel()
		if err := <-done; err != nil {
			e.t.Errorf("Run: %v", err)
		}
		e.stop = func() {}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (e *env) commit(tx *configdb.Txn) {
	e.t.Helper()
	_, err := e.db.Txn(e.t.Context(), tx)
	must(e.t, err)
}

// create makes the VM web1 that is bound to a node, with one volume of its own.
func (e *env) create(node string, spec api.VMSpec) string {
	e.t.Helper()
	return e.createNamed("web1", node, spec)
}

func (e *env) createNamed(name, node string, spec api.VMSpec) string {
	e.t.Helper()
	vm := api.VM{Meta: api.NewMeta(api.KindVM, "", name), Spec: spec}
	vol := api.Volume{Meta: api.NewMeta(api.KindVolume, "", name+"-disk0"), Spec: api.VolumeSpec{Size: api.GiB}}
	vol.Meta.Owner = "vm/" + vm.Meta.ID
	vm.Spec.Disks = []api.VMDisk{{Volume: vol.Meta.Name}}
	if vm.Spec.Memory == 0 {
		vm.Spec.Memory = 64 * api.MiB
	}
	must(e.t, vm.Prepare())
	must(e.t, vol.Prepare())
	b := api.Binding{Meta: vm.Meta, Spec: api.BindingSpec{NodeID: node, Node: node, Epoch: 1}}
	tx := &configdb.Txn{}
	must(e.t, configdb.Volumes.Create(tx, &vol))
	e.commit(tx)
	tx = &configdb.Txn{}
	must(e.t, configdb.VMs.Create(tx, &vm))
	must(e.t, configdb.Bindings.CreateUnnamed(tx, &b))
	configdb.Volumes.Refer(tx, vol.Meta.ID, api.KindVM, vm.Meta.ID)
	e.commit(tx)
	return vm.Meta.ID
}

// running makes the VM web1 run.
func (e *env) running(spec api.VMSpec) (string, api.VM) {
	e.t.Helper()
	return e.runningNamed("web1", spec)
}

func (e *env) runningNamed(name string, spec api.VMSpec) (string, api.VM) {
	e.t.Helper()
	e.vols.put(name+"-disk0", e.disk())
	spec.Power = api.PowerRunning
	id := e.createNamed(name, "node-1", spec)
	return id, e.wait(id, "running", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning && vm.Status.PID != 0 })
}

func (e *env) disk() string {
	path := filepath.Join(e.runDir, "disk.qcow2")
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", path, "1G").CombinedOutput(); err != nil {
		e.t.Fatalf("this test needs qemu-img (install qemu-utils): %v: %s", err, out)
	}
	return path
}

// change writes a wish.
func (e *env) change(id string, f func(*api.VM)) {
	e.t.Helper()
	_, err := configdb.Transact(e.t.Context(), e.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
		vm, err := configdb.VMs.Get(v, id)
		if err != nil {
			return err
		}
		f(&vm)
		return configdb.VMs.UpdateSpec(v, tx, &vm)
	})
	must(e.t, err)
}

func (e *env) rebind(id, node string, epoch uint64) {
	e.t.Helper()
	_, err := configdb.Transact(e.t.Context(), e.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
		b, err := configdb.Bindings.Get(v, id)
		if err != nil {
			return err
		}
		b.Spec.NodeID, b.Spec.Node, b.Spec.Epoch = node, node, epoch
		return configdb.Bindings.UpdateSpec(v, tx, &b)
	})
	must(e.t, err)
}

func (e *env) vm(id string) api.VM {
	e.t.Helper()
	vm, err := configdb.VMs.Get(e.db.Local(), id)
	must(e.t, err)
	return vm
}

func (e *env) binding(id string) api.Binding {
	e.t.Helper()
	b, err := configdb.Bindings.Get(e.db.Local(), id)
	must(e.t, err)
	return b
}

// wait follows the database until a VM is as wished.
func (e *env) wait(id, what string, ok func(api.VM) bool) api.VM {
	e.t.Helper()
	var last api.VM
	e.until(what, func() bool {
		vm, err := configdb.VMs.Get(e.db.Local(), id)
		last = vm
		return err == nil && ok(vm)
	}, func() string { return fmt.Sprintf("spec %+v, status %+v", last.Spec, last.Status) })
	return last
}

// until looks after every change of the database, and now and then for what is
// not in it.
func (e *env) until(what string, ok func() bool, state func() string) {
	e.t.Helper()
	end := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(end) {
			e.t.Fatalf("waited %v for: %s; %s", patience, what, state())
		}
		ctx, cancel := context.WithTimeout(e.t.Context(), 20*time.Millisecond)
		_, _ = e.db.WaitRevision(ctx, e.db.Local().Revision()+1)
		cancel()
	}
}

func nothing() string { return "" }
