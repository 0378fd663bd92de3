// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/qmptest"
)

func policy(p api.EndPolicy) api.VMSpec {
	return api.VMSpec{Recovery: &api.VMRecovery{EndPolicy: p}}
}

// events counts those of a type.
func (e *env) events(typ string) (n int) {
	e.t.Helper()
	all, err := configdb.Events.List(e.db.Local())
	must(e.t, err)
	for i := range all {
		if all[i].Spec.Type == typ {
			n++
		}
	}
	return n
}

func crashed(n uint32) func(api.VM) bool {
	return func(vm api.VM) bool { return vm.Status.Crashes == n && vm.Status.PID == 0 }
}

// due moves the clock to when a restart that waits is carried out, and lets it go if it
// was held.
func (e *env) due(id string) {
	e.t.Helper()
	r := e.vm(id).Status.Restarts
	if r == nil || r.Due == nil {
		e.t.Fatalf("no restart waits: %+v", r)
	}
	e.clock.advance(r.Due.Sub(e.clock.now()) + time.Second)
	e.clock.goOn()
	e.h.Wake()
}

func TestRestartsOfACrashAreLimitedAndCountedAcrossDaemons(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(policy(api.EndPolicy{RestartLimit: 2}))
	for i := range 2 {
		e.clock.hold()
		e.fakes.qemu().Exit(-1, 11)
		vm := e.wait(id, "crashed", crashed(uint32(i+1)))
		if r := vm.Status.Restarts; len(r.Times) != i+1 || r.Due == nil || r.Cause != api.EndCrash {
			t.Fatalf("%+v", r)
		}
		if _, ok := api.FindCondition(vm.Status.Conditions, ConditionRestartDue); !ok || vm.Status.Phase != api.VMStarting {
			t.Fatalf("%+v", vm.Status)
		}
		starts := e.guard.startCount()
		e.stop() // what the daemon remembers is gone with it
		if r, err := e.h.reconcile(t.Context(), id); err != nil || r.After <= 0 || e.guard.startCount() != starts {
			t.Fatal("a new daemon does not know the pause:", r, err)
		}
		e.begin()
		e.due(id)
		e.wait(id, "runs again", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning && vm.Status.PID != 0 })
	}
	starts := e.guard.startCount()
	e.fakes.qemu().Exit(-1, 11)
	vm := e.wait(id, "given up", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	if vm.Spec.Power != api.PowerStopped || vm.Status.Restarts.Left != api.LeftGaveUp || !strings.Contains(vm.Status.Message, "gave up after 2 restarts in 1h0m0s: QEMU crashed") {
		t.Fatalf("%+v, %+v", vm.Spec, vm.Status)
	}
	if _, ok := api.FindCondition(vm.Status.Conditions, ConditionGaveUp); !ok || e.events(eventGaveUp) != 1 || e.events(eventRestart) != 2 {
		t.Fatalf("%d given up, %d restarts, %+v", e.events(eventGaveUp), e.events(eventRestart), vm.Status.Conditions)
	}
	e.stop()
	e.begin()
	e.clock.advance(2 * api.MaxRestartDelay)
	e.h.Wake()
	e.wait(id, "stays down", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	if e.guard.startCount() != starts {
		t.Fatal("it was started although it was given up")
	}
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
	vm = e.wait(id, "started by its user", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning && vm.Status.PID != 0 })
	if vm.Status.Restarts != nil || len(vm.Status.Conditions) != 0 {
		t.Fatalf("%+v", vm.Status)
	}
}

func TestAVMThatRanWellForTheWindowBeginsAnew(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(policy(api.EndPolicy{RestartLimit: 1, RestartWindowSeconds: 600, RestartDelaySeconds: 1}))
	for i := range 2 {
		e.clock.hold()
		e.fakes.qemu().Exit(-1, 11)
		e.wait(id, "crashed", crashed(uint32(i+1)))
		e.due(id)
		e.wait(id, "runs again", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning && vm.Status.PID != 0 })
		e.clock.advance(11 * time.Minute)
	}
	if n := e.events(eventGaveUp); n != 0 {
		t.Fatal(n)
	}
}

