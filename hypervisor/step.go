// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/reconcile"
)

// The conditions of a VM that this module reports. Each is present only while
// it is not OK.
const (
	ConditionStopTimedOut    = "StopTimedOut"
	ConditionQMPUnresponsive = "QMPUnresponsive"
	ConditionGuestPanicked   = "GuestPanicked"
	ConditionIOError         = "IOError"
	ConditionGuestHalted     = "GuestHalted"
	ConditionProtection      = "Protection"
)

const actor = "hypervisor"

// step is one look at one VM that is bound to this node: what was read, and the
// status to be written. vm and b are this step's own copies.
type step struct {
	h     *Hypervisor
	v     *configdb.View
	vm    api.VM
	b     api.Binding
	procs map[string]Process // of the guard, not to be changed
	proc  *Process           // nil: none, and no record of one
	in    *instance
	now   time.Time

	copies   map[string]copiedFile // of an arriving VM, in place of its volumes
	problems []api.Condition
	result   reconcile.Result
	silent   bool // write no status this time
	settling bool // an operation waits until the hardware is known
	// startFailed: a start of this step cannot work, or one that was begun did not.
	startFailed bool
}

// reconcile takes one step towards the wish for one VM.
func (h *Hypervisor) reconcile(ctx context.Context, id string) (reconcile.Result, error) {
	procs, err := h.procs.get(ctx)
	if err != nil {
		return reconcile.Result{}, err
	}
	v := h.cfg.DB.Local()
	var proc *Process
	if p, ok := procs[id]; ok {
		proc = &p
	}
	caughtUp := h.catchUp(v)
	vm, err := configdb.VMs.Get(v, id)
	if api.CodeOf(err) == api.CodeNotFound {
		return h.unknown(ctx, id, proc, caughtUp)
	}
	if err != nil {
		return reconcile.Result{}, err
	}
	b, err := configdb.Bindings.Get(v, id)
	missing := api.CodeOf(err) == api.CodeNotFound
	if err != nil && !missing {
		return reconcile.Result{}, err
	}
	if missing {
		return h.foreign(ctx, id, proc, b, missing, caughtUp)
	}
	s := &step{h: h, v: v, vm: vm, b: b, proc: proc, procs: procs, in: h.instance(id), now: h.cfg.Now()}
	if b.Spec.NodeID != h.cfg.NodeID {
		if done, err := s.passing(ctx, caughtUp); done || err != nil {
			return s.result, err
		}
		return h.foreign(ctx, id, proc, b, missing, caughtUp)
	}
	if s.in.generation != vm.Meta.Generation { // a new wish is tried at once
		s.in.generation, s.in.failures, s.in.notBefore = vm.Meta.Generation, 0, time.Time{}
	}
	if err := s.act(ctx, caughtUp); err != nil {
		return reconcile.Result{}, err
	}
	return s.result, s.write(ctx)
}

// catchUp reports whether this node once held a lease on a view that contains
// the lease's revision; from then on the view is never older than that.
func (h *Hypervisor) catchUp(v *configdb.View) bool {
	session, rev, ok := h.cfg.Lease.Current()
	h.mu.Lock()
	defer h.mu.Unlock()
	if ok {
		h.noteLease(session)
	}
	if ok && v.Revision() >= rev && h.caughtUpAt == 0 {
		h.caughtUpAt = v.Revision()
	}
	return h.caughtUpAt != 0
}

