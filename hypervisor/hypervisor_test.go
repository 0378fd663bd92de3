// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

func TestLifeCycle(t *testing.T) {
	e := newEnv(t, false)
	id, vm := e.running(api.VMSpec{})
	if vm.Status.Epoch != 1 || vm.Status.Node != "node-1" || vm.Status.ObservedGeneration != vm.Meta.Generation || vm.Status.Accelerator != "tcg" || vm.Status.StartedAt == nil {
		t.Errorf("status %+v", vm.Status)
	}
	q := e.fakes.qemu()

	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerPaused })
	e.wait(id, "paused", func(vm api.VM) bool { return vm.Status.Phase == api.VMPaused })
	if q.State() != "paused" {
		t.Error("QEMU is", q.State())
	}
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
	e.wait(id, "resumed", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning })

	e.change(id, func(vm *api.VM) { vm.Spec.Reboots = 3 })
	e.wait(id, "rebooted", func(vm api.VM) bool { return vm.Status.RebootsDone == 3 })
	if n := q.Count("system_reset"); n != 1 {
		t.Errorf("%d resets for one wish", n)
	}

	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerStopped })
	vm = e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	if vm.Status.PID != 0 || vm.Status.Crashes != 0 || q.Count("system_powerdown") != 1 {
		t.Errorf("status %+v", vm.Status)
	}
	if _, err := e.h.Console(id); api.CodeOf(err) != api.CodeRefused {
		t.Error("console of a stopped VM:", err)
	}
}

func TestIdleVMWritesNothing(t *testing.T) {
	e := newEnv(t, false)
	e.running(api.VMSpec{})
	before := e.db.Local().Revision()
	for range 5 {
		n := e.fakes.qemu().Count("query-status")
		e.h.Wake()
		e.until("a look", func() bool { return e.fakes.qemu().Count("query-status") > n }, nothing)
	}
	if now := e.db.Local().Revision(); now != before {
		t.Fatalf("%d writes while nothing happened", now-before)
	}
}

func TestPausedWishStartsWithoutRunning(t *testing.T) {
	e := newEnv(t, false)
	e.vols.put("web1-disk0", e.disk())
	id := e.create("node-1", api.VMSpec{Power: api.PowerPaused})
	e.wait(id, "paused", func(vm api.VM) bool { return vm.Status.Phase == api.VMPaused })
	if e.fakes.qemu().State() != "prelaunch" {
		t.Fatal(e.fakes.qemu().State())
	}
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerStopped })
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
}

func TestStartWaitsForVolumes(t *testing.T) {
	e := newEnv(t, false)
	id := e.create("node-1", api.VMSpec{Power: api.PowerRunning})
	e.wait(id, "creating", func(vm api.VM) bool {
		return vm.Status.Phase == api.VMCreating && strings.Contains(vm.Status.Message, "web1-disk0 is not ready")
	})
	e.vols.put("web1-disk0", e.disk())
	e.h.Wake()
	e.wait(id, "running", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning })
}

func TestNothingStartsWithoutALease(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	e.guard.lease(0)
	e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerRunning, false })
	e.wait(id, "waiting", func(vm api.VM) bool { return strings.Contains(vm.Status.Message, "no lease") })
	if e.guard.startCount() != 1 {
		t.Fatal("started without a lease")
	}
	e.guard.lease(2)
	e.h.Wake()
	e.wait(id, "running", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning })
	if got := e.guard.starts[1].Session; got != 2 {
		t.Fatal("session", got)
	}
}

func TestVMBoundElsewhereIsNotStartedAndIsKilled(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	e.rebind(id, "node-2", 2)
	e.until("killed", func() bool { _, there := e.guard.get(id); return !there }, nothing)
	vm := e.vm(id)
	e.h.Wake()
	if e.guard.startCount() != 1 || e.vm(id).Meta.StatusRevision != vm.Meta.StatusRevision {
		t.Fatal("this node still acts for a VM of another one")
	}
	e.rebind(id, "node-1", 3)
	e.wait(id, "back", func(vm api.VM) bool { return vm.Status.Epoch == 3 && vm.Status.Phase == api.VMRunning })
}

func TestProcessNewerThanTheViewIsLeftAlone(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	e.guard.mu.Lock()
	e.guard.procs[id].Epoch = 7
	e.guard.mu.Unlock()
	e.stop()
	e.rebind(id, "node-2", 2) // as an old replica would show it
	e.h.procs.invalidate()
	if r, err := e.h.reconcile(t.Context(), id); err != nil || r.After == 0 {
		t.Fatal(r, err)
	}
	if p, ok := e.guard.get(id); !ok || p.State != ProcessRunning {
		t.Fatalf("killed on an old view: %+v", p)
	}
}

