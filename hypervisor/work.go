// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/contain"
)

// Times of operations.
const (
	// workAttempts is how often a transaction of an operation is computed on
	// fresh state.
	workAttempts = 20
	// writeRetry is the pause before a write that found no quorum is tried again.
	writeRetry = time.Second
	// undoDeadline bounds taking back what a failed operation has done.
	undoDeadline = 10 * time.Minute
)

// work is a long piece of work that goes on beside the looks at its VM, which
// leave the VM alone meanwhile.
type work struct {
	cancel context.CancelFunc
	done   chan struct{}
}

func (w *work) ended() bool {
	select {
	case <-w.done:
		return true
	default:
		return false
	}
}

// stopWork asks the work to end; it is not waited for.
func (in *instance) stopWork() {
	if in.work != nil {
		in.work.cancel()
	}
}

// begin starts work on the VM. What f did not get done is found in the database
// by the next look.
func (s *step) begin(f func(ctx context.Context)) {
	h, id := s.h, s.in.id
	ctx, cancel := context.WithCancel(context.Background())
	w := &work{cancel: cancel, done: make(chan struct{})}
	s.in.work = w
	h.spawn(func(run context.Context) {
		defer h.loop.Enqueue(id)
		defer close(w.done)
		defer cancel()
		defer context.AfterFunc(run, cancel)()
		if err := contain.Do(func() { f(ctx) }); err != nil {
			h.log.Error("work on a VM ended by a fault of the program", "vm", id, "err", err)
		}
	})
}

// held carries out what excludes all other work on the VM, and reports whether
// the rest of the look must leave the VM alone.
func (s *step) held(ctx context.Context) (bool, error) {
	forced := s.vm.Spec.Power == api.PowerStopped && s.vm.Spec.ForceStop && s.proc != nil
	if s.in.work != nil {
		if s.in.work.ended() {
			s.in.work = nil
			s.result.After = attachRetry // on a view that has what it wrote
		} else {
			s.result.After = waitLook
			if forced {
				return false, nil
			}
			if s.vm.Spec.Power == api.PowerSuspended {
				s.in.stopWork() // what loads is not wanted any more; what saved has committed
			}
		}
		s.silent = true
		return true, nil
	}
	st, savedErr := configdb.SavedStates.Get(s.v, s.vm.Meta.ID)
	if api.IgnoreNotFound(savedErr) != nil {
		return false, savedErr
	}
	if savedErr == nil && st.Spec.Discard && s.proc == nil {
		return s.saved(ctx, st) // before an operation that may want a new one
	}
	op, err := configdb.Operations.Get(s.v, s.vm.Meta.ID)
	if api.IgnoreNotFound(err) != nil {
		return false, err
	}
	if err == nil && !op.Status.Phase.Final() && op.Spec.NodeID == s.h.cfg.NodeID && op.Spec.Epoch == s.b.Spec.Epoch {
		if held, err := s.operate(ctx, op); held || err != nil {
			return held, err
		}
	}
	if err != nil {
		if held, err := s.dropTemporary(ctx); held || err != nil {
			return held, err
		}
	}
	if savedErr != nil {
		return false, nil
	}
	return s.saved(ctx, st)
}

// operate begins an operation of this file's kinds.
func (s *step) operate(ctx context.Context, op api.Operation) (bool, error) {
	live := s.proc != nil
	var refused error
	switch op.Spec.Action {
	case api.ActionVMRevert:
		snap, err := configdb.Snapshots.Get(s.v, op.Spec.SnapshotID)
		st, savedErr := configdb.SavedStates.Get(s.v, s.vm.Meta.ID)
		if savedErr == nil && st.Spec.SnapshotID == op.Spec.SnapshotID && err == nil && snap.Status.Phase == api.SnapshotReady {
			return false, nil // the disks are reverted, the memory is to be loaded
		}
		if live {
			return false, nil // it ends first: the wish says so
		}
	case api.ActionVMSnapshot, api.ActionVMForget, api.ActionVMSuspend:
		if live {
			s.meet()
			if !s.now.Before(s.in.quietUntil) {
				if err := s.h.attach(ctx, s.in); err != nil {
					return true, s.unreachable(ctx, err)
				}
			}
			if op.Status.Phase == api.TaskPending && op.Spec.Action != api.ActionVMForget {
				var ok bool
				if ok, refused = s.settle(&op); !ok {
					return false, nil
				}
			}
		}
	default:
		return false, nil
	}
	o := &operation{h: s.h, in: s.in, vm: s.vm, op: op, live: live, refused: refused, again: op.Status.Phase == api.TaskRunning}
	s.silent = true
	s.begin(o.run)
	return true, nil
}

