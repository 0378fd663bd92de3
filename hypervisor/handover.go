// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"fmt"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// giveAway hands the VM over to the target, which has all of it. Until the
// transaction is committed the guest may go on here, after that only there.
func (s *step) giveAway(ctx context.Context, op *api.Operation, out *departure, arr api.Arrival, state string) error {
	s.result.After = switchLook
	if state == runFinishMigrate { // it was asked before
		var err error
		if state, err = s.in.runState(ctx); err != nil || state == runFinishMigrate {
			return err
		}
	}
	if state != runPostMigrate {
		return s.endOperation(ctx, op, api.TaskFailed, api.CodeInternal, "the guest went on here; it was not handed over")
	}
	if out.completedAt.IsZero() {
		out.completedAt = s.now
	}
	if out.reason == "" && s.now.Sub(out.completedAt) > LoadTime && !out.loaded {
		out.phase, out.code, out.reason = api.TaskFailed, api.CodeTimeout, fmt.Sprintf("node %s did not say within %v that it has the guest", op.Spec.Migration.Node, LoadTime)
	}
	_, _, lease := s.h.cfg.Lease.Current()
	switch {
	case out.reason != "":
		return s.endOperation(ctx, op, out.phase, out.code, out.reason)
	case !lease && out.started && !out.committing:
		// No commit of this migration is under way, nor will one be: the guest
		// need not wait for the database.
		out.phase, out.code, out.reason = api.TaskFailed, api.CodeInternal, "this node lost its lease meanwhile"
		return s.resumeUnsent(ctx)
	case !lease:
		s.result.After = lookSoon
		return nil
	}
	if !out.loaded {
		if err := s.h.askLoaded(ctx, s.vm.Meta.ID, op); err != nil {
			s.h.log.Info("the target does not say that it has the guest", "vm", s.vm.Meta.ID, "err", err)
			s.result.After = lookSoon
			return nil
		}
		out.loaded = true
	}
	_, err := s.commitHandOver(ctx, op, out, arr)
	return err
}

func (s *step) resumeUnsent(ctx context.Context) error {
	if s.vm.Spec.Power == api.PowerPaused {
		return nil
	}
	return s.in.command(ctx, "cont", nil)
}

