// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package task

import "github.com/muster-vm/muster/api"

// changedLive reports that nothing of a change of hardware is under way any
// more: it is done, or it waits for the next start, which the VM's conditions
// say.
func changedLive(vm *api.VM) bool {
	if vm.Status.Phase == api.VMStarting {
		return false // it starts with the new hardware
	}
	for _, typ := range []string{api.ConditionChanging, api.ConditionHotplugFailed} {
		if _, busy := api.FindCondition(vm.Status.Conditions, typ); busy {
			return false
		}
	}
	return true
}
