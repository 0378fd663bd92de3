// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/console"
	"github.com/muster-vm/muster/hypervisor/qmp"
)

// QEMU's run states (QAPI RunState) that are told apart.
const (
	runRunning   = "running"
	runPaused    = "paused"
	runPrelaunch = "prelaunch"
	runSuspended = "suspended"
	runShutdown  = "shutdown"
	runWatchdog  = "watchdog"
	runIOError   = "io-error"
	// The guest stands still for its last memory; it has been handed over; it is
	// expected.
	runFinishMigrate = "finish-migrate"
	runPostMigrate   = "postmigrate"
	runInMigrate     = "inmigrate"
)

// up handles a VM whose QEMU runs.
func (s *step) up(ctx context.Context) error {
	s.meet()
	if why, out := s.h.lockedOut(s.v, &s.vm); out {
		s.h.log.Warn("a VM whose disks are locked away is ended", "vm", s.vm.Meta.ID, "pid", s.proc.PID, "why", why)
		s.report(api.VMStarting, "ended: "+why)
		s.result.After = attachRetry
		return s.h.kill(ctx, s.vm.Meta.ID)
	}
	if reason, out := s.in.ioError(); out {
		s.h.log.Warn("a QEMU that is locked out of its disks is ended; another one begins", "vm", s.vm.Meta.ID, "pid", s.proc.PID, "why", reason)
		s.report(api.VMStarting, "ended: its QEMU was locked out of a disk's pool")
		s.result.After = attachRetry
		return s.h.kill(ctx, s.vm.Meta.ID)
	}
	if err := s.protect(ctx, true); err != nil {
		if s.b.Spec.Protected || s.vm.Spec.HA != api.HARestart {
			return err
		}
		s.problem(ConditionProtection, fmt.Sprintf("the guard cannot protect this vm now, so it is not restarted elsewhere if this node is lost: %v", err))
		s.result.After = waitLook
	}
	if s.vm.Spec.Power == api.PowerStopped && s.vm.Spec.ForceStop {
		return s.forceOff(ctx)
	}
	s.alive()
	s.limit()
	if s.now.Before(s.in.quietUntil) {
		s.unresponsive()
		return nil
	}
	if err := s.h.attach(ctx, s.in); err != nil {
		return s.unreachable(ctx, err)
	}
	state, err := s.in.runState(ctx)
	if err == nil {
		state, err = s.depart(ctx, state)
	}
	if err == nil {
		state, err = s.steer(ctx, state)
	}
	if err != nil {
		return s.unreachable(ctx, err)
	}
	if !s.in.wasUp && s.vm.Spec.HA == api.HARestart && len(configdb.GuardingPools(s.v, &s.vm)) > 0 {
		s.result.After = lookSoon // to take it from the guard's kill
	}
	s.in.wasUp = true
	s.vm.Status.Awaits = nil
	if s.vm.Status.Hardware == nil {
		s.vm.Status.Hardware = s.startedWith()
	}
	if s.vm.Status.CPU == "" {
		s.vm.Status.CPU = runningCPU(s.proc.PID)
	}
	s.checkTPM()
	s.vm.Status.Accelerator = s.in.accel
	s.show(state)
	if err := s.adapt(ctx); err != nil {
		return s.unreachable(ctx, err)
	}
	s.showMemory()
	s.h.notStarting(s.vm.Meta.ID)
	s.agentSummary()
	if s.now.Sub(s.in.startedAt) > StableTime {
		s.in.failures = 0
	}
	if err := console.Trim(s.h.pathsOf(s.vm.Meta.ID).serialLog); err != nil {
		s.h.log.Warn("the serial log cannot be trimmed", "vm", s.vm.Meta.ID, "err", err)
	}
	if err := s.care(ctx, state); err != nil {
		return s.unreachable(ctx, err)
	}
	return nil
}

// alive writes what the guard knows of the process into the status.
func (s *step) alive() {
	if s.vm.Status.PID != s.proc.PID || s.vm.Status.StartedAt == nil {
		if s.vm.Status.Phase == api.VMStopped {
			s.vm.Status.Crashes = 0 // they count from the last wished start
		}
		t := s.in.startedAt.UTC()
		s.vm.Status.PID, s.vm.Status.StartedAt = s.proc.PID, &t
	}
	s.vm.Status.StorageGuard = !s.proc.Protected && len(s.b.Spec.Guarding()) > 0
}

func (s *step) forceOff(ctx context.Context) error {
	s.silent = true
	if err := s.h.kill(ctx, s.vm.Meta.ID); err != nil {
		return fmt.Errorf("force vm %s off: %w", s.vm.Meta.Name, err)
	}
	s.result.After = attachRetry // then the record of the end is looked at
	return nil
}

// unreachable handles a QEMU that does not answer. One that just began, or just
// ended, gets a moment.
func (s *step) unreachable(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var refused *qmp.CommandError
	if errors.As(err, &refused) {
		return fmt.Errorf("vm %s: %w", s.vm.Meta.Name, err)
	}
	var store *storeError
	if errors.As(err, &store) {
		s.h.log.Warn("a step of a vm is tried again", "vm", s.vm.Meta.ID, "err", err)
		s.silent = true
		s.result.After = lookSoon
		if errors.Is(err, configdb.ErrNoQuorum) {
			s.result.After = waitLook
		}
		return nil
	}
	s.h.procs.invalidate()
	if !s.in.wasUp && s.h.cfg.Now().Sub(s.in.startedAt) < freshTime {
		s.silent = true
		s.result.After = attachRetry
		return nil
	}
	if !errors.Is(err, qmp.ErrTimeout) && s.h.cfg.Now().Sub(s.in.quietUntil) > QuietTime {
		// The connection ended: most often the guard is about to say why.
		s.in.quietUntil = s.h.cfg.Now() // the next time it is worth a report
		s.silent = true
		s.result.After = lookSoon
		return nil
	}
	s.h.log.Warn("QEMU does not answer", "vm", s.vm.Meta.ID, "pid", s.proc.PID, "err", err)
	s.in.detach() // a reply that comes later belongs to nobody
	s.in.quietUntil = s.h.cfg.Now().Add(QuietTime)
	s.unresponsive()
	return nil
}

