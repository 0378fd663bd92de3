// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/argv"
	"github.com/muster-vm/muster/hypervisor/qmp"
)

// arrive takes one step towards a QEMU that waits for the guest of another node.
// It never lets the guest run.
func (s *step) arrive(ctx context.Context, op *api.Operation, mark string) error {
	arr, err := s.arrivalOf(op)
	if err != nil {
		return err
	}
	if arr.Status.Phase == api.ArrivalFailed || op.Spec.Cancel {
		if s.proc == nil && mark == "" {
			return nil
		}
		return s.h.sweep(ctx, s.vm.Meta.ID, s.proc)
	}
	if why, out := s.h.lockedOut(s.v, &s.vm); out {
		return s.failArrival(ctx, arr, api.CodeRefused, why)
	}
	if s.in.unsure.Load() {
		if err := s.settleStart(ctx); err != nil {
			return err
		}
		s.result.After = attachRetry
		return nil
	}
	ours := mark == op.Spec.TaskID
	switch {
	case s.proc != nil && s.proc.State != ProcessExited && !ours:
		s.h.log.Warn("a VM runs here that is bound elsewhere; it is killed before its migration here", "vm", s.vm.Meta.ID, "pid", s.proc.PID)
		return s.h.sweep(ctx, s.vm.Meta.ID, s.proc)
	case s.proc == nil && arr.Status.Phase == api.ArrivalReady, s.proc != nil && s.proc.State == ProcessExited && ours:
		return s.failArrival(ctx, arr, api.CodeInternal, "QEMU ended there"+s.endOf())
	case s.proc == nil, s.proc.State == ProcessExited:
		return s.await(ctx, op, arr)
	case s.proc.State == ProcessKilling, s.proc.PID == 0:
		s.result.After = lookSoon
		return nil
	}
	return s.listen(ctx, op, arr)
}

// endOf says how the incoming QEMU ended.
func (s *step) endOf() string {
	if s.proc == nil {
		return ""
	}
	return " (" + howEnded(s.proc) + ")" + s.logTail()
}

// await starts QEMU without its guest. What it is made of is what runs at the
// source, not what the spec wishes for.
func (s *step) await(ctx context.Context, op *api.Operation, arr api.Arrival) error {
	session, revision, ok := s.h.cfg.Lease.Current()
	if !ok || s.v.Revision() < revision {
		s.result.After = lookSoon
		return nil
	}
	if op.Status.Machine == nil {
		return nil // the source's next word wakes this VM
	}
	if op.Spec.Migration.PostCopy && !op.Status.PostCopy {
		return s.failArrival(ctx, arr, api.CodeUnsupported, "the node that the vm leaves is of an older version, which does not know post-copy; upgrade it, or migrate without")
	}
	if s.vm.Status.Hardware == nil {
		return s.failArrival(ctx, arr, api.CodeRefused, "the source does not say what hardware the vm runs with")
	}
	m, hw, user, err := s.incoming(ctx, op)
	if err != nil {
		return s.failArrival(ctx, arr, api.CodeOf(err), err.Error())
	}
	if m == nil {
		s.result.After = max(s.result.After, lookSoon)
		return s.noteArrival(ctx, arr, s.vm.Status.Message)
	}
	args, err := argv.Build(*m)
	if err != nil {
		return s.failArrival(ctx, arr, api.CodeInternal, err.Error())
	}
	p := s.h.pathsOf(s.vm.Meta.ID)
	if err := errors.Join(s.prepare(p, user), s.writeKeys(m.Keys()), s.noteHardware(p, hw)); err != nil {
		return s.failArrival(ctx, arr, api.CodeInternal, err.Error())
	}
	if err := s.h.mark(s.vm.Meta.ID, op.Spec.TaskID); err != nil {
		return s.failArrival(ctx, arr, api.CodeInternal, err.Error())
	}
	return s.launch(ctx, StartRequest{
		VM: s.vm.Meta.ID, Epoch: arr.Spec.Epoch, Session: session, Protected: s.b.Spec.Protected,
		Argv: args, Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, Dir: p.dir, LogPath: p.qemuLog, User: user,
	})
}

// incoming collects the machine that takes the guest as it is, and gives its user
// what it needs. It is nil while something is missing, which the status (of this
// step only) says; an error is for good.
func (s *step) incoming(ctx context.Context, op *api.Operation) (m *argv.Machine, hw *api.VMSpec, user *ProcessUser, err error) {
	was := op.Status.Machine
	hw = s.vm.Status.Hardware.PowerOn()
	hw.Boot = s.vm.Status.Hardware.Boot // also if it has none: it began without
	s.vm.Spec = s.vm.Spec.WithHardware(hw)
	s.keepSeed(was)
	user, ok := s.user()
	if !ok || !s.makeRoom() {
		return nil, nil, nil, nil
	}
	if err := s.makeCopies(ctx, op); err != nil {
		return nil, nil, nil, err
	}
	built, ok := s.machine(hw)
	if !ok || !s.board(&built) || !s.grant(ctx, user) || !s.plug(ctx, &built) {
		return nil, nil, nil, nil
	}
	if was.Accelerator != "" && built.Accelerator != was.Accelerator {
		return nil, nil, nil, api.Errorf(api.CodeRefused, "the vm runs with %s, this node has %s", was.Accelerator, built.Accelerator)
	}
	if was.CPU != "" {
		built.CPU = was.CPU // the baseline of the cluster may be another one by now
	}
	noteCards(hw, &built)
	built.Incoming, built.Version = true, was.Type
	return &built, hw, user, nil
}

