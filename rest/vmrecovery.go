// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"fmt"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// checkRecovery looks at what recovery wishes for beside the rest of a VM that is
// created or changed. old is the VM before, empty for a new one.
func (c *change) checkRecovery(old, vm *api.VM) error {
	if vm.Spec.Recovery == nil {
		return nil
	}
	if err := c.checkAfter(old, vm); err != nil {
		return err
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

// checkAfter refuses VMs to wait for that do not exist, and circles. Names that
// were there before may have gone since. Two requests at once can make a circle
// all the same: a start waits for a limited time only.
func (c *change) checkAfter(old, vm *api.VM) error {
	was, now := old.Spec.StartAfter().After, vm.Spec.StartAfter().After
	if slices.Equal(was, now) {
		return nil
	}
	for i, name := range now {
		field := fmt.Sprintf("spec.recovery.after[%d]", i)
		if name == vm.Meta.Name {
			return api.Invalid(field, "is the vm itself")
		}
		if slices.Contains(was, name) {
			continue
		}
		if _, err := configdb.VMs.Find(c.v, vm.Meta.Project, name); err != nil {
			return atField(err, field)
		}
	}
	if circle := c.circle(vm, now); circle != nil {
		return api.Invalid("spec.recovery.after", "makes a circle, in which each waits for the next: %s; leave one of them out", strings.Join(circle, " → "))
	}
	return nil
}

// circle is the way from a VM back to itself, nil if there is none.
func (c *change) circle(vm *api.VM, after []string) []string {
	seen := map[string]bool{}
	var walk func(way, after []string) []string
	walk = func(way, after []string) []string {
		for _, name := range after {
			next := append(slices.Clone(way), name)
			if name == vm.Meta.Name {
				return next
			}
			if seen[name] {
				continue
			}
			seen[name] = true
			if other, err := configdb.VMs.Find(c.v, vm.Meta.Project, name); err == nil {
				if found := walk(next, other.Spec.StartAfter().After); found != nil {
					return found
				}
			}
		}
		return nil
	}
	return walk([]string{vm.Meta.Name}, after)
}
