// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// tidyDeadline is when the removal of a temporary snapshot is given up.
const tidyDeadline = time.Hour

// dropTemporary begins the removal of what a revert left, and of a snapshot that
// disks were copied from, when nothing is copied from it any more. One that could not be removed is left to
// people: it says so.
func (s *step) dropTemporary(ctx context.Context) (bool, error) {
	all, err := configdb.SnapshotsOf(s.v, s.vm.Meta.ID)
	if err != nil {
		return false, err
	}
	_, loading := s.v.Get(configdb.SavedStates.SpecKey(s.vm.Meta.ID))
	if !loading && (s.proc == nil || s.in.openConn() != nil) && s.leftUndo(all) {
		return true, nil
	}
	for i := range all {
		snap := &all[i]
		if !snap.Spec.Temporary || snap.Status.Phase != api.SnapshotReady {
			continue
		}
		if _, busy := configdb.CopyOf(s.v, snap.Meta.ID); busy {
			continue
		}
		task := api.NewTask(api.ActionVMForget, api.KindVM, s.vm.Meta, actor, tidyDeadline, s.now)
		op := api.Operation{Meta: api.NewMeta(api.KindOperation, s.vm.Meta.Project, s.vm.Meta.Name), Spec: api.OperationSpec{
			Action: api.ActionVMForget, VM: s.vm.Meta.Name, TaskID: task.Meta.ID, NodeID: s.b.Spec.NodeID, Epoch: s.b.Spec.Epoch, SnapshotID: snap.Meta.ID,
		}}
		op.Meta.ID = s.vm.Meta.ID
		op.Status.Phase = api.TaskPending
		tx := &configdb.Txn{Actor: actor}
		if err := configdb.Tasks.CreateUnnamed(tx, &task); err != nil {
			return false, err
		}
		if err := configdb.Operations.CreateUnnamed(tx, &op); err != nil {
			return false, err
		}
		s.silent = true
		return true, s.commit(ctx, tx)
	}
	return false, nil
}