// unknown handles a process whose VM is not in the database: it is reported.
func (h *Hypervisor) unknown(ctx context.Context, id string, proc *Process, caughtUp bool) (reconcile.Result, error) {
	if proc != nil && !caughtUp {
		return reconcile.Result{After: lookSoon}, nil
	}
	if proc != nil && proc.State != ProcessExited && h.handedOut(id) {
		h.log.Info("the copy of a VM that was handed over and deleted is ended", "vm", id, "pid", proc.PID)
		return reconcile.Result{After: attachRetry}, h.kill(ctx, id)
	}
	h.drop(id)
	if mark, err := h.marked(id); mark != "" || err != nil {
		if err == nil {
			err = h.sweep(ctx, id, proc)
		}
		return reconcile.Result{}, err
	}
	if proc == nil || proc.State == ProcessExited {
		if err := h.endTPM(ctx, id); proc == nil || err != nil {
			return reconcile.Result{}, err
		}
		return reconcile.Result{}, h.forget(ctx, id)
	}
	h.mu.Lock()
	_, known := h.strangers[id]
	h.strangers[id] = *proc
	h.mu.Unlock()
	if !known {
		h.log.Warn("a QEMU runs whose VM is not in the database; it is left alone", "vm", id, "pid", proc.PID)
		h.factsChanged()
	}
	return reconcile.Result{}, nil
}

// foreign handles a VM that is bound to another node, or to none.
func (h *Hypervisor) foreign(ctx context.Context, id string, proc *Process, b api.Binding, missing, caughtUp bool) (reconcile.Result, error) {
	switch {
	case proc == nil:
		h.drop(id)
		return reconcile.Result{}, h.endTPM(ctx, id)
	case missing && !caughtUp, !missing && proc.Epoch > b.Spec.Epoch:
		// The view is older than the process. Looking again is all there is to do.
		return reconcile.Result{After: lookSoon}, nil
	case proc.State == ProcessExited:
		h.drop(id)
		h.unplug(ctx, id)
		return reconcile.Result{}, errors.Join(h.endTPM(ctx, id), h.forget(ctx, id))
	}
	h.log.Warn("a VM runs here that is bound elsewhere; it is killed", "vm", id, "pid", proc.PID, "epoch", proc.Epoch, "owner", b.Spec.Node, "ownerEpoch", b.Spec.Epoch)
	if err := h.kill(ctx, id); err != nil {
		return reconcile.Result{}, err
	}
	return reconcile.Result{After: attachRetry}, nil
}

func (h *Hypervisor) kill(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, KillDeadline)
	defer cancel()
	defer h.procs.invalidate()
	return h.cfg.Guard.Kill(ctx, id)
}

func (h *Hypervisor) forget(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, GuardDeadline)
	defer cancel()
	defer h.procs.invalidate()
	return h.cfg.Guard.Forget(ctx, id)
}

// act carries out one step for a VM that is bound here.
func (s *step) act(ctx context.Context, caughtUp bool) error {
	if !caughtUp {
		return s.watchOnly(ctx)
	}
	if s.in.unsure.Load() {
		if err := s.settleStart(ctx); err != nil {
			return err
		}
	}
	if done, err := s.moving(ctx); done || err != nil {
		s.silent = true
		return err
	}
	s.vm.Status.ObservedGeneration = s.vm.Meta.Generation
	s.vm.Status.Node, s.vm.Status.Epoch = s.b.Spec.Node, s.b.Spec.Epoch
	switch {
	case s.vm.Meta.Deleting():
		return s.remove(ctx)
	case s.proc != nil && s.proc.State == ProcessExited:
		return s.exited(ctx)
	case s.proc != nil && (s.proc.State == ProcessKilling || s.proc.PID == 0): // dying, or being forked
		s.silent = true
		s.result.After = lookSoon
		return nil
	}
	if done, err := s.endOld(ctx); done || err != nil {
		return err
	}
	if held, err := s.held(ctx); held || err != nil {
		return err
	}
	if s.proc == nil {
		s.in.detach()
		return s.down(ctx)
	}
	if done, err := s.drilled(ctx); done || err != nil {
		return err
	}
	return s.up(ctx)
}

