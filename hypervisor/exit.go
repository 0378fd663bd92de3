// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// verdict is why QEMU ended, as far as it decides what happens next.
type verdict int

const (
	endedOnPurpose verdict = iota // killed by this node, or switched off as wished
	endedByGuest                  // somebody in the guest switched it off
	endedByLease                  // the guard kept its promise
	endedByHost                   // SIGTERM or quit from outside
	endedByCrash
	endedAtStart // a crash before QEMU was up
)

// judge decides from what the guard and QEMU said; see the table in DESIGN.md.
// stopping is whether the power button had been pressed.
func judge(p *Process, sd *shutdownEvent, stopping, wasUp bool) verdict {
	switch {
	case p.Reason == ReasonLease:
		return endedByLease
	case p.Reason == ReasonKill:
		return endedOnPurpose
	case p.Reason == ReasonStopping:
		return endedByHost
	case p.ExitCode != 0 || p.Signal != 0:
		if !wasUp {
			return endedAtStart
		}
		return endedByCrash
	case stopping:
		return endedOnPurpose
	case sd != nil && !sd.guest:
		return endedByHost
	}
	return endedByGuest
}

// exited handles the record of an ended process, once.
func (s *step) exited(ctx context.Context) error {
	p, st := s.proc, &s.vm.Status
	ours := st.PID == p.PID && st.PID != 0
	if !ours && (s.in.pid != p.PID || s.in.judged == p.PID) {
		// Judged before, or of a time that nobody remembers.
		s.silent = true
		s.result.After = attachRetry
		return s.h.forget(ctx, s.vm.Meta.ID)
	}
	sd := s.in.settled(ctx)
	wasUp := s.in.pid == p.PID && s.in.wasUp || ours && st.Phase != api.VMStarting && st.Phase != api.VMCreating
	asked := s.in.pid == p.PID && s.in.askedOff && s.now.Sub(s.in.buttonAt) < askedOffWindow
	stopping := asked || st.Phase == api.VMStopping
	s.in.detach()
	s.in.cleanEnd = p.ExitCode == 0 && p.Signal == 0 && p.Reason != ReasonKill
	s.ended()
	if err := s.h.endTPM(ctx, s.vm.Meta.ID); err != nil {
		return err
	}
	tx := &configdb.Txn{Actor: actor}
	if err := s.sentence(tx, judge(p, sd, stopping, wasUp)); err != nil {
		return err
	}
	s.conditions()
	s.noteTries()
	if err := configdb.VMs.UpdateStatus(s.v, tx, &s.vm); err != nil {
		return err
	}
	if err := s.detached(tx); err != nil {
		return err
	}
	if err := s.commit(ctx, tx); err != nil {
		return err
	}
	s.in.judged = p.PID
	if len(s.vm.Spec.NICs) > 0 {
		s.h.unplug(ctx, s.vm.Meta.ID)
	}
	s.silent = true
	if s.result.After == 0 {
		s.result.After = attachRetry
	}
	return s.h.forget(ctx, s.vm.Meta.ID)
}

// sentence sets the status that follows from a verdict, and what is needed for
// a restart.
func (s *step) sentence(tx *configdb.Txn, why verdict) error {
	p := s.proc
	s.h.log.Info("QEMU ended", "vm", s.vm.Meta.ID, "pid", p.PID, "exit", p.ExitCode, "signal", p.Signal, "reason", p.Reason)
	if s.vm.Spec.Power == api.PowerStopped || s.vm.Spec.Power == api.PowerSuspended {
		s.atRest()
		return nil
	}
	s.vm.Status.Awaits = nil
	switch why {
	case endedByGuest:
		if r := s.vm.Status.Restarts; r != nil && r.Due != nil && r.Cause == api.EndWatchdog { // the event was answered before its QEMU was gone
			s.awaitRestart(r)
			return nil
		}
		if s.switchedOffByWatchdog() {
			return s.crashEnd(tx, api.EndWatchdog, "the guest did not feed its watchdog, and QEMU switched it off")
		}
		s.vm.Spec.Power, s.vm.Spec.ForceStop = api.PowerStopped, false
		if err := configdb.VMs.UpdateSpec(s.v, tx, &s.vm); err != nil {
			return err
		}
		s.vm.Status.ObservedGeneration = s.vm.Meta.Generation
		s.vm.Status.RebootsDone = s.vm.Spec.Reboots
		s.report(api.VMStopped, "the guest switched itself off")
	case endedByLease:
		s.report(api.VMStarting, "it was ended because this node lost its lease; it starts again when the lease is back")
		s.holdBack()
	case endedByHost:
		s.report(api.VMStarting, "QEMU was ended from outside on the host; it starts again")
		if p.Reason == ReasonStopping { // the host goes down
			s.holdBack()
		}
	case endedOnPurpose:
		if done, err := s.giveUpForDrill(tx); done || err != nil {
			return err
		}
		s.report(api.VMStarting, "QEMU was ended; it starts again as wished")
	case endedByCrash:
		s.vm.Status.Crashes++
		return s.crashEnd(tx, api.EndCrash, fmt.Sprintf("QEMU crashed (%s)%s", howEnded(p), s.logTail()))
	case endedAtStart:
		s.startFailed = true
		s.crashed(api.VMFailed, "QEMU could not start")
	}
	return nil
}

// crashed puts off the restart, once per process.
func (s *step) crashed(phase api.VMPhase, what string) {
	if s.in.putOff != s.proc.PID {
		s.backOff()
		s.in.putOff = s.proc.PID
	} else {
		s.result.After = max(s.in.notBefore.Sub(s.now), attachRetry)
	}
	s.report(phase, fmt.Sprintf("%s (%s)%s; it is tried again", what, howEnded(s.proc), s.logTail()))
}

func howEnded(p *Process) string {
	if p.Signal != 0 {
		return "signal " + syscall.Signal(p.Signal).String()
	}
	return fmt.Sprintf("exit code %d", p.ExitCode)
}

// logTail is the end of what QEMU wrote since its start, as one line.
func (s *step) logTail() string { return tail(s.h.pathsOf(s.vm.Meta.ID).qemuLog, s.in.logFrom) }

// tail is the end of a log, at most maxLogTail bytes that come after from, as
// one line; "" if there is nothing.
func tail(path string, from int64) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return ""
	}
	if from > st.Size() { // the guard began a new file
		from = 0
	}
	from = max(from, st.Size()-maxLogTail)
	b, err := io.ReadAll(io.NewSectionReader(f, from, maxLogTail))
	text := strings.Join(strings.Fields(strings.ToValidUTF8(string(b), "?")), " ")
	if err != nil || text == "" {
		return ""
	}
	return ": " + text
}
