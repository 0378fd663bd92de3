// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/hypervisor/limit"
)

// testLimits is a host whose kernel has no weights for disks.
type testLimits struct {
	mu    sync.Mutex
	calls []string
	fails error
}

func (l *testLimits) Apply(_ string, pid int, v api.VMLimits) (missing []limit.Missing, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.calls = append(l.calls, fmt.Sprintf("%d: max %d", pid, v.CPUMax))
	if v.IOWeight > 0 {
		missing = append(missing, limit.Missing{Limit: "ioWeight", Reason: "no io.weight"})
	}
	return missing, l.fails
}

func (l *testLimits) Release(string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.calls = append(l.calls, "release")
	return nil
}

func (l *testLimits) all() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.calls)
}

func (l *testLimits) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fails = err
}

func TestLimitsFollowTheSpec(t *testing.T) {
	e := newEnv(t, false)
	e.stop()
	l := &testLimits{}
	e.limits = l
	e.begin()
	id, vm := e.running(api.VMSpec{Limits: &api.VMLimits{CPUMax: 50, IOWeight: 10}})
	c, found := api.FindCondition(vm.Status.Conditions, ConditionLimits)
	if !found || c.Message != "not in force on this node: ioWeight (no io.weight)" {
		t.Fatalf("%+v", vm.Status.Conditions)
	}
	e.h.Wake() // nothing changed: nothing is set
	e.change(id, func(vm *api.VM) { vm.Spec.Limits = &api.VMLimits{CPUMax: 80} })
	vm = e.wait(id, "no condition", func(vm api.VM) bool {
		_, found := api.FindCondition(vm.Status.Conditions, ConditionLimits)
		return !found && vm.Status.ObservedGeneration == vm.Meta.Generation
	})
	pid := vm.Status.PID
	if got, want := l.all(), []string{fmt.Sprintf("%d: max 50", pid), fmt.Sprintf("%d: max 80", pid)}; !slices.Equal(got[len(got)-2:], want) {
		t.Fatalf("%v, want %v at the end", got, want)
	}
	l.fail(errors.New("no such process"))
	e.change(id, func(vm *api.VM) { vm.Spec.Limits = &api.VMLimits{CPUMax: 90} })
	e.wait(id, "the failure is told", func(vm api.VM) bool {
		c, _ := api.FindCondition(vm.Status.Conditions, ConditionLimits)
		return strings.Contains(c.Message, "no such process")
	})
	e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	e.until("released", func() bool { all := l.all(); return all[len(all)-1] == "release" }, nothing)
}