func TestOldViewAfterARestartTouchesNothing(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	e.stop()
	e.guard.lease(0)
	e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true }) // an old wish, replayed
	e.begin()
	e.until("adopted", func() bool { _, err := e.h.Console(id); return err == nil }, nothing)
	if p, _ := e.guard.get(id); p.State != ProcessRunning {
		t.Fatal("an old wish was carried out")
	}
	e.guard.lease(2)
	e.wait(id, "stopped once caught up", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
}

func TestProtectionIsTurnedOnBeforeItIsPromised(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	e.guard.mu.Lock()
	e.guard.refuse = errors.New("lapsed")
	e.guard.mu.Unlock()
	e.change(id, func(vm *api.VM) { vm.Spec.HA = api.HARestart })
	e.wait(id, "condition", func(vm api.VM) bool {
		_, bad := api.FindCondition(vm.Status.Conditions, ConditionProtection)
		return bad
	})
	if e.binding(id).Spec.Protected {
		t.Fatal("promised although the guard refused")
	}
	e.guard.mu.Lock()
	e.guard.refuse = nil
	e.guard.mu.Unlock()
	e.until("promised", func() bool { return e.binding(id).Spec.Protected }, nothing)
	if p, _ := e.guard.get(id); !p.Protected {
		t.Fatal("not protected")
	}
	e.change(id, func(vm *api.VM) { vm.Spec.HA = api.HANone })
	e.until("off", func() bool { p, _ := e.guard.get(id); return !p.Protected }, nothing)
	if e.binding(id).Spec.Protected {
		t.Fatal("the guard let go before the promise was taken back")
	}
}

func TestProtectedVMComesBackAfterTheLease(t *testing.T) {
	e := newEnv(t, false)
	id, vm := e.running(api.VMSpec{HA: api.HARestart})
	if !e.guard.starts[0].Protected || !e.binding(id).Spec.Protected {
		t.Fatal("started without protection")
	}
	e.guard.lease(0)
	e.wait(id, "ended", func(vm api.VM) bool { return vm.Status.Phase == api.VMStarting && vm.Status.PID == 0 })
	e.guard.lease(2)
	e.h.Wake()
	now := e.wait(id, "running", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning })
	if now.Status.PID == vm.Status.PID || now.Status.Crashes != 0 {
		t.Fatalf("%+v", now.Status)
	}
}

func TestGuestThatSwitchesItselfOffStaysOff(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	e.fakes.qemu().PowerOff()
	vm := e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	if vm.Spec.Power != api.PowerStopped || vm.Status.ObservedGeneration != vm.Meta.Generation || !strings.Contains(vm.Status.Message, "guest") {
		t.Fatalf("%+v", vm)
	}
	// The same end must not be judged again when the VM is started anew.
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
	e.wait(id, "running", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning })
}

func TestCrashIsCountedAndRestarted(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	e.clock.hold()
	e.fakes.qemu().Exit(-1, 11)
	e.wait(id, "reported", func(vm api.VM) bool {
		return vm.Status.Crashes == 1 && strings.Contains(vm.Status.Message, "segmentation fault")
	})
	e.clock.goOn()
	e.wait(id, "running again", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning && vm.Status.Crashes == 1 })
	e.fakes.qemu().Emit("SHUTDOWN", `{"guest": false, "reason": "host-signal"}`)
	e.fakes.qemu().Exit(0, 0)
	e.until("restarted after SIGTERM", func() bool { return e.guard.startCount() == 3 }, nothing)
	e.wait(id, "running again", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning && vm.Status.Crashes == 1 })
}

func TestFailedStartShowsTheLogAndBacksOff(t *testing.T) {
	e := newEnv(t, false)
	e.vols.put("web1-disk0", e.disk())
	e.fakes.broken = "qemu: -device nonsense:\nno such device\n"
	begin := time.Now()
	id := e.create("node-1", api.VMSpec{Power: api.PowerRunning})
	vm := e.wait(id, "failed", func(vm api.VM) bool { return vm.Status.Phase == api.VMFailed })
	if !strings.Contains(vm.Status.Message, "exit code 1") || !strings.Contains(vm.Status.Message, "nonsense: no such device") || vm.Status.Crashes != 0 {
		t.Fatalf("%+v", vm.Status)
	}
	e.until("third try", func() bool { return e.guard.startCount() >= 3 }, nothing)
	if d := time.Since(begin); d < 3*MinRestart { // the second pause is twice as long as the first
		t.Fatalf("three starts within %v", d)
	}
	e.fakes.mu.Lock()
	e.fakes.broken = ""
	e.fakes.mu.Unlock()
	e.change(id, func(vm *api.VM) { vm.Spec.Reboots++ }) // a new wish is tried at once
	e.wait(id, "running", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning })
}

