// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"fmt"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/agent"
)

// This file answers what befalls a VM that ought to run, as its spec says; see
// "Policies of an end" in DESIGN.md.

// The conditions of a VM whose end was answered.
const (
	ConditionGaveUp     = "GaveUp"     // it stays down after too many restarts
	ConditionLeftDown   = "LeftDown"   // it stays down as its policy says
	ConditionLeftPaused = "LeftPaused" // it was halted as its policy says
	ConditionRestartDue = "RestartDue" // a restart waits for its time
)

// The events of what was done by itself.
const (
	eventRestart    = "vm.restart"
	eventGaveUp     = "vm.gave-up"
	eventLeftDown   = "vm.left-down"
	eventLeftPaused = "vm.left-paused"
)

// befallen is what QEMU said of its guest and nobody has answered yet; under the
// instance's mu.
type befallen struct {
	panicAt    time.Time // of the first panic since the last answer
	watchdogAt time.Time // of the first end of the watchdog since then
	resetAt    time.Time // of the last reset
	// unsaid: QEMU's state told of the watchdog's end before the event of it was
	// heard, so that event says nothing new.
	unsaid bool
}

// answered takes note that an end was answered, unless it came again since.
func (in *instance) answered(end api.VMEnd, at time.Time) {
	in.mu.Lock()
	defer in.mu.Unlock()
	switch {
	case end == api.EndPanic && in.befell.panicAt.Equal(at):
		in.befell.panicAt = time.Time{}
	case end == api.EndWatchdog && in.befell.watchdogAt.Equal(at):
		in.befell.watchdogAt = time.Time{}
	}
}

// noteEvent keeps what an event says about the guest, under in.mu.
func (b *befallen) noteEvent(event string, now time.Time) {
	switch event {
	case "GUEST_PANICKED":
		if b.panicAt.IsZero() {
			b.panicAt = now
		}
	case "WATCHDOG":
		if b.watchdogAt.IsZero() && !b.unsaid {
			b.watchdogAt = now
		}
		b.unsaid = false
	case "RESET":
		b.resetAt, b.unsaid = now, false
	case "RESUME": // behind this it can end anew
		b.unsaid = false
	}
}

// end is one thing that befell the VM.
type end struct {
	kind api.VMEnd
	at   time.Time
	what string // for people
}

// nextEnd is what befell the running guest and its policy has an answer for.
func (s *step) nextEnd(p *api.EndPolicy, state string) *end {
	s.in.mu.Lock()
	told := state != runWatchdog || !s.in.befell.watchdogAt.IsZero()
	s.in.befell.unsaid = s.in.befell.unsaid || !told
	b := s.in.befell
	s.in.mu.Unlock()
	if !told { // the event is on its way, or an earlier life of the daemon had it
		b.watchdogAt = s.now
	}
	for _, e := range []end{
		{api.EndPanic, b.panicAt, "the guest's kernel panicked"},
		{api.EndWatchdog, b.watchdogAt, "the guest did not feed its watchdog"},
	} {
		switch {
		case e.at.IsZero():
		case p.Action(e.kind) == api.EndIgnore:
			s.in.answered(e.kind, e.at)
		default:
			return &e
		}
	}
	return s.silence(p)
}

// silence is that the guest agent answered and does no more.
func (s *step) silence(p *api.EndPolicy) *end {
	limit := p.AgentSilence()
	s.in.beat.Store(int64(limit))
	a := s.in.knownAgent()
	if limit == 0 || a == nil {
		return nil
	}
	since, missed := a.Silence()
	if since.IsZero() {
		return nil // it has not answered yet
	}
	if d := s.now.Sub(since); d < limit || missed < agent.MinMissed {
		s.lookAgain(max(limit-d, agentTick))
		return nil
	}
	return &end{api.EndSilence, since, fmt.Sprintf("the guest agent has not answered for %v", s.now.Sub(since).Round(time.Second))}
}

func (in *instance) knownAgent() *agent.Agent {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.agent
}

// care answers what befell a guest that QEMU still has. It is called last in a
// look at a VM that is up.
func (s *step) care(ctx context.Context, state string) error {
	if s.vm.Spec.Power != api.PowerRunning || s.vm.Meta.Deleting() || s.silent {
		return nil
	}
	if _, err := configdb.Operations.Get(s.v, s.vm.Meta.ID); err == nil {
		return nil // when that has ended
	}
	p := s.vm.Spec.EndPolicy()
	if r := s.vm.Status.Restarts; r != nil && r.Due != nil {
		return s.resetWhenDue(ctx, &p, r)
	}
	if state != runRunning && state != runWatchdog {
		return nil
	}
	e := s.nextEnd(&p, state)
	if e == nil {
		return nil
	}
	tx := &configdb.Txn{Actor: actor}
	done, err := s.answer(tx, &p, e)
	if err == nil && done {
		err = s.settleEnd(ctx, tx)
	}
	if err != nil {
		return &storeError{err}
	}
	s.in.answered(e.kind, e.at)
	return nil
}