// endOld ends a process of an earlier binding. The VM has been elsewhere since, where
// its guest may have run: a node that is locked out of the disks, and not lost, keeps
// the old process for a while.
func (s *step) endOld(ctx context.Context) (done bool, err error) {
	if s.proc == nil || s.proc.Epoch >= s.b.Spec.Epoch || s.b.Spec.LetsGoOn(s.proc.Epoch) {
		return false, nil
	}
	s.h.log.Warn("a QEMU of an earlier binding is ended", "vm", s.vm.Meta.ID, "pid", s.proc.PID, "epoch", s.proc.Epoch, "bound", s.b.Spec.Epoch)
	s.silent = true
	s.result.After = attachRetry
	return true, s.h.kill(ctx, s.vm.Meta.ID)
}

// watchOnly adopts without touching, as long as the view may be old.
func (s *step) watchOnly(ctx context.Context) error {
	s.silent = true
	s.result.After = lookSoon
	if s.proc == nil || s.proc.State != ProcessRunning || s.proc.PID == 0 {
		return nil
	}
	s.meet()
	if s.now.Before(s.in.quietUntil) {
		return nil
	}
	if err := s.h.attach(ctx, s.in); err != nil {
		s.in.quietUntil = s.now.Add(QuietTime)
	}
	return nil
}

// meet takes note of a process that was not seen before.
func (s *step) meet() {
	s.in.isOf(s.proc.PID, s.proc.UID)
	s.in.rooted.Store(s.h.users.on() && s.proc.UID == 0)
	s.h.users.note(s.vm.Meta.ID, s.proc.UID)
	if s.in.pid != s.proc.PID {
		s.in.begin(s.proc.PID, s.now)
		s.h.log.Info("running QEMU adopted", "vm", s.vm.Meta.ID, "pid", s.proc.PID)
	}
}

// report sets phase and message of the status.
func (s *step) report(phase api.VMPhase, message string) {
	s.vm.Status.Phase, s.vm.Status.Message = phase, message
}

// problem adds a condition that is not OK.
func (s *step) problem(typ, message string) {
	s.problems = append(s.problems, api.Condition{Type: typ, Reason: typ, Message: message})
}

// ended clears what the status says of a process.
func (s *step) ended() {
	s.in.rooted.Store(false)
	s.unlimit()
	s.vm.Status.PID, s.vm.Status.StartedAt, s.vm.Status.Accelerator, s.vm.Status.Hardware = 0, nil, "", nil
	s.vm.Status.CPU = ""
	s.vm.Status.Memory = nil
	s.vm.Status.Agent = nil
	s.vm.Status.StorageGuard = false
}

// conditions keeps the times of those that were there before.
func (s *step) conditions() {
	s.recall()
	var out []api.Condition
	for _, c := range s.problems {
		if old, ok := api.FindCondition(s.vm.Status.Conditions, c.Type); ok {
			out = append(out, old)
		}
		out = api.SetCondition(out, c, s.now)
	}
	s.vm.Status.Conditions = out
}

// write commits the status if it changed.
func (s *step) write(ctx context.Context) error {
	if s.silent {
		return nil
	}
	tx := &configdb.Txn{Actor: actor}
	s.conditions()
	s.noteTries()
	if err := configdb.VMs.UpdateStatus(s.v, tx, &s.vm); err != nil {
		return err
	}
	if err := s.detached(tx); err != nil {
		return err
	}
	err := s.commit(ctx, tx)
	if err != nil {
		s.in.verified = false // what the status says of the hardware is older
	}
	return err
}

// commit writes under the condition that the VM is still bound here.
func (s *step) commit(ctx context.Context, tx *configdb.Txn) error {
	if tx.Empty() {
		return nil
	}
	tx.RequireRevision(configdb.Bindings.SpecKey(s.vm.Meta.ID), s.b.Meta.Revision)
	ctx, cancel := context.WithTimeout(ctx, WriteDeadline)
	defer cancel()
	_, err := s.h.cfg.DB.Txn(ctx, tx)
	return err
}