func TestACrashIsLeftDownIfThePolicySaysSo(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(policy(api.EndPolicy{OnCrash: api.EndStop}))
	e.fakes.qemu().Exit(-1, 9)
	vm := e.wait(id, "down", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	if vm.Spec.Power != api.PowerStopped || vm.Status.Restarts.Left != api.LeftStopped || vm.Status.Crashes != 1 || e.events(eventLeftDown) != 1 {
		t.Fatalf("%+v, %+v", vm.Spec, vm.Status)
	}
}

func TestPanics(t *testing.T) {
	for _, tc := range []struct {
		action api.EndAction
		then   func(t *testing.T, e *env, id string)
	}{
		{api.EndRestart, func(t *testing.T, e *env, id string) {
			q := e.fakes.qemu()
			e.wait(id, "a reset is due", func(vm api.VM) bool { return vm.Status.Restarts != nil && vm.Status.Restarts.Due != nil })
			if q.Count("system_reset") != 0 {
				t.Error("reset before its time")
			}
			e.stop() // the panic itself is forgotten, the decision is not
			e.begin()
			e.due(id)
			vm := e.wait(id, "reset", func(vm api.VM) bool { return vm.Status.RebootsDone == 1 && vm.Status.Restarts.Due == nil })
			if q.Count("system_reset") != 1 || vm.Status.PID == 0 || len(vm.Status.Restarts.Times) != 1 || e.events(eventRestart) != 1 {
				t.Errorf("%d resets, %+v", q.Count("system_reset"), vm.Status)
			}
		}},
		{api.EndStop, func(t *testing.T, e *env, id string) {
			vm := e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
			if vm.Spec.Power != api.PowerStopped || !e.guard.killed(id) || vm.Status.Restarts.Left != api.LeftStopped || !strings.Contains(vm.Status.Message, "panicked") {
				t.Errorf("%+v", vm.Status)
			}
		}},
		{api.EndPause, func(t *testing.T, e *env, id string) {
			q := e.fakes.qemu()
			vm := e.wait(id, "paused", func(vm api.VM) bool { return vm.Status.Phase == api.VMPaused })
			if _, ok := api.FindCondition(vm.Status.Conditions, ConditionLeftPaused); !ok || q.State() != "paused" {
				t.Errorf("%s, %+v", q.State(), vm.Status)
			}
			e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
			vm = e.wait(id, "resumed", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning })
			if _, ok := api.FindCondition(vm.Status.Conditions, ConditionLeftPaused); ok {
				t.Errorf("%+v", vm.Status)
			}
		}},
		{"", func(t *testing.T, e *env, id string) {
			vm := e.wait(id, "told", func(vm api.VM) bool {
				_, ok := api.FindCondition(vm.Status.Conditions, ConditionGuestPanicked)
				return ok
			})
			if vm.Status.Restarts != nil || vm.Status.Phase != api.VMRunning {
				t.Errorf("%+v", vm.Status)
			}
		}},
	} {
		t.Run("then "+string(tc.action), func(t *testing.T) {
			e := newEnv(t, false)
			id, _ := e.running(policy(api.EndPolicy{OnPanic: tc.action}))
			e.clock.hold()
			e.fakes.qemu().Emit("GUEST_PANICKED", `{"action": "run"}`)
			tc.then(t, e, id)
		})
	}
}

// A guest that panics and resets itself reaches the limit, too; without one it is
// not written about.
func TestAGuestThatResetsItselfCountsOnlyWithALimit(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(policy(api.EndPolicy{OnPanic: api.EndRestart, RestartLimit: 1}))
	q := e.fakes.qemu()
	bounce := func() { // as if both events came between two looks
		in := e.h.instance(id)
		in.mu.Lock()
		in.befell.panicAt = e.clock.now()
		in.befell.resetAt = in.befell.panicAt.Add(time.Millisecond)
		in.mu.Unlock()
		e.h.Wake()
	}
	bounce()
	e.wait(id, "counted", func(vm api.VM) bool { return vm.Status.Restarts != nil && len(vm.Status.Restarts.Times) == 1 })
	if q.Count("system_reset") != 0 {
		t.Error("it was reset a second time")
	}
	bounce()
	e.wait(id, "given up", func(vm api.VM) bool {
		return vm.Status.Phase == api.VMStopped && vm.Status.Restarts.Left == api.LeftGaveUp
	})
}

// bitten is a guest that its watchdog has halted; nothing was said of it yet.
func bitten(t *testing.T) (e *env, id string, q *qmptest.QEMU) {
	t.Helper()
	spec := policy(api.EndPolicy{OnWatchdog: api.EndRestart, RestartLimit: 3})
	spec.Watchdog = &api.VMWatchdog{Action: api.WatchdogPause}
	e = newEnv(t, false)
	id, _ = e.running(spec)
	q = e.fakes.qemu()
	q.SetState("watchdog")
	return e, id, q
}