// answer adds to a transaction what a policy says about an end; false: nothing.
func (s *step) answer(tx *configdb.Txn, p *api.EndPolicy, e *end) (bool, error) {
	was := s.vm.Status.Restarts
	r := was.Clone()
	s.vm.Status.Restarts = r
	r.Cause, r.Due, r.Left = e.kind, nil, ""
	switch p.Action(e.kind) {
	case api.EndStop:
		return true, s.leave(tx, api.LeftStopped, e.what+"; it stays down, as its policy says, until somebody starts it")
	case api.EndPause:
		return true, s.leave(tx, api.LeftPaused, e.what+"; it is halted, as its policy says: muster vm resume lets it go on, muster vm stop --force ends it")
	}
	s.in.mu.Lock()
	itself := e.kind != api.EndCrash && s.in.befell.resetAt.After(e.at)
	s.in.mu.Unlock()
	if itself && p.RestartLimit == 0 {
		s.vm.Status.Restarts = was
		return false, nil // or a guest that resets itself for ever would be written for ever
	}
	pause, gaveUp := r.Count(p, e.at, s.now)
	if gaveUp {
		return true, s.leave(tx, api.LeftGaveUp, fmt.Sprintf("gave up after %d restarts in %v: %s", p.RestartLimit, p.Window(), e.what))
	}
	if itself {
		r.Reason = fmt.Sprintf("%s and has reset itself (%s)", e.what, r.Ordinal(p))
		return true, s.tell(tx, eventRestart, api.SeverityWarning)
	}
	due := s.now.Add(pause).UTC()
	r.Due = &due
	verb := "it is reset"
	if e.kind == api.EndCrash {
		verb = "it starts again"
	}
	r.Reason = fmt.Sprintf("%s; %s in %v (%s)", e.what, verb, pause, r.Ordinal(p))
	return true, s.tell(tx, eventRestart, api.SeverityWarning)
}

// leave makes the VM stay as a policy says until somebody wishes for something
// else.
func (s *step) leave(tx *configdb.Txn, how api.VMLeft, reason string) error {
	r := s.vm.Status.Restarts
	r.Left, r.Reason, r.Due = how, reason, nil
	event, severity := eventLeftDown, api.SeverityWarning
	switch how {
	case api.LeftPaused:
		s.vm.Spec.Power, event = api.PowerPaused, eventLeftPaused
	case api.LeftGaveUp:
		event, severity = eventGaveUp, api.SeverityCritical
		fallthrough
	default:
		s.vm.Spec.Power, s.vm.Spec.ForceStop = api.PowerStopped, s.proc != nil && s.proc.State != ProcessExited
	}
	if err := configdb.VMs.UpdateSpec(s.v, tx, &s.vm); err != nil {
		return err
	}
	return s.tell(tx, event, severity)
}

// tell adds the event of what is done.
func (s *step) tell(tx *configdb.Txn, event string, severity api.Severity) error {
	r := s.vm.Status.Restarts
	e := api.NewEvent(event, severity, api.KindVM, s.vm.Meta, fmt.Sprintf("vm %s on node %s: %s", s.vm.Meta.Name, s.h.cfg.NodeName, r.Reason), s.now)
	e.Spec.Node, e.Spec.Details = s.h.cfg.NodeName, map[string]string{"cause": string(r.Cause), "restarts": fmt.Sprint(len(r.Times))}
	s.h.log.Warn("the end of a VM is answered", "vm", s.vm.Meta.ID, "cause", r.Cause, "event", event, "why", r.Reason)
	return configdb.Events.CreateUnnamed(tx, &e)
}

// settleEnd commits an answer about a VM that has a process. What follows from it
// is done by the next look.
func (s *step) settleEnd(ctx context.Context, tx *configdb.Txn) error {
	tx.RequireRevision(configdb.Operations.SpecKey(s.vm.Meta.ID), 0)
	tx.RequireRevision(configdb.VMs.SpecKey(s.vm.Meta.ID), s.vm.Meta.Revision)
	s.conditions()
	if err := configdb.VMs.UpdateStatus(s.v, tx, &s.vm); err != nil {
		return err
	}
	if err := s.commit(ctx, tx); err != nil {
		return err
	}
	s.silent = true
	s.result.After = attachRetry
	return nil
}