func TestPowerButtonIsPressedAgainAndTheUserTold(t *testing.T) {
	e := newEnv(t, false)
	e.fakes.dumb = true
	id, _ := e.running(api.VMSpec{})
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerStopped })
	e.wait(id, "stopping", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopping })
	q := e.fakes.qemu()
	e.clock.advance(PowerButtonInterval)
	e.h.Wake()
	e.until("second press", func() bool { return q.Count("system_powerdown") == 2 }, nothing)
	e.clock.advance(StopTimeout)
	e.h.Wake()
	vm := e.wait(id, "condition", func(vm api.VM) bool {
		c, bad := api.FindCondition(vm.Status.Conditions, ConditionStopTimedOut)
		return bad && strings.Contains(c.Message, "--force web1")
	})
	if vm.Status.Phase != api.VMStopping {
		t.Fatal(vm.Status.Phase)
	}
	e.change(id, func(vm *api.VM) { vm.Spec.ForceStop = true })
	vm = e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	if len(vm.Status.Conditions) != 0 {
		t.Fatalf("%+v", vm.Status.Conditions)
	}
}

func TestStuckQEMUIsReportedAndCanBeForcedOff(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	e.fakes.qemu().Hang(true)
	e.h.Wake()
	vm := e.wait(id, "condition", func(vm api.VM) bool {
		_, bad := api.FindCondition(vm.Status.Conditions, ConditionQMPUnresponsive)
		return bad
	})
	if vm.Status.Phase != api.VMRunning {
		t.Fatal("what is not known was changed:", vm.Status.Phase)
	}
	e.fakes.qemu().Hang(false)
	e.clock.advance(QuietTime)
	e.h.Wake()
	e.wait(id, "answers again", func(vm api.VM) bool { return len(vm.Status.Conditions) == 0 })
	e.fakes.qemu().Hang(true)
	e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
}

func TestPanicAndDiskErrorAreShown(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	has := func(typ string) func(api.VM) bool {
		return func(vm api.VM) bool { _, bad := api.FindCondition(vm.Status.Conditions, typ); return bad }
	}
	q := e.fakes.qemu()
	q.Emit("GUEST_PANICKED", `{"action": "run"}`)
	e.wait(id, "panic", has(ConditionGuestPanicked))
	e.clock.advance(PanicTime)
	q.Emit("RESET", `{"guest": true, "reason": "guest-reset"}`)
	e.wait(id, "no panic", func(vm api.VM) bool { return len(vm.Status.Conditions) == 0 })
	q.SetState("io-error")
	q.Emit("STOP", "{}")
	e.until("continued", func() bool { return q.Count("cont") == 1 }, nothing)
	q.SetState("io-error")
	q.Emit("STOP", "{}")
	e.wait(id, "disk error", has(ConditionIOError))
	e.clock.advance(IORetry)
	e.h.Wake()
	e.wait(id, "goes on", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning && len(vm.Status.Conditions) == 0 })
}

func TestStrangerIsReportedNotKilled(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	e.stop()
	vm, b := e.vm(id), e.binding(id)
	tx := &configdb.Txn{}
	configdb.VMs.Delete(tx, &vm)
	configdb.Bindings.DeleteUnnamed(tx, &b)
	e.commit(tx)
	e.begin()
	e.until("reported", func() bool {
		c, ok := api.FindCondition(e.h.Facts().Conditions, ConditionStrangers)
		return ok && !c.OK && strings.Contains(c.Message, id)
	}, nothing)
	if p, _ := e.guard.get(id); p.State != ProcessRunning {
		t.Fatal("a stranger was killed")
	}
}

func TestDeleteTakesTheVolumesAlong(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	e.change(id, func(vm *api.VM) { now := time.Now().UTC(); vm.Meta.DeletingAt = &now })
	e.wait(id, "waiting for the volume", func(vm api.VM) bool {
		return vm.Status.Phase == api.VMDeleting && strings.Contains(vm.Status.Message, "web1-disk0")
	})
	if p, _ := e.guard.get(id); p.State == ProcessRunning {
		t.Fatal("still running")
	}
	vol, err := configdb.Volumes.Find(e.db.Local(), "", "web1-disk0")
	must(t, err)
	if !vol.Meta.Deleting() || len(configdb.Volumes.Referrers(e.db.Local(), vol.Meta.ID)) != 0 {
		t.Fatalf("%+v", vol.Meta)
	}
	tx := &configdb.Txn{} // what the storage module does
	configdb.Volumes.Delete(tx, &vol)
	e.commit(tx)
	e.until("gone", func() bool {
		_, err := configdb.VMs.Get(e.db.Local(), id)
		return err != nil && e.db.Local().Empty(configdb.Bindings.SpecPrefix())
	}, nothing)
	e.until("run directory removed", func() bool {
		_, err := os.Stat(e.h.pathsOf(id).dir)
		return os.IsNotExist(err)
	}, nothing)
}