// protect makes the binding's promises and the guard agree with the wish: the guard
// kills a protected VM when the lease runs out, unless the binding says that its
// disks can be locked away instead; see ha/DESIGN.md. running says whether there is
// a process.
func (s *step) protect(ctx context.Context, running bool) error {
	want := s.vm.Spec.HA == api.HARestart
	pools := s.guarding(want && running)
	spared := len(pools) > 0 && slices.Equal(pools, s.b.Spec.Guarding())
	if running && !s.proc.Protected && (want || s.b.Spec.Protected) && !spared {
		if err := s.guardProtect(ctx, true); err != nil {
			_, _, lease := s.h.cfg.Lease.Current()
			if s.b.Spec.Protected && !lease && len(s.b.Spec.Guarding()) == 0 {
				// The leader may count on the guard's kill. Less running is safe.
				s.h.log.Error("a VM that must be protected is not, and the lease is gone; it is killed", "vm", s.vm.Meta.ID, "err", err)
				return errors.Join(err, s.h.kill(ctx, s.vm.Meta.ID))
			}
			return err
		}
	}
	frees := running && s.proc.Protected && (!want || len(pools) > 0)
	if frees || s.b.Spec.Protected != want || !slices.Equal(pools, s.b.Spec.Guarding()) {
		if err := s.promise(ctx, want, pools); err != nil {
			return err
		}
	}
	if frees {
		return s.guardProtect(ctx, false)
	}
	return nil
}

// promise commits what the guard, or the pools, keep. It writes also what is there
// already: another promise of this node, of which nobody knows what became, cannot
// land after it.
func (s *step) promise(ctx context.Context, protected bool, pools []string) error {
	tx := &configdb.Txn{Actor: actor}
	key, was := configdb.Bindings.SpecKey(s.vm.Meta.ID), s.b.Meta.Revision
	s.b.Spec.Protected, s.b.Spec.StorageGuard = protected, nil
	if len(pools) > 0 {
		s.b.Spec.StorageGuard = &api.StorageGuard{Epoch: s.b.Spec.Epoch, Pools: pools}
	}
	if err := configdb.Bindings.UpdateSpec(s.v, tx, &s.b); err != nil {
		return err
	}
	if tx.Empty() {
		stored, _ := s.v.Get(key)
		tx.RequireRevision(key, was)
		tx.Put(key, stored.Value)
	}
	// UpdateSpec requires the binding's revision itself.
	wctx, cancel := context.WithTimeout(ctx, WriteDeadline)
	defer cancel()
	rev, err := s.h.cfg.DB.Txn(wctx, tx)
	if err != nil {
		s.in.promised = was
		return err
	}
	s.b.Meta.Revision = rev
	return nil
}

// settlePromise is for a process that is about to be started under what the binding
// promises: a promise of before, of which nobody knows what became, must not land on
// it. Such a one needs the binding as it was then. This daemon remembers its own; the
// one before knew nothing that was committed after this one had its first lease.
func (s *step) settlePromise(ctx context.Context) error {
	s.h.mu.Lock()
	caughtUpAt := s.h.caughtUpAt
	s.h.mu.Unlock()
	if s.b.Meta.Revision > max(caughtUpAt, s.in.promised) {
		return nil
	}
	return s.promise(ctx, s.b.Spec.Protected, s.b.Spec.Guarding())
}

func (s *step) guardProtect(ctx context.Context, on bool) error {
	ctx, cancel := context.WithTimeout(ctx, GuardDeadline)
	defer cancel()
	defer s.h.procs.invalidate()
	if p, ok := s.h.procs.tpm(s.vm.Meta.ID); ok && p.State == ProcessRunning && p.Protected != on {
		if err := s.h.cfg.Guard.Protect(ctx, tpmPrefix+s.vm.Meta.ID, on); err != nil {
			return err
		}
	}
	if err := s.h.cfg.Guard.Protect(ctx, s.vm.Meta.ID, on); err != nil {
		return err
	}
	s.proc.Protected = on
	return nil
}
