// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"strings"

	"github.com/muster-vm/muster/api"
)

// A volume that is taken from a running VM stays the VM's until QEMU has let go
// of it. The transaction that takes the disk out of the spec leaves a mark; the
// node that runs the VM removes it together with the VM's reference, or the
// request that attaches the volume again removes it alone.

func detachPrefix(vmID string) string { return Root + "detach/" + vmID + "/" }

// Detach leaves the mark.
func Detach(v *View, tx *Txn, vmID, volumeID string) {
	leaveMark(v, tx, detachPrefix(vmID)+volumeID)
}

// KeepAttached removes the mark of a volume that the VM wants again, and
// reports whether there was one.
func KeepAttached(v *View, tx *Txn, vmID, volumeID string) bool {
	return takeMark(v, tx, detachPrefix(vmID)+volumeID)
}

// Detached releases the marked volumes of a VM for which free returns true: the
// VM's reference goes, and what was made with the VM is nobody's from then on.
func Detached(v *View, tx *Txn, vmID string, free func(volume *api.Volume) bool) error {
	prefix := detachPrefix(vmID)
	for e := range v.Scan(prefix, "") {
		id := strings.TrimPrefix(e.Key, prefix)
		vol, err := Volumes.Get(v, id)
		switch {
		case err != nil && api.CodeOf(err) == api.CodeNotFound:
		case err != nil:
			return err
		case !free(&vol):
			continue
		default:
			if err := ReleaseVolume(v, tx, vmID, &vol); err != nil {
				return err
			}
		}
		tx.RequireRevision(e.Key, e.Revision)
		tx.Delete(e.Key)
	}
	return nil
}

// ReleaseVolume takes a volume from a VM that stays.
func ReleaseVolume(v *View, tx *Txn, vmID string, vol *api.Volume) error {
	Volumes.Release(tx, vol.Meta.ID, api.KindVM, vmID)
	if vol.Meta.Owner != string(api.KindVM)+"/"+vmID {
		return nil
	}
	vol.Meta.Owner = ""
	return Volumes.UpdateSpec(v, tx, vol)
}

// ForgetDetached removes all marks of a VM that goes.
func ForgetDetached(v *View, tx *Txn, vmID string) {
	for e := range v.Scan(detachPrefix(vmID), "") {
		tx.Delete(e.Key)
	}
}
