// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/goodturn"
	"github.com/muster-vm/muster/internal/qmptest"
)

// Every command that is sent to a running QEMU, with the wish that sends it.
var operations = []struct {
	command string
	wish    func(*api.VMSpec)
	done    func(api.VM) bool
}{
	{"query-status", func(s *api.VMSpec) { s.Limits = &api.VMLimits{CPUMax: 7} }, func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning }},
	{"stop", func(s *api.VMSpec) { s.Power = api.PowerPaused }, func(vm api.VM) bool { return vm.Status.Phase == api.VMPaused }},
	{"cont", func(s *api.VMSpec) { s.Power = api.PowerRunning }, func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning }},
	{"system_reset", func(s *api.VMSpec) { s.Reboots++ }, func(vm api.VM) bool { return vm.Status.RebootsDone == vm.Spec.Reboots }},
	{"system_powerdown", func(s *api.VMSpec) { s.Power = api.PowerStopped }, func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped }},
}

func settledAt(done func(api.VM) bool) func(api.VM) bool {
	return func(vm api.VM) bool { return done(vm) && vm.Status.ObservedGeneration == vm.Meta.Generation }
}

// soon is wait while the clock runs fast, so that pauses are over.
func (e *env) soon(id, what string, ok func(api.VM) bool) api.VM {
	e.t.Helper()
	var last api.VM
	e.until(what, func() bool {
		if last = e.vm(id); ok(last) {
			return true
		}
		e.clock.advance(QuietTime)
		e.h.Wake()
		return false
	}, func() string { return fmt.Sprintf("spec %+v, status %+v", last.Spec, last.Status) })
	return last
}

func TestConnectionEndsInTheMiddleOfEveryOperation(t *testing.T) {
	for _, way := range []qmptest.Way{qmptest.Cut, qmptest.Half, qmptest.Late} {
		t.Run(string(way), func(t *testing.T) {
			e := newEnv(t, false)
			id, was := e.running(api.VMSpec{})
			for _, op := range operations {
				q := e.fakes.qemu()
				q.Trap(op.command, way)
				e.change(id, func(vm *api.VM) { op.wish(&vm.Spec) })
				e.until(op.command+" is trapped", func() bool { return !q.Trapped() }, nothing)
				vm := e.soon(id, op.command+" is carried out", settledAt(op.done))
				if vm.Status.Phase != api.VMStopped && vm.Status.PID != was.Status.PID {
					t.Fatalf("%s: another process, %+v", op.command, vm.Status)
				}
				if vm.Status.Crashes != 0 {
					t.Fatalf("%s: counted as a crash", op.command)
				}
			}
			if n := e.guard.startCount(); n != 1 {
				t.Errorf("%d starts", n)
			}
		})
	}
}

func TestQEMUDiesInTheMiddleOfEveryOperation(t *testing.T) {
	for _, op := range operations {
		t.Run(op.command, func(t *testing.T) {
			e := newEnv(t, false)
			id, was := e.running(api.VMSpec{})
			if op.command == "cont" {
				e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerPaused })
				e.wait(id, "paused", func(vm api.VM) bool { return vm.Status.Phase == api.VMPaused })
			}
			q := e.fakes.qemu()
			q.Trap(op.command, qmptest.Die)
			e.change(id, func(vm *api.VM) { op.wish(&vm.Spec) })
			e.until("the trap", func() bool { return !q.Trapped() }, nothing)
			vm := e.soon(id, "as wished", func(vm api.VM) bool {
				return settledAt(op.done)(vm) && (vm.Spec.Power == api.PowerStopped || vm.Status.Crashes > 0)
			})
			if vm.Spec.Power != api.PowerStopped && (vm.Status.PID == was.Status.PID || vm.Status.Crashes != 1) {
				t.Fatalf("%+v", vm.Status)
			}
		})
	}
}

// A hundred thousand events in one go: the status is right, and others are served.
func TestEventFloodHarmsNobody(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	noisy := e.fakes.qemu()
	e.vols.put("web2-disk0", filepath.Join(e.runDir, "disk.qcow2"))
	other := e.createNamed("web2", "node-1", api.VMSpec{Power: api.PowerRunning})
	e.wait(other, "running", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning })
	flood := make(chan struct{})
	go func() {
		defer close(flood)
		for range 100 {
			noisy.Flood("RTC_CHANGE", 500)
			noisy.Flood("BLOCK_IO_ERROR", 500)
		}
	}()
	began := time.Now()
	e.change(other, func(vm *api.VM) { vm.Spec.Power = api.PowerPaused })
	e.wait(other, "paused beside the flood", func(vm api.VM) bool { return vm.Status.Phase == api.VMPaused })
	t.Logf("the other VM was paused in %v", time.Since(began))
	<-flood
	noisy.SetState("internal-error")
	noisy.Emit("STOP", "{}")
	e.wait(id, "the state after the flood", func(vm api.VM) bool {
		_, bad := api.FindCondition(vm.Status.Conditions, ConditionGuestHalted)
		return bad
	})
}

// fleet starts VMs without guests, each with a disk of its own.
func (e *env) fleet(n int) (ids []string) {
	e.t.Helper()
	pattern, err := os.ReadFile(e.disk())
	must(e.t, err)
	for i := range n {
		name := fmt.Sprintf("vm-%03d", i)
		path := filepath.Join(e.runDir, name+".qcow2")
		must(e.t, os.WriteFile(path, pattern, 0o600))
		e.vols.put(name+"-disk0", path)
		ids = append(ids, e.createNamed(name, "node-1", api.VMSpec{Power: api.PowerPaused, Memory: 16 * api.MiB}))
	}
	e.allAre(ids, api.VMPaused)
	return ids
}