func (s *step) unresponsive() {
	s.cutStalled()
	if !s.in.wasUp && s.vm.Status.Phase != api.VMRunning && s.vm.Status.Phase != api.VMPaused {
		s.report(api.VMStarting, "QEMU has not opened its monitor yet")
	}
	s.problem(ConditionQMPUnresponsive, fmt.Sprintf("QEMU (pid %d) does not answer on its monitor; if it stays so, muster vm stop --force %s ends it", s.proc.PID, s.vm.Meta.Name))
	s.result.After = max(s.in.quietUntil.Sub(s.h.cfg.Now()), lookSoon)
}

// steer takes QEMU towards the wish and returns its state after that.
func (s *step) steer(ctx context.Context, state string) (string, error) {
	var cmd string
	if state == runFinishMigrate || state == runPostMigrate {
		return state, nil // see depart
	}
	switch s.vm.Spec.Power {
	case api.PowerStopped:
		return state, s.switchOff(ctx, state)
	case api.PowerPaused:
		if state == runRunning {
			cmd = "stop"
		}
	case api.PowerRunning:
		switch {
		case state == runPaused, state == runPrelaunch, state == runWatchdog && s.leftPaused():
			cmd = "cont"
		case state == runIOError && s.now.Sub(s.in.ioRetryAt) >= IORetry:
			s.in.ioRetryAt = s.now
			cmd = "cont"
		}
	}
	s.in.stopSince = time.Time{}
	if cmd != "" {
		if err := s.in.command(ctx, cmd, nil); err != nil {
			return state, err
		}
	}
	if s.vm.Spec.Reboots > max(s.vm.Status.RebootsDone, s.in.reset) {
		if err := s.in.command(ctx, "system_reset", nil); err != nil {
			return state, err
		}
		s.in.reset = s.vm.Spec.Reboots // not again, whatever becomes of the status
		s.h.log.Info("guest reset", "vm", s.vm.Meta.ID)
		cmd = "system_reset"
	}
	s.vm.Status.RebootsDone = max(s.vm.Status.RebootsDone, s.in.reset)
	if cmd == "" {
		return state, nil
	}
	return s.in.runState(ctx)
}

// switchOff presses the ACPI power button, again and again: a guest that is
// still booting does not notice it.
func (s *step) switchOff(ctx context.Context, state string) error {
	switch state {
	case runPrelaunch: // the guest never ran: there is nothing to shut down
		return s.h.kill(ctx, s.vm.Meta.ID)
	case runPaused:
		if err := s.in.command(ctx, "cont", nil); err != nil {
			return err
		}
	}
	if s.in.stopSince.IsZero() {
		s.in.stopSince = s.now
	}
	if state != runShutdown && s.now.Sub(s.in.buttonAt) >= PowerButtonInterval {
		s.in.askedOff = true
		s.in.buttonAt = s.now
		if err := s.in.command(ctx, "system_powerdown", nil); err != nil {
			return err
		}
	}
	s.result.After = max(PowerButtonInterval-s.now.Sub(s.in.buttonAt), lookSoon)
	return nil
}

// show turns QEMU's state into the status.
func (s *step) show(state string) {
	name := s.vm.Meta.Name
	switch {
	case s.vm.Spec.Power == api.PowerStopped:
		s.report(api.VMStopping, "the ACPI power button was pressed; waiting for the guest")
		if s.now.Sub(s.in.stopSince) >= StopTimeout {
			s.problem(ConditionStopTimedOut, fmt.Sprintf("the guest did not react to the power button for %v; muster vm stop --force %s switches it off at once", StopTimeout, name))
		}
	case state == runRunning, state == runSuspended:
		s.report(api.VMRunning, "")
	case s.vm.Spec.Power == api.PowerRunning && (state == runFinishMigrate || state == runPostMigrate):
		s.report(api.VMRunning, "it moves to another node")
	case state == runPaused, state == runPrelaunch, state == runFinishMigrate, state == runPostMigrate:
		s.report(api.VMPaused, "")
	case state == runShutdown:
		s.report(api.VMRunning, "the guest is switching itself off")
	case state == runIOError:
		s.report(api.VMPaused, "QEMU paused the guest because it could not use a disk")
		reason, _ := s.in.ioError()
		s.problem(ConditionIOError, fmt.Sprintf("a disk of vm %s cannot be used (%s), most likely because its pool is full; free space there, the guest then goes on within %v", name, cmp.Or(reason, "no reason given"), IORetry))
		s.result.After = IORetry
	default:
		s.report(api.VMPaused, fmt.Sprintf("QEMU halted the guest: %s", state))
		s.problem(ConditionGuestHalted, fmt.Sprintf("QEMU reports state %s; muster vm reboot %s or muster vm stop --force %s gets it out of that", state, name, name))
	}
	s.in.mu.Lock()
	panicked := s.in.panicked
	left := s.in.panickedAt.Add(PanicTime).Sub(s.now)
	s.in.mu.Unlock()
	if !panicked && left > 0 {
		s.lookAgain(left)
	}
	if panicked || left > 0 {
		s.problem(ConditionGuestPanicked, fmt.Sprintf("the guest's kernel panicked; see its console, and reset it with muster vm reboot %s if it does not do so itself", name))
	}
}