// handedOut reports that this life of the daemon tried to hand a VM over.
func (h *Hypervisor) handedOut(id string) bool {
	h.mu.Lock()
	in := h.instances[id]
	h.mu.Unlock()
	if in == nil {
		return false
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.out != nil && in.out.committing
}

// commitHandOver is the one transaction that makes the target the owner.
func (s *step) commitHandOver(ctx context.Context, op *api.Operation, out *departure, arr api.Arrival) (committed bool, err error) {
	tx, err := s.handOverTxn(op, arr)
	if err != nil {
		return false, err
	}
	s.in.mu.Lock()
	out.committing = true
	s.in.mu.Unlock()
	wctx, cancel := context.WithTimeout(ctx, WriteDeadline)
	defer cancel()
	rev, err := s.h.cfg.DB.Txn(wctx, tx)
	if err != nil {
		// Whatever the outcome: the next look sees the binding, or tries again. Only
		// the operation's end, which excludes this commit, lets the guest go on.
		s.h.log.Warn("the hand-over is not committed yet", "vm", s.vm.Meta.ID, "err", err)
		s.result.After = switchLook
		return false, nil
	}
	s.h.log.Info("VM handed over", "vm", s.vm.Meta.ID, "to", op.Spec.Migration.Node, "epoch", op.Spec.Epoch+1, "rev", rev)
	s.silent = true
	s.result.After = attachRetry
	return true, nil
}

func (s *step) handOverTxn(op *api.Operation, arr api.Arrival) (*configdb.Txn, error) {
	id, to := s.vm.Meta.ID, op.Spec.Migration
	tx := &configdb.Txn{Actor: actor}
	tx.RequireRevision(configdb.Operations.SpecKey(id), op.Meta.Revision)
	tx.RequireRevision(configdb.Operations.StatusKey(id), op.Meta.StatusRevision)
	tx.RequireRevision(configdb.Arrivals.StatusKey(id), arr.Meta.StatusRevision)
	node, err := configdb.Nodes.Get(s.v, to.NodeID)
	if err != nil {
		return nil, err
	}
	tx.RequireRevision(configdb.Nodes.SpecKey(to.NodeID), node.Meta.Revision)
	tx.RequireRevision(configdb.Nodes.StatusKey(to.NodeID), node.Meta.StatusRevision)
	tx.RequireRevision(configdb.LaterLifeKey(to.NodeID), 0)
	b := s.b.Clone()
	b.Meta.Revision = s.b.Meta.Revision
	b.Spec.NodeID, b.Spec.Node, b.Spec.Epoch, b.Spec.Resumes = to.NodeID, to.Node, op.Spec.Epoch+1, nil
	b.Spec.BroughtBy = op.Spec.TaskID
	if err := configdb.Bindings.UpdateSpec(s.v, tx, &b); err != nil {
		return nil, err
	}
	for _, volume := range to.Volumes {
		if err := s.moveVolume(tx, volume, to.Node); err != nil {
			return nil, err
		}
	}
	vm, err := configdb.VMs.Get(s.v, id) // the stored status, not the one of this step
	if err != nil {
		return nil, err
	}
	vm.Status.Node, vm.Status.Epoch, vm.Status.PID, vm.Status.StartedAt = to.Node, b.Spec.Epoch, 0, nil
	vm.Status.Message, vm.Status.Conditions = "", nil
	return tx, configdb.VMs.UpdateStatus(s.v, tx, &vm)
}

// moveVolume says on which node a copied volume's file counts.
func (s *step) moveVolume(tx *configdb.Txn, id, node string) error {
	vol, err := configdb.Volumes.Get(s.v, id)
	if err != nil {
		return err
	}
	vol.Spec.Node = node
	return configdb.Volumes.UpdateSpec(s.v, tx, &vol)
}

// handedOver handles a VM that was given away by its migration, until the
// target has said what became of it.
func (s *step) handedOver(ctx context.Context, op *api.Operation) error {
	out := s.departure(op)
	if out.handedAt.IsZero() {
		out.handedAt = s.now
	}
	arr, err := s.arrivalOf(op)
	if err != nil {
		return err
	}
	if op.Status.PostCopying {
		if done, err := s.follow(ctx, op, out, &arr); done || err != nil {
			return err
		}
	}
	alive := s.proc != nil && s.proc.State == ProcessRunning && s.proc.PID != 0
	_, lockedOut := s.h.lockedOut(s.v, &s.vm)
	switch {
	case s.vm.Status.Epoch == s.b.Spec.Epoch && s.vm.Status.PID != 0:
		return s.arrivedThere(ctx, op, out)
	case s.vm.Status.Epoch == s.b.Spec.Epoch && s.vm.Status.Phase == api.VMStopped:
		// Forced off, or the guest switched itself off, before its first report there.
		if err := s.h.sweep(ctx, s.vm.Meta.ID, s.proc); err != nil {
			return err
		}
		return s.endOperation(ctx, op, api.TaskSucceeded, "", "it moved to node "+op.Spec.Migration.Node+" and was stopped there")
	case arr.Status.Phase == api.ArrivalFailed && alive && !lockedOut && s.standsStill(ctx):
		return s.takeBack(ctx, op, arr)
	case arr.Status.Phase == api.ArrivalFailed:
		if err := s.h.sweep(ctx, s.vm.Meta.ID, s.proc); err != nil {
			return err
		}
		return s.endOperation(ctx, op, api.TaskFailed, api.CodeInternal, fmt.Sprintf("node %s: %s; it starts anew there", op.Spec.Migration.Node, arr.Status.Message))
	case s.now.Sub(out.handedAt) > HandOverTime:
		if err := s.h.sweep(ctx, s.vm.Meta.ID, s.proc); err != nil {
			return err
		}
		return s.endOperation(ctx, op, api.TaskFailed, api.CodeTimeout, fmt.Sprintf("node %s has the vm, but has not said within %v that it runs", op.Spec.Migration.Node, HandOverTime))
	case alive && !s.standsStill(ctx):
		if ctx.Err() != nil { // the daemon ends: that says nothing about QEMU
			return context.Cause(ctx)
		}
		s.h.log.Error("a QEMU that was handed over is not known to stand still; it is killed", "vm", s.vm.Meta.ID, "pid", s.proc.PID)
		s.result.After = attachRetry
		return s.h.kill(ctx, s.vm.Meta.ID)
	}
	s.result.After = lookSoon
	return nil
}

// standsStill asks QEMU whether it has handed its guest over.
func (s *step) standsStill(ctx context.Context) bool {
	s.meet()
	if err := s.h.attach(ctx, s.in); err != nil {
		return false
	}
	state, err := s.in.runState(ctx)
	return err == nil && state == runPostMigrate
}

// arrivedThere ends the migration after the target's word that the guest runs.
func (s *step) arrivedThere(ctx context.Context, op *api.Operation, out *departure) error {
	message := "it runs on node " + op.Spec.Migration.Node
	if s.proc != nil && s.proc.State == ProcessRunning && s.in.openConn() != nil {
		if m, err := s.in.queryMigrate(ctx); err == nil && m.TotalTime > 0 {
			s.in.mu.Lock()
			out.info = m
			s.in.mu.Unlock()
		}
	}
	if m := out.info; m.TotalTime > 0 {
		message += fmt.Sprintf(" after %d ms", m.TotalTime)
	}
	if out.ranAt.IsZero() { // else it ran before the last of its memory had come
		out.ranAt = s.h.cfg.Now()
	}
	stood := out.stoodAt
	if !out.halted.IsZero() {
		stood = out.halted
	}
	if !stood.IsZero() {
		message += fmt.Sprintf(", of which the guest stood still for at most %d ms", out.ranAt.Sub(stood).Milliseconds())
	}
	if err := s.h.sweep(ctx, s.vm.Meta.ID, s.proc); err != nil {
		return err
	}
	return s.endOperation(ctx, op, api.TaskSucceeded, "", message)
}

// takeBack makes this node the owner again, on the target's word that the guest
// has never run there.
func (s *step) takeBack(ctx context.Context, op *api.Operation, arr api.Arrival) error {
	id := s.vm.Meta.ID
	if _, _, ok := s.h.cfg.Lease.Current(); !ok {
		s.result.After = lookSoon
		return nil
	}
	tx := &configdb.Txn{Actor: actor}
	tx.RequireRevision(configdb.Operations.SpecKey(id), op.Meta.Revision)
	tx.RequireRevision(configdb.Arrivals.StatusKey(id), arr.Meta.StatusRevision)
	b := s.b.Clone()
	b.Meta.Revision = s.b.Meta.Revision
	b.Spec.NodeID, b.Spec.Node, b.Spec.Epoch = s.h.cfg.NodeID, s.h.cfg.NodeName, s.b.Spec.Epoch+1
	b.Spec.Resumes = &api.Resumption{Process: s.proc.Epoch, Epoch: b.Spec.Epoch}
	if err := configdb.Bindings.UpdateSpec(s.v, tx, &b); err != nil {
		return err
	}
	for _, volume := range op.Spec.Migration.Volumes {
		if err := s.moveVolume(tx, volume, s.h.cfg.NodeName); err != nil {
			return err
		}
	}
	why := fmt.Sprintf("node %s: %s; the vm goes on on node %s", op.Spec.Migration.Node, arr.Status.Message, s.h.cfg.NodeName)
	over := op.Clone()
	over.Meta.Revision, over.Meta.StatusRevision = op.Meta.Revision, op.Meta.StatusRevision
	over.Status.Phase, over.Status.Code, over.Status.Message = api.TaskFailed, api.CodeInternal, why
	if err := configdb.Operations.UpdateStatus(s.v, tx, &over); err != nil {
		return err
	}
	vm := s.vm
	vm.Status.Node, vm.Status.Epoch, vm.Status.PID = s.h.cfg.NodeName, b.Spec.Epoch, 0
	if err := configdb.VMs.UpdateStatus(s.v, tx, &vm); err != nil {
		return err
	}
	wctx, cancel := context.WithTimeout(ctx, WriteDeadline)
	defer cancel()
	if _, err := s.h.cfg.DB.Txn(wctx, tx); err != nil {
		return fmt.Errorf("take vm %s back: %w", s.vm.Meta.Name, err)
	}
	s.h.log.Warn("the target could not run the VM; it is taken back", "vm", id, "epoch", b.Spec.Epoch, "reason", arr.Status.Message)
	s.endDeparture()
	s.result.After = attachRetry
	return nil
}

// askLoaded asks the target whether its QEMU has everything.
func (h *Hypervisor) askLoaded(ctx context.Context, id string, op *api.Operation) error {
	return h.ask(ctx, op, streamHello{VM: id, Purpose: purposeLoaded})
}

// ask opens a stream that is nothing but a question; no error is yes.
func (h *Hypervisor) ask(ctx context.Context, op *api.Operation, hello streamHello) error {
	ctx, cancel := context.WithTimeout(ctx, askDeadline)
	defer cancel()
	hello.Task = op.Spec.TaskID
	c, err := h.openStream(ctx, op.Spec.Migration.NodeID, hello)
	if err != nil {
		return err
	}
	return c.Close()
}
