// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package guard

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// table is the whole state of the guard and all its decisions. It does no I/O
// and reads no clock: every method takes now (CLOCK_BOOTTIME ns). The Server
// calls it under its lock and carries out what follows from it.
//
// Every method that decides anything calls observe first, so that a decision
// never depends on the deadline timer having fired.
type table struct {
	session    uint64 // 0: no lease yet
	deadlineNS int64
	lapsed     bool
	stopping   bool
	vms        map[string]*instance
	exited     []*instance // in order of exit, for dropping the oldest
	live       int         // instances that have not exited
	strangers  map[string]int
}

// instance is one start of one VM.
type instance struct {
	rec     Record
	session uint64
	// dueNS is when the instance lost its right to run; 0 while it has it.
	// While it is set on a protected instance not yet reaped, no new session.
	dueNS int64
	// prev is the exited record this start replaces, put back if it fails.
	prev *instance
	// proc belongs to the Server; nil until forked.
	proc *process
	// done is closed when the instance has exited or failed to start.
	done chan struct{}
}

func newTable() *table {
	return &table{vms: make(map[string]*instance), strangers: make(map[string]int)}
}

func refuse(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Msg: fmt.Sprintf(format, args...)}
}

// observe takes notice of the time. It returns true when the lease lapsed just
// now; every protected VM is in state killing then.
func (t *table) observe(now int64) bool {
	if t.session == 0 || t.lapsed || now < t.deadlineNS {
		return false
	}
	t.lapsed = true
	for _, in := range t.vms {
		if in.rec.Protected && in.rec.State != StateExited {
			t.condemn(in, ReasonLease)
			in.dueNS = t.deadlineNS
		}
	}
	return true
}

// condemn puts a present instance into state killing. Being killed already, it
// keeps its first reason; "guard stopping" is only a polite request before that.
func (t *table) condemn(in *instance, why Reason) {
	if in.rec.State == StateKilling {
		return
	}
	in.rec.State = StateKilling
	in.rec.Reason = why
}

// extend moves the deadline of the current session or begins a new one, and
// returns the deadline now in force.
func (t *table) extend(now int64, session uint64, deadlineNS int64) (int64, *Error) {
	t.observe(now)
	switch {
	case session < t.session || session == 0:
		return 0, refuse(CodeStaleSession, "session %d is older than the current session %d", session, t.session)
	case session == t.session && t.lapsed:
		return 0, refuse(CodeLapsed, "session %d has lapsed", session)
	case session > t.session && t.overdueCount() > 0:
		return 0, refuse(CodeKilling, "%d protected VMs of session %d are not reaped yet", t.overdueCount(), t.session)
	}
	if deadlineNS <= now {
		return 0, badRequest("deadline is %d ns in the past", now-deadlineNS)
	}
	if deadlineNS-now > int64(MaxAhead) {
		return 0, badRequest("deadline is more than %v ahead", MaxAhead)
	}
	if session > t.session {
		t.session, t.deadlineNS, t.lapsed = session, deadlineNS, false
		return deadlineNS, nil
	}
	t.deadlineNS = max(t.deadlineNS, deadlineNS)
	return t.deadlineNS, nil
}

// overdueCount counts the protected instances that lost their right to run and
// are not reaped.
func (t *table) overdueCount() int {
	n := 0
	for _, in := range t.vms {
		if in.dueNS != 0 && in.rec.Protected && in.rec.State != StateExited {
			n++
		}
	}
	return n
}

// disobedient returns what would run on beyond its right to, and KillTime, if the
// watchdog were petted now for the last time: the protected instances, as due is
// when each lost that right or will, and whether something of an earlier guard is
// among it. That one's lease is unknown, so only the present one counts for it.
//
// Petting must stop before the deadline for that: a guard that is stopped, or
// that cannot kill, will not decide it later.
func (t *table) disobedient(now int64, timeout time.Duration) (ins []*instance, strangers bool) {
	late := func(due int64) bool { return now+int64(timeout) > due+int64(KillTime) }
	for _, in := range t.vms {
		// Without a pid nothing runs yet, and what then does is killed at once:
		// an exec that hangs on dead storage is no reason to reset the host.
		if in.rec.PID == 0 || in.rec.State == StateExited || !in.rec.Protected {
			continue
		}
		due := in.dueNS
		if due == 0 {
			due = t.deadlineNS
		}
		if late(due) {
			ins = append(ins, in)
		}
	}
	return ins, len(t.strangers) > 0 && late(t.deadlineNS)
}