// listen makes the new QEMU wait for the memory and says so.
func (s *step) listen(ctx context.Context, op *api.Operation, arr api.Arrival) error {
	s.meet()
	if err := s.h.attach(ctx, s.in); err != nil {
		s.h.procs.invalidate()
		s.result.After = lookSoon
		return nil
	}
	if arr.Status.Phase == api.ArrivalReady {
		return nil
	}
	m, err := s.in.queryMigrate(ctx)
	if err != nil {
		return err
	}
	if m.Status == migNone && len(m.Sockets) == 0 {
		// The socket of the memory comes last: where that is, the rest is, too.
		caps := []string{"events", capLateActivate}
		if op.Status.PostCopy {
			caps = append(caps, capPostCopy)
		}
		err := s.in.withChannels(ctx, op.Status.Channels, caps...)
		if err == nil {
			err = s.export(ctx, op)
		}
		if err == nil {
			err = s.in.execute(ctx, "migrate-incoming", map[string]any{"uri": "unix:" + s.h.pathsOf(s.vm.Meta.ID).in}, nil)
		}
		var refused *qmp.CommandError
		if errors.As(err, &refused) {
			return s.failArrival(ctx, arr, api.CodeRefused, "QEMU refuses to receive: "+refused.Error())
		}
		if err != nil {
			return err
		}
	}
	return s.writeArrival(ctx, arr, func(st *api.ArrivalStatus) {
		st.Phase, st.Message, st.Code, st.Channels, st.PostCopy = api.ArrivalReady, "", "", op.Status.Channels, op.Status.PostCopy
	})
}

// noteArrival says what the target waits for.
func (s *step) noteArrival(ctx context.Context, arr api.Arrival, message string) error {
	return s.writeArrival(ctx, arr, func(st *api.ArrivalStatus) { st.Message = message })
}

// failArrival ends the part of this node: first the process, then the word.
func (s *step) failArrival(ctx context.Context, arr api.Arrival, code api.Code, message string) error {
	id := s.vm.Meta.ID
	if err := s.h.kill(ctx, id); err != nil {
		return err
	}
	s.in.unsure.Store(false)
	s.h.notStarting(id)
	s.h.log.Warn("the VM cannot arrive here", "vm", id, "reason", message)
	err := s.writeArrival(ctx, arr, func(st *api.ArrivalStatus) { st.Phase, st.Code, st.Message = api.ArrivalFailed, code, message })
	s.result.After = lookSoon
	return err
}

func (s *step) writeArrival(ctx context.Context, arr api.Arrival, f func(*api.ArrivalStatus)) error {
	tx := &configdb.Txn{Actor: actor}
	next := arr
	f(&next.Status)
	if err := configdb.Arrivals.UpdateStatus(s.v, tx, &next); err != nil || tx.Empty() {
		return err
	}
	wctx, cancel := context.WithTimeout(ctx, WriteDeadline)
	defer cancel()
	_, err := s.h.cfg.DB.Txn(wctx, tx)
	return err
}

// arrived handles a VM that is bound here and was brought by a migration whose
// mark is still there: its guest has not run here yet. done is false when it may
// be treated like any other.
func (s *step) arrived(ctx context.Context, mark string) (done bool, err error) {
	id := s.vm.Meta.ID
	op := liveMigration(s.v, id)
	if op != nil && (op.Spec.TaskID != mark || !gaveAway(op, &s.b)) {
		op = nil // of another time
	}
	// Bound here by ha, or by a start: what was loaded may be older than the disk.
	brought := s.b.Spec.BroughtBy == mark
	alive := s.proc != nil && s.proc.State != ProcessExited
	switch {
	case alive && (s.proc.State == ProcessKilling || s.proc.PID == 0):
		s.result.After = lookSoon
		return true, nil
	case alive && brought && s.proc.Epoch == s.b.Spec.Epoch:
		return s.takeOver(ctx, op)
	case op != nil:
		return true, s.lostArrival(ctx, op, "QEMU ended there"+s.endOf())
	}
	// The migration is over, and what it brought is gone or of another epoch: the
	// VM starts anew.
	s.in.detach()
	s.result.After = attachRetry
	return true, s.h.sweep(ctx, id, s.proc)
}

