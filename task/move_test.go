// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package task

import (
	"errors"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
)

// The task of a volume's move takes over the last word of the node that does it, and
// speaks for one that is lost; either way the volume is free again.
func TestTheMoveOfAVolumeEndsAndFreesIt(t *testing.T) {
	for name, lost := range map[string]bool{"its node has spoken": false, "its node is lost": true} {
		t.Run(name, func(t *testing.T) {
			f := &fixture{t, storetest.New(t)}
			defer f.run(1, nil)()
			node := api.Node{Meta: api.NewMeta(api.KindNode, "", "m1"), Status: api.NodeStatus{Phase: api.NodeReady}}
			vol := api.Volume{Meta: api.NewMeta(api.KindVolume, "", "data"), Status: api.VolumeStatus{Phase: api.StorageReady}}
			task := api.NewTask(api.ActionVolumeMove, api.KindVolume, vol.Meta, "me", time.Hour, time.Now())
			op := api.Operation{Meta: api.NewMeta(api.KindOperation, "", "data"), Spec: api.OperationSpec{
				Action: api.ActionVolumeMove, TaskID: task.Meta.ID, NodeID: node.Meta.ID, Move: &api.MoveSpec{Node: "m1"},
			}}
			op.Meta.ID = vol.Meta.ID
			f.do(func(_ *configdb.View, tx *configdb.Txn) error {
				return errors.Join(configdb.Nodes.Create(tx, &node), configdb.Volumes.Create(tx, &vol))
			})
			f.do(func(_ *configdb.View, tx *configdb.Txn) error {
				configdb.Volumes.Refer(tx, vol.Meta.ID, api.KindOperation, vol.Meta.ID)
				return errors.Join(configdb.Tasks.CreateUnnamed(tx, &task), configdb.Operations.CreateUnnamed(tx, &op))
			})
			is := func(phase api.TaskPhase) func(v *configdb.View) bool {
				return func(v *configdb.View) bool {
					x, err := configdb.Tasks.Get(v, task.Meta.ID)
					return err == nil && x.Status.Phase == phase
				}
			}
			f.until("running", is(api.TaskRunning))
			want := api.TaskSucceeded
			f.do(func(v *configdb.View, tx *configdb.Txn) error {
				if lost {
					want = api.TaskFailed
					n, err := configdb.Nodes.Get(v, node.Meta.ID)
					n.Status.Phase = api.NodeLost
					return errors.Join(err, configdb.Nodes.UpdateStatus(v, tx, &n))
				}
				o, err := configdb.Operations.Get(v, vol.Meta.ID)
				o.Status.Phase = api.TaskSucceeded
				return errors.Join(err, configdb.Operations.UpdateStatus(v, tx, &o))
			})
			f.until("over", is(want))
			v := f.db.Local()
			if by := configdb.Volumes.Referrers(v, vol.Meta.ID); len(by) > 0 {
				t.Errorf("the volume is held by %v", by)
			}
			if _, err := configdb.Operations.Get(v, vol.Meta.ID); err == nil {
				t.Error("the operation is still there")
			}
		})
	}
}