// leaseRefusal says why a VM may not run under session, or nil.
func (t *table) leaseRefusal(session uint64) *Error {
	if session != t.session || session == 0 {
		return refuse(CodeStaleSession, "session %d is not the current session %d", session, t.session)
	}
	if t.lapsed {
		return refuse(CodeLapsed, "session %d has lapsed", session)
	}
	return nil
}

// beginStart reserves the VM id before the fork.
func (t *table) beginStart(now int64, req StartRequest) (*instance, *Error) {
	t.observe(now)
	if t.stopping {
		return nil, refuse(CodeStopping, "the guard is stopping")
	}
	if e := t.leaseRefusal(req.Session); e != nil {
		return nil, e
	}
	if e := t.strangerRefusal(req.VM); e != nil {
		return nil, e
	}
	prev := t.vms[req.VM]
	if prev != nil && prev.rec.State != StateExited {
		return nil, refuse(CodeExists, "vm %s is %s with pid %d", req.VM, prev.rec.State, prev.rec.PID)
	}
	if t.live >= MaxRunning {
		return nil, refuse(CodeTooMany, "%d VMs are present", t.live)
	}
	in := &instance{
		rec: Record{
			VM: req.VM, Epoch: req.Epoch, Protected: req.Protected, State: StateStarting,
			StartedNS: now, LogPath: req.LogPath, Extra: req.Extra,
		},
		session: req.Session,
		prev:    prev,
		done:    make(chan struct{}),
	}
	if req.User != nil {
		in.rec.UID = req.User.UID
	}
	t.vms[req.VM] = in
	t.live++
	return in, nil
}

func (t *table) strangerRefusal(vm string) *Error {
	for _, id := range []string{vm, ""} {
		if pid, ok := t.strangers[id]; ok {
			return refuse(CodeStranger, "process %d of an earlier guard cannot be killed", pid)
		}
	}
	return nil
}

// mayFork is asked right before the fork: the start may have waited in line.
// Nothing is marked; the caller gives up with failStart.
func (t *table) mayFork(now int64, in *instance) *Error {
	t.observe(now)
	if e := t.leaseRefusal(in.session); e != nil {
		return e
	}
	if in.rec.State == StateKilling {
		return refuse(CodeKilled, "vm %s was killed while it started", in.rec.VM)
	}
	if t.stopping {
		return refuse(CodeStopping, "the guard is stopping")
	}
	return nil
}

// finishStart takes in the forked process. A refusal means that the process is
// in state killing and must be killed now.
func (t *table) finishStart(now int64, in *instance, pid int, startTicks uint64) *Error {
	t.observe(now)
	in.rec.PID, in.rec.StartTicks, in.rec.StartedNS = pid, startTicks, now
	t.dropPrev(in)
	e := t.mayFork(now, in)
	if e == nil {
		in.rec.State = StateRunning
		return nil
	}
	why := ReasonLease
	if e.Code == CodeStopping {
		why = ReasonStopping
	} else if in.dueNS == 0 && e.Code != CodeKilled {
		in.dueNS = now
	}
	t.condemn(in, why)
	return e
}

// failStart gives the reservation back when nothing was forked.
func (t *table) failStart(in *instance) {
	t.live--
	in.rec.State = StateExited
	if in.prev != nil {
		t.vms[in.rec.VM] = in.prev
		in.prev = nil
	} else {
		delete(t.vms, in.rec.VM)
	}
	close(in.done)
}

// dropPrev forgets the exited record that a successful start replaces.
func (t *table) dropPrev(in *instance) {
	if in.prev == nil {
		return
	}
	if i := slices.Index(t.exited, in.prev); i >= 0 {
		t.exited = slices.Delete(t.exited, i, i+1)
	}
	in.prev = nil
}

// kill condemns a VM. The instance is nil when there is nothing to wait for.
func (t *table) kill(now int64, vm string) (*instance, Outcome, *Error) {
	t.observe(now)
	in := t.vms[vm]
	if in == nil || in.rec.State == StateExited {
		if pid, ok := t.strangers[vm]; ok {
			return nil, "", refuse(CodeStranger, "process %d of an earlier guard cannot be killed", pid)
		}
		if in == nil {
			return nil, OutcomeUnknown, nil
		}
		return nil, OutcomeExited, nil
	}
	t.condemn(in, ReasonKill)
	return in, OutcomeKilled, nil
}

