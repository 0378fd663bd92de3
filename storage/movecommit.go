// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// commitRetry is the pause before the commit of a move is tried again that found no
// quorum.
const commitRetry = time.Second

// commit is the one transaction after which the new files are the volumes, the VM is
// bound to this node, and the operation has succeeded. While there is no quorum it
// waits: the files are complete, and whether an attempt took effect is seen later.
func (m *mover) commit(ctx context.Context) error {
	for {
		_, err := configdb.Transact(ctx, m.s.cfg.DB, actor, txnAttempts, m.handOver)
		switch {
		case err == nil:
			m.s.log.Info("volumes moved", "task", m.op.Spec.TaskID, "vm", m.op.Spec.VM, "volumes", len(m.op.Spec.Move.Volumes), "from", m.op.Spec.Move.From)
			return nil
		case errors.Is(err, configdb.ErrConflict):
			return brokenError{err}
		case !errors.Is(err, configdb.ErrNoQuorum) && !errors.Is(err, configdb.ErrUncertain):
			return err
		}
		t := time.NewTimer(commitRetry)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return context.Cause(ctx)
		}
	}
}

func (m *mover) handOver(v *configdb.View, tx *configdb.Txn) error {
	op, err := configdb.Operations.Get(v, m.op.Meta.ID)
	if api.IgnoreNotFound(err) != nil {
		return err
	}
	if err != nil || !m.wanted(v) {
		return errUnwanted // it is over, perhaps by an attempt of ours
	}
	tx.RequireRevision(configdb.Operations.SpecKey(op.Meta.ID), op.Meta.Revision)
	if err := m.alive(v, tx); err != nil {
		return err
	}
	if op.Spec.Action == api.ActionVMMove {
		if err := m.rebind(v, tx); err != nil {
			return err
		}
	}
	for _, mv := range op.Spec.Move.Volumes {
		if err := m.repoint(v, tx, mv); err != nil {
			return err
		}
	}
	op.Status.Phase, op.Status.Progress, op.Status.Code = api.TaskSucceeded, 100, ""
	op.Status.Message = m.result()
	return configdb.Operations.UpdateStatus(v, tx, &op)
}

// alive requires that this node is not given up for lost, and has not begun to leave.
func (m *mover) alive(v *configdb.View, tx *configdb.Txn) error {
	id := m.s.cfg.NodeID
	node, err := configdb.Nodes.Get(v, id)
	if err != nil {
		return err
	}
	if node.Status.Phase != api.NodeReady || node.Meta.Deleting() {
		return brokenError{api.Errorf(api.CodeRefused, "node %s is %s", node.Meta.Name, node.Status.Phase)}
	}
	tx.RequireRevision(configdb.Nodes.SpecKey(id), node.Meta.Revision)
	tx.RequireRevision(configdb.Nodes.StatusKey(id), node.Meta.StatusRevision)
	tx.RequireRevision(configdb.LaterLifeKey(id), 0)
	return nil
}

// rebind gives a VM that its owner has reported stopped to this node, if it is not
// this node's already. The preconditions are that very report, the spec and the
// binding.
func (m *mover) rebind(v *configdb.View, tx *configdb.Txn) error {
	id := m.op.Meta.ID
	vm, err := configdb.VMs.Get(v, id)
	if err != nil {
		return err
	}
	b, err := configdb.Bindings.Get(v, id)
	if err != nil {
		return err
	}
	s := &vm.Status
	switch {
	case vm.Meta.Deleting():
		return api.Errorf(api.CodeRefused, "vm %s is being deleted", vm.Meta.Name)
	case b.Spec.Epoch != m.op.Spec.Epoch || b.Spec.NodeID != m.op.Spec.Move.FromNodeID:
		return api.Errorf(api.CodeConflict, "vm %s was bound anew meanwhile", vm.Meta.Name)
	case vm.Spec.Power != api.PowerStopped || s.PID != 0 || s.Phase != api.VMStopped && s.Phase != api.VMFailed || s.Epoch != b.Spec.Epoch:
		return brokenError{api.Errorf(api.CodeRefused, "node %s does not say that vm %s is stopped, but %s", b.Spec.Node, vm.Meta.Name, s.Phase)}
	}
	tx.RequireRevision(configdb.VMs.SpecKey(id), vm.Meta.Revision)
	tx.RequireRevision(configdb.VMs.StatusKey(id), vm.Meta.StatusRevision)
	tx.RequireRevision(configdb.Bindings.SpecKey(id), b.Meta.Revision)
	tx.RequireRevision(configdb.SavedStates.SpecKey(id), 0)
	if b.Spec.NodeID == m.s.cfg.NodeID {
		return nil
	}
	b.Spec.NodeID, b.Spec.Node = m.s.cfg.NodeID, m.s.cfg.NodeName
	b.Spec.Epoch++
	if err := configdb.Bindings.UpdateSpec(v, tx, &b); err != nil {
		return err
	}
	vm.Status = api.VMStatus{
		ObservedGeneration: s.ObservedGeneration, RebootsDone: s.RebootsDone, Phase: s.Phase, Node: b.Spec.Node, Epoch: b.Spec.Epoch, Message: s.Message, Restarts: s.Restarts,
	}
	return configdb.VMs.UpdateStatus(v, tx, &vm)
}

