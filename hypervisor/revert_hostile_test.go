// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// ownDisk adds a volume that was made with the VM to its disks.
func (e *env) ownDisk(id, name string) {
	e.t.Helper()
	path := filepath.Join(e.runDir, name+".qcow2")
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", path, "64M").CombinedOutput(); err != nil {
		e.t.Fatalf("this test needs qemu-img (install qemu-utils): %v: %s", err, out)
	}
	e.vols.put(name, path)
	vol := api.Volume{Meta: api.NewMeta(api.KindVolume, "", name), Spec: api.VolumeSpec{Size: 64 * api.MiB}}
	vol.Meta.Owner = "vm/" + id
	vol.Status = api.VolumeStatus{Phase: api.StorageReady, Format: "qcow2", Size: 64 * api.MiB}
	must(e.t, vol.Prepare())
	tx := &configdb.Txn{}
	must(e.t, configdb.Volumes.Create(tx, &vol))
	tx.Put(configdb.Volumes.RefPrefix(vol.Meta.ID)+"vm/"+id, nil)
	e.commit(tx)
	e.change(id, func(vm *api.VM) {
		vm.Spec.Disks = append(vm.Spec.Disks, api.VMDisk{Volume: name})
		vm.Spec.AssignSlots(nil)
	})
}

// A disk that a revert detaches is nobody's. It stayed the property of the VM, whose
// deletion then took it from whoever had attached it.
func TestDetachedByARevertADiskIsNobodys(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{})
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	e.done(id, api.ActionVMSnapshot, "one", false)
	e.ownDisk(id, "later")
	e.done(id, api.ActionVMRevert, "one", false)
	vol, err := configdb.Volumes.Find(e.db.Local(), "", "later")
	must(t, err)
	if by := configdb.Volumes.Referrers(e.db.Local(), vol.Meta.ID); len(by) != 0 || vol.Meta.Owner != "" {
		t.Errorf("attached to %v, owned by %q", by, vol.Meta.Owner)
	}
}

// A disk that another VM has is not deleted with the one that it was made for.
func TestDeletionSparesTheDiskOfAnotherVM(t *testing.T) {
	e := newEnv(t, false)
	id := e.create("node-1", api.VMSpec{})
	vol, err := configdb.Volumes.Find(e.db.Local(), "", "web1-disk0")
	must(t, err)
	tx := &configdb.Txn{}
	tx.Put(configdb.Volumes.RefPrefix(vol.Meta.ID)+"vm/other", nil)
	e.commit(tx)
	e.change(id, func(vm *api.VM) { now := time.Now(); vm.Meta.DeletingAt = &now })
	e.until("the VM is gone", func() bool {
		_, err := configdb.VMs.Get(e.db.Local(), id)
		vol, _ = configdb.Volumes.Find(e.db.Local(), "", "web1-disk0")
		return err != nil || vol.Meta.Deleting()
	}, nothing)
	if vol.Meta.Deleting() || vol.Meta.Owner != "" {
		t.Errorf("deleting %v, owned by %q", vol.Meta.Deleting(), vol.Meta.Owner)
	}
}