// protect changes the protection of a running VM. See doc.go for the reason why
// a lapsed session leaves the VM as it is.
func (t *table) protect(now int64, vm string, on bool) *Error {
	t.observe(now)
	in := t.vms[vm]
	if in == nil {
		return refuse(CodeNotRunning, "vm %s is unknown", vm)
	}
	if in.rec.State != StateRunning {
		return refuse(CodeNotRunning, "vm %s is %s", vm, in.rec.State)
	}
	if on && t.lapsed {
		return refuse(CodeLapsed, "session %d has lapsed", t.session)
	}
	in.rec.Protected = on
	return nil
}

// exit records the end of a process and returns a copy of the final record.
func (t *table) exit(now int64, in *instance, exitCode, signal int) Record {
	if in.rec.Reason == "" {
		in.rec.Reason = ReasonExited
	}
	in.rec.State = StateExited
	in.rec.ExitCode, in.rec.Signal, in.rec.ExitedNS = exitCode, signal, now
	in.proc = nil
	t.live--
	t.exited = append(t.exited, in)
	if len(t.exited) > MaxExited {
		t.drop(t.exited[0])
	}
	close(in.done)
	return in.rec
}

// drop removes an exited instance from the kept records.
func (t *table) drop(in *instance) {
	if t.vms[in.rec.VM] == in {
		delete(t.vms, in.rec.VM)
	} else if cur := t.vms[in.rec.VM]; cur != nil && cur.prev == in {
		cur.prev = nil
	}
	if i := slices.Index(t.exited, in); i >= 0 {
		t.exited = slices.Delete(t.exited, i, i+1)
	}
}

// forget removes the record of an exited VM; an unknown one is no error.
func (t *table) forget(vm string) *Error {
	in := t.vms[vm]
	if in == nil {
		return nil
	}
	if in.rec.State != StateExited {
		return refuse(CodeBusy, "vm %s is %s", vm, in.rec.State)
	}
	t.drop(in)
	return nil
}

// list returns copies of all records, sorted by VM id. What an earlier guard
// left and nobody can kill is listed as being killed: it is there, and whoever
// asks must not take its VM for stopped.
func (t *table) list() []Record {
	recs := make([]Record, 0, len(t.vms)+len(t.strangers))
	for _, in := range t.vms {
		recs = append(recs, in.rec)
	}
	for vm, pid := range t.strangers {
		if _, ours := t.vms[vm]; vm != "" && !ours {
			recs = append(recs, Record{VM: vm, PID: pid, State: StateKilling, Reason: ReasonKill})
		}
	}
	slices.SortFunc(recs, func(a, b Record) int { return cmp.Compare(a.VM, b.VM) })
	return recs
}

// stop refuses when VMs are present and otherwise lets nothing start any more.
func (t *table) stop() *Error {
	if t.live > 0 {
		return refuse(CodeBusy, "%d VMs are present", t.live)
	}
	t.stopping = true
	return nil
}

// beginStopping lets nothing start any more and returns the running instances,
// which get a polite SIGTERM.
func (t *table) beginStopping() []*instance {
	t.stopping = true
	var polite []*instance
	for _, in := range t.vms {
		if in.rec.State == StateRunning {
			in.rec.Reason = ReasonStopping
			polite = append(polite, in)
		}
	}
	return polite
}

// condemnAll ends the politeness of beginStopping.
func (t *table) condemnAll() {
	for _, in := range t.vms {
		if in.rec.State != StateExited {
			t.condemn(in, ReasonStopping)
		}
	}
}

// condemned returns the forked instances that must be killed and reaped.
func (t *table) condemned() []*instance {
	var ins []*instance
	for _, in := range t.vms {
		if in.rec.State == StateKilling && in.proc != nil {
			ins = append(ins, in)
		}
	}
	return ins
}

// forked returns the instances that have a process to reap.
func (t *table) forked() []*instance {
	var ins []*instance
	for _, in := range t.vms {
		if in.proc != nil {
			ins = append(ins, in)
		}
	}
	return ins
}

// present counts the processes that have not been reaped, and the protected
// ones among them.
func (t *table) present() (all, protected int) {
	for _, in := range t.forked() {
		all++
		if in.rec.Protected {
			protected++
		}
	}
	return all, protected
}

// waiters returns a channel for each instance that has not exited, closed when
// it has.
func (t *table) waiters() []<-chan struct{} {
	var all []<-chan struct{}
	for _, in := range t.vms {
		if in.rec.State != StateExited {
			all = append(all, in.done)
		}
	}
	return all
}
