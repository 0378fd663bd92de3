// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"slices"
	"strconv"
	"strings"

	"github.com/muster-vm/muster/api"
)

// What the machine of a running VM holds beside disks, images that it reads and
// the address of its vsock, stays the VM's when the spec does not name it any
// more: QEMU has it until it lets go, at the latest at its end. The transaction
// that takes it out of the spec leaves a mark, and the node that runs the VM
// removes that together with what it stands for. See detach.go for volumes.

func letGoPrefix(vmID string) string { return Root + "letgo/" + vmID + "/" }

const (
	letGoImage = "image/" // and its ID
	letGoVsock = "vsock/" // and the context identifier
)

// ReleaseImageLater leaves a mark for an image that a running VM's spec does not
// name any more.
func ReleaseImageLater(v *View, tx *Txn, vm *api.VM, name string) {
	if img, err := Images.Find(v, vm.Meta.Project, name); err == nil {
		leaveMark(v, tx, letGoPrefix(vm.Meta.ID)+letGoImage+img.Meta.ID)
	}
}

// KeepImage takes the mark of an image back.
func KeepImage(v *View, tx *Txn, vmID, imageID string) {
	takeMark(v, tx, letGoPrefix(vmID)+letGoImage+imageID)
}

// ReleaseVsockLater leaves a mark for the address of a running VM's vsock.
func ReleaseVsockLater(v *View, tx *Txn, vm *api.VM) {
	if vm.Spec.Vsock != nil {
		leaveMark(v, tx, letGoPrefix(vm.Meta.ID)+letGoVsock+strconv.FormatUint(uint64(vm.Spec.Vsock.CID), 10))
	}
}

// KeepVsock takes the mark of an address back.
func KeepVsock(v *View, tx *Txn, vmID string, cid uint32) {
	takeMark(v, tx, letGoPrefix(vmID)+letGoVsock+strconv.FormatUint(uint64(cid), 10))
}

func leaveMark(v *View, tx *Txn, key string) {
	e, _ := v.Get(key)
	tx.RequireRevision(key, e.Revision)
	tx.Put(key, nil)
}

// takeMark removes a mark and reports whether there was one.
func takeMark(v *View, tx *Txn, key string) bool {
	e, ok := v.Get(key)
	tx.RequireRevision(key, e.Revision)
	if ok {
		tx.Delete(key)
	}
	return ok
}

// LetGo releases what is marked and what none of the specs names: the VM's own,
// and those of the machine that runs or whose memory is saved.
func LetGo(v *View, tx *Txn, vm *api.VM, holders []*api.VMSpec) {
	prefix := letGoPrefix(vm.Meta.ID)
	for e := range v.Scan(prefix, "") {
		what := strings.TrimPrefix(e.Key, prefix)
		if id, ok := strings.CutPrefix(what, letGoImage); ok {
			if img, err := Images.Get(v, id); err == nil {
				if slices.ContainsFunc(holders, func(s *api.VMSpec) bool { return reads(s, img.Meta.Name) }) {
					continue
				}
				Images.Release(tx, id, api.KindVM, vm.Meta.ID)
			}
		}
		if cid, ok := strings.CutPrefix(what, letGoVsock); ok {
			n, err := strconv.ParseUint(cid, 10, 32)
			if err == nil && slices.ContainsFunc(holders, func(s *api.VMSpec) bool { return s != nil && s.Vsock != nil && s.Vsock.CID == uint32(n) }) {
				continue
			}
			if err == nil {
				ReleaseVsock(v, tx, &api.VM{Meta: vm.Meta, Spec: api.VMSpec{Vsock: &api.VMVsock{CID: uint32(n)}}})
			}
		}
		tx.RequireRevision(e.Key, e.Revision)
		tx.Delete(e.Key)
	}
}

// reads reports whether a machine reads an image.
func reads(s *api.VMSpec, image string) bool {
	if s == nil {
		return false
	}
	for _, name := range s.MachineImages() {
		if *name == image {
			return true
		}
	}
	return false
}

// ForgetLetGo releases everything that is marked of a VM that goes.
func ForgetLetGo(v *View, tx *Txn, vm *api.VM) { LetGo(v, tx, vm, nil) }
