// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"strconv"

	"github.com/muster-vm/muster/api"
)

const vsockRoot = claimRoot + "vsock/"

// VsockKey claims the context identifier of a guest's vsock for a VM.
func VsockKey(cid uint32) string { return vsockRoot + strconv.FormatUint(uint64(cid), 10) }

// ReleaseImage takes back a VM's reference to an image, by name.
func ReleaseImage(v *View, tx *Txn, vm *api.VM, name string) {
	if img, err := Images.Find(v, vm.Meta.Project, name); err == nil {
		Images.Release(tx, img.Meta.ID, api.KindVM, vm.Meta.ID)
	}
}

// ReleaseVsock takes back the address of a VM's vsock, if it is the VM's.
func ReleaseVsock(v *View, tx *Txn, vm *api.VM) {
	if vm.Spec.Vsock == nil {
		return
	}
	key := VsockKey(vm.Spec.Vsock.CID)
	if e, ok := v.Get(key); ok && string(e.Value) == vm.Meta.ID {
		tx.RequireRevision(key, e.Revision)
		tx.Delete(key)
	}
}

// ReleaseMachine takes back what the machine of a VM holds: the images that it
// reads and its vsock address.
func ReleaseMachine(v *View, tx *Txn, vm *api.VM) {
	for _, image := range vm.Spec.MachineImages() {
		ReleaseImage(v, tx, vm, *image)
	}
	ReleaseVsock(v, tx, vm)
}