func TestConsoleOfARunningVM(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	c, err := e.h.Console(id)
	must(t, err)
	ch, cancel, err := c.Subscribe(0)
	must(t, err)
	defer cancel()
	must(t, c.Write(t.Context(), []byte("x")))
	if b := <-ch; string(b) != "x" {
		t.Fatalf("%q", b)
	}
	e.fakes.qemu().Exit(-1, 9)
	for range ch {
	}
}

func TestFactsTellWhatIsMissing(t *testing.T) {
	e := newEnv(t, false)
	e.until("found out", func() bool { return e.h.Facts().QEMUVersion != "" }, nothing)
	f := e.h.Facts()
	if f.Accelerator != api.AccelTCG || f.CPUs < 1 || f.Memory < 64*api.MiB || !f.Conditions[0].OK {
		t.Fatalf("%+v", f)
	}
	e.stop()
	e.h, _ = New(Config{DB: e.db, NodeID: "node-1", RunDir: e.runDir, Guard: e.guard, Lease: e.guard, Volumes: e.vols, QEMU: "/no/qemu"})
	if c := e.h.Facts().Conditions[0]; c.OK || c.Reason != "Detecting" {
		t.Fatalf("%+v", c)
	}
	if parseMemTotal([]byte("MemFree: 1 kB\nMemTotal:   2048 kB\n")) != 2*api.MiB || parseMemTotal([]byte("MemTotal: x kB")) != 0 {
		t.Fatal("meminfo")
	}
}

func TestRunDirectoryTooLongIsRefused(t *testing.T) {
	for _, dir := range []string{"relative", "/" + strings.Repeat("x", MaxRunDir)} {
		if _, err := New(Config{RunDir: dir}); api.CodeOf(err) != api.CodeInvalid {
			t.Errorf("%s: %v", dir, err)
		}
	}
}

func TestJudgement(t *testing.T) {
	guest, host := &shutdownEvent{guest: true}, &shutdownEvent{reason: "host-signal"}
	for name, c := range map[string]struct {
		p               Process
		sd              *shutdownEvent
		stopping, wasUp bool
		want            verdict
	}{
		"lease beats all":                {Process{Reason: ReasonLease, Signal: 9}, guest, true, true, endedByLease},
		"kill":                           {Process{Reason: ReasonKill, Signal: 9}, nil, false, true, endedOnPurpose},
		"guard stops":                    {Process{Reason: ReasonStopping}, host, false, true, endedByHost},
		"segfault":                       {Process{Signal: 11}, nil, false, true, endedByCrash},
		"segfault while switching off":   {Process{Signal: 11}, nil, true, true, endedByCrash},
		"bad argument":                   {Process{ExitCode: 1}, nil, false, false, endedAtStart},
		"guest off":                      {Process{}, guest, false, true, endedByGuest},
		"off while the daemon was away":  {Process{}, nil, false, true, endedByGuest},
		"off after our button":           {Process{}, guest, true, true, endedOnPurpose},
		"SIGTERM":                        {Process{}, host, false, true, endedByHost},
		"kill -9 from outside the guard": {Process{Reason: "exited", Signal: 9}, nil, false, true, endedByCrash},
	} {
		if got := judge(&c.p, c.sd, c.stopping, c.wasUp); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}

func TestProcessThatIsBeingForkedIsWaitedFor(t *testing.T) {
	e := newEnv(t, false)
	e.vols.put("web1-disk0", e.disk())
	id := e.create("node-1", api.VMSpec{})
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	e.stop()
	forked := &testProc{Process: Process{VM: id, Epoch: 1, State: ProcessRunning}, done: make(chan struct{})}
	forked.kill = func() { e.guard.exited(forked, -1, 9) }
	e.guard.procs[id] = forked
	e.h.procs.invalidate()
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
	if r, err := e.h.reconcile(t.Context(), id); err != nil || r.After == 0 {
		t.Fatal(r, err)
	}
	if vm := e.vm(id); vm.Status.Phase != api.VMStopped || e.guard.startCount() != 0 {
		t.Fatalf("%+v", vm.Status)
	}
	e.begin()
	forked.kill() // the fork failed: the VM is started anew
	e.wait(id, "running", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning })
}