// operation is one operation while it is worked on, with what was read when it
// began.
type operation struct {
	h    *Hypervisor
	in   *instance
	vm   api.VM
	op   api.Operation
	live bool // QEMU has the disks open
	// refused is why the VM as it is cannot be worked on.
	refused error
	again   bool // an earlier life of the daemon, or a lost write, interrupted it
}

// errTaken says that the operation is not this node's any more, or was ended.
var errTaken = errors.New("the operation was ended or given to another node meanwhile")

// run works until the operation has its last word, or until the context ends:
// then the next life goes on from what the database says.
func (o *operation) run(ctx context.Context) {
	var err error
	switch o.op.Spec.Action {
	case api.ActionVMSnapshot:
		err = o.snapshot(ctx)
	case api.ActionVMForget:
		err = o.forget(ctx)
	case api.ActionVMSuspend:
		err = o.suspend(ctx)
	case api.ActionVMRevert:
		err = o.revert(ctx)
	}
	if err != nil && ctx.Err() == nil {
		o.h.log.Warn("an operation on a VM failed", "vm", o.vm.Meta.ID, "task", o.op.Spec.TaskID, "action", o.op.Spec.Action, "err", err)
	}
}

// commit writes while the operation and the binding are as they were. A write
// without a quorum is tried again until the context ends; f may be called many
// times.
func (o *operation) commit(ctx context.Context, f func(v *configdb.View, tx *configdb.Txn, op *api.Operation) error) error {
	id := o.vm.Meta.ID
	return o.h.transact(ctx, func(v *configdb.View, tx *configdb.Txn) error {
		op, err := configdb.Operations.Get(v, id)
		if err != nil || op.Spec.TaskID != o.op.Spec.TaskID || op.Status.Phase.Final() {
			return errors.Join(errTaken, api.IgnoreNotFound(err))
		}
		if err := o.h.stillBound(v, tx, id, o.op.Spec.Epoch); err != nil {
			return err
		}
		if err := f(v, tx, &op); err != nil {
			return err
		}
		return configdb.Operations.UpdateStatus(v, tx, &op)
	})
}

// transact commits, with patience while there is no quorum.
func (h *Hypervisor) transact(ctx context.Context, f func(v *configdb.View, tx *configdb.Txn) error) error {
	for {
		_, err := configdb.Transact(ctx, h.cfg.DB, actor, workAttempts, f)
		if err == nil || ctx.Err() != nil || !errors.Is(err, configdb.ErrNoQuorum) {
			return err
		}
		if err := pause(ctx, writeRetry); err != nil {
			return err
		}
	}
}

func (h *Hypervisor) stillBound(v *configdb.View, tx *configdb.Txn, id string, epoch uint64) error {
	b, err := h.boundHere(v, id, epoch)
	if err != nil {
		return err
	}
	tx.RequireRevision(configdb.Bindings.SpecKey(id), b.Meta.Revision)
	return nil
}

// boundHere returns the binding of a VM, or errTaken if it is not this node's any more,
// or is another one than that of the epoch.
func (h *Hypervisor) boundHere(v *configdb.View, id string, epoch uint64) (api.Binding, error) {
	b, err := configdb.Bindings.Get(v, id)
	if err != nil || b.Spec.NodeID != h.cfg.NodeID || b.Spec.Epoch != epoch {
		return b, errors.Join(errTaken, api.IgnoreNotFound(err))
	}
	return b, nil
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// say shows what happens now. It also makes sure that no write that was sent
// before, and whose outcome is not known, lands after it.
func (o *operation) say(ctx context.Context, progress int, format string, args ...any) error {
	return o.commit(ctx, func(_ *configdb.View, _ *configdb.Txn, op *api.Operation) error {
		op.Status.Phase, op.Status.Progress, op.Status.Message = api.TaskRunning, max(progress, op.Status.Progress), fmt.Sprintf(format, args...)
		return nil
	})
}

func succeed(op *api.Operation) {
	op.Status.Phase, op.Status.Progress, op.Status.Message = api.TaskSucceeded, 100, ""
}

func fail(op *api.Operation, err error) {
	op.Status.Phase, op.Status.Message, op.Status.Code = api.TaskFailed, err.Error(), api.CodeOf(err)
}

// failed is the last word of an operation that did not work; also, if set, adds
// what changes with it.
func (o *operation) failed(ctx context.Context, why error, also func(v *configdb.View, tx *configdb.Txn) error) error {
	err := o.commit(ctx, func(v *configdb.View, tx *configdb.Txn, op *api.Operation) error {
		fail(op, why)
		if also == nil {
			return nil
		}
		return also(v, tx)
	})
	return errors.Join(why, err)
}

// interrupted is what is said of an operation that an earlier life began.
func (o *operation) interrupted() error {
	return api.Errorf(api.CodeInternal, "the daemon of node %s was restarted meanwhile; nothing of it was kept; ask again", o.h.cfg.NodeName)
}
