// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import "slices"

// A VM that an evacuation, or the reboot of its node, has shut down is started again by it. A user who stops it
// meanwhile changes nothing in its spec, which says stopped already; so that request
// leaves a mark, and the evacuation, which removes it, leaves the VM alone.

func stayStoppedKey(vmID string) string { return Root + "staystopped/" + vmID }

// StayStopped leaves the mark, if an evacuation or a reboot has shut the VM down.
func StayStopped(v *View, tx *Txn, vmID string) error {
	all, err := Evacuations.List(v)
	if err != nil {
		return err
	}
	for i := range all {
		if slices.Contains(all[i].Status.Stopped, vmID) {
			// The list may lose the VM meanwhile, and then nobody would remove the mark.
			tx.RequireRevision(Evacuations.StatusKey(all[i].Meta.ID), all[i].Meta.StatusRevision)
			leaveMark(v, tx, stayStoppedKey(vmID))
			return nil
		}
	}
	reboots, err := Reboots.List(v)
	if err != nil {
		return err
	}
	for i := range reboots {
		if slices.Contains(reboots[i].Status.Stopped, vmID) {
			tx.RequireRevision(Reboots.StatusKey(reboots[i].Meta.ID), reboots[i].Meta.StatusRevision)
			leaveMark(v, tx, stayStoppedKey(vmID))
			return nil
		}
	}
	return nil
}

// StaysStopped takes the mark back, and reports whether there was one.
func StaysStopped(v *View, tx *Txn, vmID string) bool { return takeMark(v, tx, stayStoppedKey(vmID)) }