func (e *env) allAre(ids []string, phase api.VMPhase) {
	e.t.Helper()
	for _, id := range ids {
		e.waitFor(fleetPatience, id, func(vm api.VM) bool { return vm.Status.Phase == phase && vm.Status.PID != 0 })
	}
}

func (e *env) wish(ids []string, p api.PowerState) {
	e.t.Helper()
	for _, id := range ids {
		e.change(id, func(vm *api.VM) { vm.Spec.Power = p })
	}
}

// waitFor is wait with another limit.
func (e *env) waitFor(limit time.Duration, id string, ok func(api.VM) bool) {
	e.t.Helper()
	for end := time.Now().Add(limit); !ok(e.vm(id)); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			e.t.Fatalf("waited %v: %+v", limit, e.vm(id).Status)
		}
	}
}

const (
	fleetSize     = 100
	fleetPatience = 2 * time.Minute
	// adoptBound is how long the adoption of a hundred VMs may take.
	adoptBound = 10 * time.Second
)

// A node with a hundred VMs: they start, outlive their daemon, are all adopted by
// the next, and one that is stuck keeps nobody waiting.
func TestRealHundredVMsOnOneNode(t *testing.T) {
	if out, err := exec.Command("qemu-img", "--version").Output(); err != nil {
		t.Fatalf("this test needs qemu-img (install qemu-utils): %v %s", err, out)
	}
	e := newEnv(t, true)
	e.stop()
	e.users = Users{Group: 70000, First: 70001, Last: 70000 + 2*fleetSize}
	e.begin()
	began := time.Now()
	ids := e.fleet(fleetSize)
	t.Logf("%d VMs started in %v", fleetSize, time.Since(began))
	pids, users := map[string]int{}, map[int]bool{}
	for _, id := range ids {
		pids[id] = e.vm(id).Status.PID
		users[e.h.UserOf(id)] = true
	}
	if len(users) != fleetSize {
		t.Fatalf("%d users for %d VMs", len(users), fleetSize)
	}

	e.stop()
	began = time.Now()
	e.begin()
	for e.h.Running() < fleetSize {
		if time.Since(began) > adoptBound {
			t.Fatalf("after %v only %d of %d VMs are adopted", adoptBound, e.h.Running(), fleetSize)
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Logf("%d VMs adopted in %v", fleetSize, time.Since(began))
	for id, pid := range pids {
		if now := e.vm(id).Status; now.PID != pid || now.Crashes != 0 {
			t.Fatalf("%+v, was pid %d", now, pid)
		}
	}

	stuck, others := ids[0], ids[1:11]
	must(t, syscall.Kill(pids[stuck], syscall.SIGSTOP))
	t.Cleanup(func() { _ = syscall.Kill(pids[stuck], syscall.SIGCONT) })
	goodturn.Take(t, func(turn int) error {
		if turn > 1 {
			e.wish(others, api.PowerPaused)
			e.allAre(others, api.VMPaused)
			e.clock.advance(QuietTime) // the stuck one is asked again
		}
		e.wish([]string{stuck}, api.PowerPaused)
		e.wish([]string{stuck}, api.PowerRunning)
		began = time.Now()
		e.wish(others, api.PowerRunning)
		e.allAre(others, api.VMRunning)
		took := time.Since(began)
		t.Logf("%d others resumed beside a stuck one in %v", len(others), took)
		if took > QMPDeadline {
			return fmt.Errorf("a stuck QEMU held up the others: %v", took)
		}
		return nil
	})
	e.wait(stuck, "it is named", func(vm api.VM) bool {
		_, bad := api.FindCondition(vm.Status.Conditions, ConditionQMPUnresponsive)
		return bad
	})
}

// The end of QEMU's log reaches the user, also after a crash of one that ran.
func TestCrashShowsTheLogOfThisLife(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	log := e.h.pathsOf(id).qemuLog
	must(t, os.WriteFile(log, []byte("qemu-system-x86_64: assertion failed: nobody expects it\n"), 0o600))
	e.fakes.mu.Lock()
	e.fakes.broken = "qemu-system-x86_64: cannot allocate guest memory\n"
	q := e.fakes.last
	e.fakes.mu.Unlock()
	e.clock.hold()
	q.Exit(-1, int(syscall.SIGABRT))
	e.wait(id, "the last words", func(vm api.VM) bool {
		return vm.Status.Crashes == 1 && strings.Contains(vm.Status.Message, "signal aborted") && strings.Contains(vm.Status.Message, "nobody expects it")
	})
	e.clock.goOn()
	// Ends in a row put off the next start, longer each time.
	for i, want := range []time.Duration{2 * MinRestart, 4 * MinRestart, 8 * MinRestart} {
		e.clock.advance(want)
		e.h.Wake()
		e.until("another attempt", func() bool { e.fakes.mu.Lock(); defer e.fakes.mu.Unlock(); return e.fakes.n >= i+2 }, nothing)
		if i == 0 {
			e.wait(id, "it says why", func(vm api.VM) bool { return strings.Contains(vm.Status.Message, "cannot allocate guest memory") })
		}
	}
}
