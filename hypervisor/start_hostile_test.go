// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
)

// A guard that is held up may carry out a start long after the daemon gave up
// waiting. A VM that is reported as stopped may be moved by its next start, so
// that report has to wait until the late start is certainly over.
func TestStoppedIsNotSaidWhileAStartMayStillCome(t *testing.T) {
	e := newEnv(t, false)
	e.guard.mu.Lock()
	e.guard.launch = func(StartRequest, func(int, int)) (int, func(), error) { return 0, nil, context.DeadlineExceeded }
	e.guard.mu.Unlock()
	e.vols.put("web1-disk0", e.disk())
	id := e.create("node-1", api.VMSpec{CPUs: 1, Memory: 64 * api.MiB, Power: api.PowerRunning})
	e.wait(id, "tried", func(vm api.VM) bool { return strings.Contains(vm.Status.Message, "not started") })
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerStopped })
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	e.guard.mu.Lock()
	defer e.guard.mu.Unlock()
	if !slices.Contains(e.guard.calls, "kill "+id) {
		t.Errorf("the vm is reported as stopped although a start may still be under way: %v", e.guard.calls)
	}
}
