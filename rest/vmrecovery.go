// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"github.com/muster-vm/muster/api"
)

// checkRecovery looks at what recovery wishes for beside the rest of a VM that is
// created or changed. old is the VM before, empty for a new one.
func (c *change) checkRecovery(old, vm *api.VM) error {
	if vm.Spec.Recovery == nil {
		return nil
	}
	p := vm.Spec.EndPolicy()
	was := old.Spec.EndPolicy()
	if p.OnWatchdog == "" || p.OnWatchdog == api.EndIgnore || p.OnWatchdog == was.OnWatchdog {
		return nil
	}
	switch w := vm.Spec.Watchdog; {
	case w == nil:
		return api.Invalid("spec.recovery.onWatchdog", "is %s, but the vm has no watchdog; give it one: --watchdog reset", p.OnWatchdog)
	case p.OnWatchdog == api.EndPause && w.Action != api.WatchdogPause && w.Action != api.WatchdogNone && w.Action != api.WatchdogInjectNMI:
		return api.Invalid("spec.recovery.onWatchdog", "is pause, but spec.watchdog.action is %s, which leaves nothing to look at; give the watchdog the action pause or none", w.Action)
	}
	return nil
}
