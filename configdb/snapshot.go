// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"errors"
	"net/netip"

	"github.com/muster-vm/muster/api"
)

// snapshotRoot holds the claims that make the name of a snapshot unique among
// those of its VM; the value of each is the snapshot's ID.
const snapshotRoot = claimRoot + "snapshot/"

// SnapshotNameKey claims a snapshot's name for one VM.
func SnapshotNameKey(vmID, name string) string { return snapshotRoot + vmID + "/" + name }

// CreateSnapshot adds a snapshot with its name.
func CreateSnapshot(tx *Txn, o *api.Snapshot) error {
	key := SnapshotNameKey(o.Spec.VMID, o.Meta.Name)
	tx.RequireRevision(key, 0)
	tx.Put(key, []byte(o.Meta.ID))
	return Snapshots.CreateUnnamed(tx, o)
}

// DeleteSnapshot removes a snapshot with its name.
func DeleteSnapshot(tx *Txn, o *api.Snapshot) {
	tx.Delete(SnapshotNameKey(o.Spec.VMID, o.Meta.Name))
	Snapshots.DeleteUnnamed(tx, o)
}

// SnapshotsOf returns the snapshots of a VM in order of their names.
func SnapshotsOf(v *View, vmID string) ([]api.Snapshot, error) {
	var out []api.Snapshot
	var errs []error
	for e := range v.Scan(SnapshotNameKey(vmID, ""), "") {
		o, err := Snapshots.Get(v, string(e.Value))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		out = append(out, o)
	}
	return out, errors.Join(errs...)
}

// FindSnapshot returns a VM's snapshot by name or ID.
func FindSnapshot(v *View, vm *api.Meta, nameOrID string) (api.Snapshot, error) {
	id := nameOrID
	if e, ok := v.Get(SnapshotNameKey(vm.ID, nameOrID)); ok {
		id = string(e.Value)
	}
	o, err := Snapshots.Get(v, id)
	if api.CodeOf(err) == api.CodeNotFound && err != nil || err == nil && o.Spec.VMID != vm.ID {
		return o, api.Errorf(api.CodeNotFound, "vm %s has no snapshot %q; see muster vm snapshot ls %s", vm.Name, nameOrID, vm.Name)
	}
	return o, err
}

// UnfinishedRevert returns the snapshot whose revert of a VM was begun and not
// ended, and "" if there is none.
func UnfinishedRevert(v *View, vmID string) string {
	all, _ := SnapshotsOf(v, vmID) // one that cannot be read refuses nothing
	for i := range all {
		if all[i].Status.Phase == api.SnapshotReverting {
			return all[i].Meta.Name
		}
	}
	return ""
}

// ClaimNICs takes for a VM what network cards that it once had need again: it
// fails, naming the one who has it, if that belongs to another now. What the VM
// holds already stays.
func ClaimNICs(v *View, tx *Txn, vm *api.Meta, nics []api.VMNIC) error {
	claim := func(key, what string) error {
		e, taken := v.Get(key)
		if taken && string(e.Value) != vm.ID {
			other := string(e.Value)
			if o, err := VMs.Get(v, other); err == nil {
				other = o.Meta.Name
			}
			return api.Errorf(api.CodeRefused, "%s, which vm %s had then, belongs to vm %s now", what, vm.Name, other)
		}
		tx.RequireRevision(key, e.Revision)
		tx.Put(key, []byte(vm.ID))
		return nil
	}
	for _, nic := range nics {
		n, err := Networks.Find(v, api.DefaultProject, nic.Network)
		if err != nil {
			return api.Errorf(api.CodeRefused, "network %s, which vm %s had then, does not exist any more", nic.Network, vm.Name)
		}
		if err := claim(MACKey(nic.MAC), "the MAC address "+nic.MAC); err != nil {
			return err
		}
		if a, err := netip.ParseAddr(nic.Address); err == nil {
			if err := claim(AddressKey(n.Meta.ID, a), "the address "+nic.Address); err != nil {
				return err
			}
		}
		Networks.Refer(tx, n.Meta.ID, api.KindVM, vm.ID)
	}
	return nil
}

// CopyOf names a volume or an image that is not yet copied from a snapshot, such as
// "volume web2-disk0", if there is one.
func CopyOf(v *View, snapshotID string) (what string, busy bool) {
	unfinished := func(m *api.Meta, source string, phase api.StoragePhase) bool {
		return source == snapshotID && phase != api.StorageReady && phase != api.StorageFailed && !m.Deleting()
	}
	volumes, _ := Volumes.List(v) // one that cannot be read is not copied either
	for i := range volumes {
		if o := &volumes[i]; unfinished(&o.Meta, o.Spec.SourceSnapshot, o.Status.Phase) {
			return string(api.KindVolume) + " " + o.Meta.Name, true
		}
	}
	images, _ := Images.List(v)
	for i := range images {
		if o := &images[i]; unfinished(&o.Meta, o.Spec.SourceSnapshot, o.Status.Phase) {
			return string(api.KindImage) + " " + o.Meta.Name, true
		}
	}
	return "", false
}
