// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package task

import (
	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// freeVolume lets go of a volume that no VM has when its move is over: until then
// nobody may attach or delete it.
func freeVolume(tx *configdb.Txn, op *api.Operation) {
	if op.Spec.Action == api.ActionVolumeMove {
		configdb.Volumes.Release(tx, op.Meta.ID, api.KindOperation, op.Meta.ID)
	}
}

// deleting reports whether what an operation works on is to be deleted.
func (o *target) deleting() bool {
	return o.vm != nil && o.vm.Meta.Deleting() || o.volume != nil && o.volume.Meta.Deleting()
}
