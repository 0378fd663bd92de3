// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"testing"
)

// What was asked for is as old as the replica when there is no lease. A VM with a
// storage guard runs on then, and could not be started again.
func TestADrillKillsNothingWithoutALease(t *testing.T) {
	e := newEnv(t, false)
	id, was := e.running(canary())
	e.stop()
	e.drill(id, nil)
	look := func(session uint64) {
		t.Helper()
		e.guard.mu.Lock()
		e.guard.session = session
		e.guard.mu.Unlock()
		if _, err := e.h.reconcile(t.Context(), id); err != nil {
			t.Log(err)
		}
	}
	session, _, _ := e.guard.Current()
	look(session)
	if d := e.drillOf(id); d.Status.PID != was.Status.PID {
		t.Fatalf("the drill does not say whom it ends: %+v", d.Status)
	}
	look(0)
	if e.guard.killed(id) {
		t.Error("killed for a drill without a lease")
	}
	look(session) // nothing but the lease was missing
	if !e.guard.killed(id) {
		t.Error("not killed with a lease")
	}
}

// QEMU ends by itself when the guard has noted the wish to kill it: its record has the
// reason of the kill, and not its signal. internal/proof wants both.
func TestAnEndWithoutTheSignalIsNotTheDrills(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.asked()
	must(t, e.guard.Kill(t.Context(), id))
	e.until("reaped", func() bool { p, ok := e.guard.get(id); return ok && p.State == ProcessExited }, func() string { return "" })
	e.guard.mu.Lock()
	e.guard.procs[id].ExitCode, e.guard.procs[id].Signal = 0, 0
	e.guard.mu.Unlock()
	if _, err := e.h.reconcile(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if d := e.drillOf(id); d.Status.Ended != nil && d.Status.Ended.Signal != 9 {
		t.Errorf("evidence that muster ha verify calls broken: %+v", d.Status.Ended)
	}
}