// lostArrival says, once, that the guest will not run here. Until the source has
// taken it back or the operation is gone, nothing is started.
func (s *step) lostArrival(ctx context.Context, op *api.Operation, why string) error {
	arr, err := s.arrivalOf(op)
	if err != nil {
		return err
	}
	s.result.After = waitLook
	if arr.Status.Phase == api.ArrivalFailed {
		return nil
	}
	return s.failArrival(ctx, arr, api.CodeInternal, why)
}

// takeOver lets the guest run here, for the first time.
func (s *step) takeOver(ctx context.Context, op *api.Operation) (done bool, err error) {
	id := s.vm.Meta.ID
	_, revision, ok := s.h.cfg.Lease.Current()
	if !ok || s.v.Revision() < revision {
		s.result.After = lookSoon
		return true, nil
	}
	if why, out := s.h.lockedOut(s.v, &s.vm); out && op != nil {
		return true, s.lostArrival(ctx, op, why)
	}
	s.meet()
	if err := s.h.attach(ctx, s.in); err != nil {
		return true, s.unreachable(ctx, err)
	}
	switch ready, err := s.hasEnough(ctx, op); {
	case err == nil && !ready:
		return true, nil
	case err != nil:
		if op != nil {
			return true, s.lostArrival(ctx, op, err.Error())
		}
		var not *notLoadedError
		if !errors.As(err, &not) { // nobody has another copy of the guest: wait for an answer
			return true, s.unreachable(ctx, err)
		}
		s.result.After = attachRetry
		return true, s.h.sweep(ctx, id, s.proc)
	}
	if s.b.Spec.Protected && !s.proc.Protected { // it was not when this QEMU was started
		if err := s.guardProtect(ctx, true); err != nil {
			return true, err
		}
	}
	// From here on the word that it never ran here is not given any more.
	if err := s.h.unmark(id); err != nil {
		return true, err
	}
	// There is none unless disks were copied; it would keep them from others.
	if err := s.in.command(ctx, "nbd-server-stop", nil); err != nil && !refusal(err) {
		return true, err
	}
	if s.vm.Spec.Power == api.PowerRunning {
		if err := s.in.command(ctx, "cont", nil); err != nil {
			return true, s.refusedToRun(ctx, op, err)
		}
	}
	s.h.log.Info("VM taken over", "vm", id, "pid", s.proc.PID, "epoch", s.b.Spec.Epoch)
	s.h.announce(s.in, s.vm)
	return false, nil
}

// refusedToRun handles a refusal of cont. If the guest certainly has not run, the
// mark is set again and the VM given back.
func (s *step) refusedToRun(ctx context.Context, op *api.Operation, err error) error {
	var refused *qmp.CommandError
	if !errors.As(err, &refused) || op == nil {
		return err
	}
	if state, serr := s.in.runState(ctx); serr != nil || state != runPaused {
		return err
	}
	if merr := s.h.mark(s.vm.Meta.ID, op.Spec.TaskID); merr != nil {
		return errors.Join(err, merr)
	}
	return s.lostArrival(ctx, op, "QEMU refuses to run the guest there: "+refused.Error())
}

// notLoadedError is QEMU's own word that it has not got all of the guest.
type notLoadedError struct{ state string }

func (e *notLoadedError) Error() string { return "its QEMU says " + e.state }

// hasGuest reports whether QEMU has all of the guest; the error says why not.
func (in *instance) hasGuest(ctx context.Context) error {
	m, err := in.queryMigrate(ctx)
	if err != nil {
		return err
	}
	if m.Status != migCompleted {
		return &notLoadedError{m.Status}
	}
	state, err := in.runState(ctx)
	if err != nil {
		return err
	}
	if state == runInMigrate {
		return &notLoadedError{state}
	}
	return nil
}

// announce tells the network where the guest is now. It may take a while, and
// nothing depends on it.
func (h *Hypervisor) announce(in *instance, vm api.VM) {
	if len(vm.Spec.NICs) == 0 {
		return
	}
	vm = vm.Clone()
	if hw := vm.Status.Hardware; hw != nil {
		vm.Spec = vm.Spec.WithHardware(hw)
	}
	h.spawn(func(ctx context.Context) {
		err := in.execute(ctx, "announce-self", map[string]any{"initial": 50, "max": 550, "rounds": 5, "step": 100}, nil)
		for i := range vm.Spec.NICs {
			if h.cfg.Ports == nil {
				break
			}
			pctx, cancel := context.WithTimeout(ctx, PortDeadline)
			_, _, perr := h.cfg.Ports.Plug(pctx, vm, i)
			cancel()
			err = errors.Join(err, perr)
		}
		if err != nil && ctx.Err() == nil {
			h.log.Warn("the network was not told that a VM moved here", "vm", vm.Meta.ID, "err", err)
		}
	})
}