// resetWhenDue resets a guest when the pause before that is over, by the wish
// that a user would have: it is carried out whatever becomes of this daemon.
func (s *step) resetWhenDue(ctx context.Context, p *api.EndPolicy, r *api.VMRestarts) error {
	s.in.mu.Lock()
	reset := s.in.befell.resetAt
	s.in.mu.Unlock()
	r = r.Clone()
	s.vm.Status.Restarts = r
	decided := r.Times
	last := time.Time{}
	if len(decided) > 0 {
		last = decided[len(decided)-1]
	}
	if r.Cause == api.EndSilence {
		if a, limit := s.in.knownAgent(), p.AgentSilence(); a != nil && limit > 0 {
			if since, missed := a.Silence(); since.IsZero() || missed == 0 || s.now.Sub(since) < limit {
				// It answers again, or the guest begins anew.
				r.Due, r.Reason, r.Times = nil, "", decided[:max(len(decided)-1, 0)]
				return nil
			}
		}
	}
	if r.Cause == api.EndCrash || reset.After(last) && r.Cause != api.EndSilence {
		r.Due = nil // it runs again, or was reset meanwhile
		return nil
	}
	if wait := min(r.Due.Sub(s.now), api.MaxRestartDelay); wait > 0 {
		s.lookAgain(wait)
		return nil
	}
	r.Due = nil
	r.Reason = fmt.Sprintf("it was reset (%s)", r.Ordinal(p))
	tx := &configdb.Txn{Actor: actor}
	s.vm.Spec.Reboots++
	err := configdb.VMs.UpdateSpec(s.v, tx, &s.vm)
	if err == nil {
		err = s.settleEnd(ctx, tx)
	}
	if err != nil {
		return &storeError{err}
	}
	return nil
}

// crashEnd is what follows from the end of a QEMU that was up.
func (s *step) crashEnd(tx *configdb.Txn, kind api.VMEnd, what string) error {
	p := s.vm.Spec.EndPolicy()
	if p.Action(kind) == api.EndPause { // nothing is left to look at
		p.OnWatchdog = api.EndStop
	}
	if kind == api.EndCrash && p.Action(kind) == api.EndRestart && p.RestartLimit == 0 && p.RestartDelaySeconds == 0 {
		r := s.vm.Status.Restarts.Clone()
		r.Cause, r.Due, r.Left = kind, nil, ""
		r.Count(&p, s.now, s.now)
		s.vm.Status.Restarts = r
		s.crashed(api.VMStarting, "QEMU crashed")
		return nil
	}
	if _, err := s.answer(tx, &p, &end{kind, s.now, what}); err != nil {
		return err
	}
	if r := s.vm.Status.Restarts; r.Due != nil {
		s.awaitRestart(r)
		return nil
	}
	s.vm.Status.ObservedGeneration = s.vm.Meta.Generation
	s.vm.Status.RebootsDone = s.vm.Spec.Reboots
	s.report(api.VMStopped, s.vm.Status.Restarts.Reason)
	return nil
}

// awaitRestart says that the VM is down until a restart is due.
func (s *step) awaitRestart(r *api.VMRestarts) {
	s.result.After = max(r.Due.Sub(s.now), attachRetry)
	s.report(api.VMStarting, r.Reason)
}

// switchedOffByWatchdog reports that QEMU ended by its watchdog's action and the
// policy has an answer for that.
func (s *step) switchedOffByWatchdog() bool {
	s.in.mu.Lock()
	defer s.in.mu.Unlock()
	p := s.vm.Spec.EndPolicy()
	return !s.in.befell.watchdogAt.IsZero() && p.Action(api.EndWatchdog) != api.EndIgnore
}

// restartDue is how long a start has to wait for the pause after a crash.
func (s *step) restartDue() time.Duration {
	r := s.vm.Status.Restarts
	if r == nil || r.Due == nil || r.Left != "" {
		return 0
	}
	if wait := min(r.Due.Sub(s.now), api.MaxRestartDelay); wait > 0 {
		return wait
	}
	r = r.Clone()
	r.Due = nil
	s.vm.Status.Restarts = r
	return 0
}

// recall makes what is remembered of restarts agree with the wish: what somebody
// wished for since begins anew, what stands is said.
func (s *step) recall() {
	r := s.vm.Status.Restarts
	if r == nil {
		return
	}
	power := s.vm.Spec.Power
	down := power == api.PowerStopped
	switch r.Left {
	case api.LeftGaveUp, api.LeftStopped:
		if !down {
			s.vm.Status.Restarts = nil
			return
		}
	case api.LeftPaused:
		if power == api.PowerRunning {
			r = r.Clone()
			r.Left, r.Reason = "", ""
			s.vm.Status.Restarts = r
		}
	}
	if down && (r.Left == "" || r.Left == api.LeftPaused) {
		s.vm.Status.Restarts = nil
		return
	}
	condition := map[api.VMLeft]string{api.LeftGaveUp: ConditionGaveUp, api.LeftStopped: ConditionLeftDown, api.LeftPaused: ConditionLeftPaused}[r.Left]
	if condition == "" {
		if r.Due != nil {
			s.problem(ConditionRestartDue, r.Reason)
		}
		return
	}
	s.problem(condition, r.Reason)
	if ph := s.vm.Status.Phase; ph == api.VMStopped || ph == api.VMPaused {
		s.vm.Status.Message = r.Reason
	}
}

// leftPaused reports that the VM was halted by a policy and nobody has taken note
// yet that it may go on.
func (s *step) leftPaused() bool {
	r := s.vm.Status.Restarts
	return r != nil && r.Left == api.LeftPaused
}