func TestWatchdogs(t *testing.T) {
	e, id, q := bitten(t)
	q.Emit("WATCHDOG", `{"action": "pause"}`)
	e.wait(id, "a reset is due", func(vm api.VM) bool { return vm.Status.Restarts != nil && vm.Status.Restarts.Due != nil })
	e.due(id)
	e.wait(id, "runs again", func(vm api.VM) bool { return vm.Status.RebootsDone == 1 && vm.Status.Phase == api.VMRunning })
	if q.State() != "running" {
		t.Error(q.State())
	}
	// And if QEMU has ended itself for it.
	q.Emit("WATCHDOG", `{"action": "poweroff"}`)
	q.Exit(0, 0)
	vm := e.wait(id, "its end is answered", func(vm api.VM) bool { return vm.Status.PID == 0 && vm.Status.Restarts.Due != nil })
	if vm.Spec.Power != api.PowerRunning || vm.Status.Restarts.Cause != api.EndWatchdog || len(vm.Status.Restarts.Times) != 2 {
		t.Errorf("%+v, %+v", vm.Spec.Power, vm.Status.Restarts)
	}
}

// QEMU's state may tell of the watchdog before its event is heard, and the event may
// be answered before QEMU has ended for it: each is one end.
func TestWatchdogHeardLateOrAnsweredEarlyIsOneEnd(t *testing.T) {
	e, id, q := bitten(t)
	e.h.Wake()
	e.wait(id, "its state is answered", func(vm api.VM) bool { return vm.Status.Restarts != nil && vm.Status.Restarts.Due != nil })
	q.Emit("WATCHDOG", `{"action": "pause"}`)
	e.due(id)
	vm := e.wait(id, "runs again", func(vm api.VM) bool { return vm.Status.RebootsDone == 1 && vm.Status.Phase == api.VMRunning })
	if n := len(vm.Status.Restarts.Times); n != 1 {
		t.Fatalf("%d ends, want 1", n)
	}
	q.Emit("WATCHDOG", `{"action": "poweroff"}`)
	vm = e.wait(id, "its event is answered", func(vm api.VM) bool { return vm.Status.Restarts.Due != nil })
	if n := len(vm.Status.Restarts.Times); n != 2 {
		t.Fatalf("%d ends, want 2", n)
	}
	q.Exit(0, 0)
	vm = e.wait(id, "its end is seen", func(vm api.VM) bool { return vm.Status.PID == 0 })
	if r := vm.Status.Restarts; vm.Spec.Power != api.PowerRunning || r == nil || r.Due == nil || len(r.Times) != 2 {
		t.Fatalf("%+v, %+v", vm.Spec.Power, r)
	}
	e.due(id)
	e.wait(id, "it starts anew", func(vm api.VM) bool { return vm.Status.PID != 0 && vm.Status.Phase == api.VMRunning })
}

func TestASilentAgent(t *testing.T) {
	e := newEnv(t, false)
	// The clock goes on while the silence grows, by less than the pause before the reset.
	id, _ := e.running(policy(api.EndPolicy{AgentSilenceSeconds: 60, RestartDelaySeconds: 900}))
	g := &guestProgram{}
	var deaf atomic.Bool
	var last atomic.Pointer[net.Conn]
	e.serveAgent(id, func(c net.Conn) {
		if deaf.Load() {
			_ = c.Close()
			return
		}
		last.Store(&c)
		g.serve(c)
	})
	q := e.fakes.qemu()
	e.clock.advance(time.Hour)
	e.h.Wake() // one that never answered is not silent
	q.Emit("VSERPORT_CHANGE", `{"id": "agent0", "open": true}`)
	e.wait(id, "the agent answered", func(vm api.VM) bool { return vm.Status.Agent != nil })
	if e.vm(id).Status.Restarts != nil {
		t.Fatal("restarted before it answered")
	}
	deaf.Store(true)
	_ = (*last.Load()).Close()
	grown := time.Duration(0)
	e.until("silent", func() bool {
		if grown < 10*time.Minute {
			grown += 10 * time.Second
			e.clock.advance(10 * time.Second)
		}
		e.h.lookAtAgents()
		e.h.Wake()
		r := e.vm(id).Status.Restarts
		return r != nil && r.Due != nil
	}, nothing)
	if r := e.vm(id).Status.Restarts; r.Cause != api.EndSilence || !strings.Contains(r.Reason, "guest agent has not answered") {
		t.Fatalf("%+v", r)
	}
	e.due(id)
	e.wait(id, "reset", func(vm api.VM) bool { return vm.Status.RebootsDone == 1 })
	if q.Count("system_reset") != 1 {
		t.Error("resets:", q.Count("system_reset"))
	}
}
