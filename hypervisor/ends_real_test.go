// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

// crash lets the guest's kernel panic, through its agent.
func (e *env) crash(id string) {
	e.t.Helper()
	a, err := e.h.GuestAgent(id)
	must(e.t, err)
	ctx, cancel := context.WithTimeout(e.t.Context(), 3*time.Second)
	defer cancel()
	// Who is dead does not answer.
	_, _ = a.Exec(ctx, api.GuestExec{Command: []string{"/bin/sh", "-c", "echo c > /proc/sysrq-trigger"}, Seconds: 2})
}

// A real kernel panics, tells it through the panic device and resets itself a
// second later (panic=1); the second time is one too many.
func TestRealGuestThatPanicsTooOften(t *testing.T) {
	e := newEnv(t, true)
	id := e.counterGuest(api.VMSpec{CPUs: 1, Power: api.PowerRunning, Recovery: &api.VMRecovery{EndPolicy: api.EndPolicy{OnPanic: api.EndRestart, RestartLimit: 1}}})
	first := e.count(id, "first boot", after(1))
	heard := func() bool { a := e.h.instance(id).knownAgent(); return a != nil && a.Known().Answering }
	e.slowly("the agent answers", heard)
	e.crash(id)
	e.slowly("the panic is counted, and the guest has reset itself", func() bool {
		r := e.vm(id).Status.Restarts
		return r != nil && len(r.Times) == 1 && r.Due == nil && r.Cause == api.EndPanic
	})
	e.count(id, "second boot", func(p progress) bool { return p.boot == first.boot+1 })
	e.slowly("the agent answers again", heard)
	e.crash(id)
	e.slowly("it is given up", func() bool { return e.vm(id).Status.Phase == api.VMStopped })
	vm := e.vm(id)
	if r := vm.Status.Restarts; r == nil || r.Left != api.LeftGaveUp || vm.Spec.Power != api.PowerStopped || e.events(eventGaveUp) != 1 {
		t.Errorf("%+v, %+v", vm.Spec.Power, vm.Status)
	}
}

// slowly is until for a guest without KVM on a busy machine.
func (e *env) slowly(what string, ok func() bool) {
	e.t.Helper()
	for end := time.Now().Add(guestPatience); !ok(); {
		if time.Now().After(end) {
			e.t.Fatalf("waited %v for: %s", guestPatience, what)
		}
		ctx, cancel := context.WithTimeout(e.t.Context(), 50*time.Millisecond)
		_, _ = e.db.WaitRevision(ctx, e.db.Local().Revision()+1)
		cancel()
	}
}