// repoint says that a volume is the file that was made here.
func (m *mover) repoint(v *configdb.View, tx *configdb.Txn, mv api.VolumeMove) error {
	vol, err := configdb.Volumes.Get(v, mv.ID)
	if err != nil {
		return err
	}
	if vol.Meta.Deleting() || vol.Status.Phase != api.StorageReady || vol.Spec.Size > vol.Status.Size {
		return api.Errorf(api.CodeConflict, "volume %s was changed meanwhile", vol.Meta.Name)
	}
	to, err := configdb.Pools.Find(v, "", mv.Pool)
	if err != nil {
		return err
	}
	from, err := configdb.Pools.Find(v, "", vol.Spec.Pool)
	if err != nil {
		return err
	}
	if to.Meta.ID != from.Meta.ID {
		tx.RequireRevision(configdb.Pools.SpecKey(to.Meta.ID), to.Meta.Revision)
		configdb.Pools.Refer(tx, to.Meta.ID, api.KindVolume, vol.Meta.ID)
		configdb.Pools.Release(tx, from.Meta.ID, api.KindVolume, vol.Meta.ID)
	}
	vol.Spec.Pool, vol.Spec.Node = to.Meta.Name, m.s.cfg.NodeName
	if mv.Whole {
		if img, err := configdb.Images.Find(v, vol.Meta.Project, vol.Spec.Image); err == nil {
			configdb.Images.Release(tx, img.Meta.ID, api.KindVolume, vol.Meta.ID)
		}
		vol.Spec.Image, vol.Spec.Size = "", vol.Status.Size
	}
	return configdb.Volumes.UpdateSpec(v, tx, &vol)
}

// result says in one line what the move did.
func (m *mover) result() string {
	mv := m.op.Spec.Move
	seen := map[string]bool{}
	var pools []string
	for _, o := range mv.Volumes {
		if !seen[o.Pool] {
			seen[o.Pool] = true
			pools = append(pools, o.Pool)
		}
	}
	what := "it is on node " + mv.Node + " now"
	if len(pools) > 0 {
		what = fmt.Sprintf("%d volumes are in pool %s of node %s now", len(mv.Volumes), strings.Join(pools, ", "), mv.Node)
	}
	return what
}

// say shows how far the move is. That it could not be shown harms nothing.
func (m *mover) say(ctx context.Context, progress int, message string) {
	err := m.update(ctx, func(st *api.OperationStatus) {
		st.Phase, st.Progress, st.Message = api.TaskRunning, max(progress, st.Progress), message
	})
	if err != nil && ctx.Err() == nil {
		m.s.log.Warn("progress of a move not written", "task", m.op.Spec.TaskID, "err", err)
	}
}

// end is the last word of a move that did not happen.
func (m *mover) end(ctx context.Context, phase api.TaskPhase, code api.Code, message string) error {
	return m.update(ctx, func(st *api.OperationStatus) { st.Phase, st.Code, st.Message = phase, code, message })
}

func (m *mover) update(ctx context.Context, f func(*api.OperationStatus)) error {
	_, err := configdb.Transact(ctx, m.s.cfg.DB, actor, txnAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		op, err := configdb.Operations.Get(v, m.op.Meta.ID)
		if err != nil {
			return err
		}
		if op.Spec.TaskID != m.op.Spec.TaskID || op.Status.Phase.Final() {
			return errNotOurs
		}
		f(&op.Status)
		return configdb.Operations.UpdateStatus(v, tx, &op)
	})
	return ignore(err)
}
