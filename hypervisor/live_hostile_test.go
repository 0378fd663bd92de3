// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/hypervisor/argv"
)

// A guest takes and gives back memory as it likes, and QEMU tells each time. Each
// time was a write to the database of the whole cluster.
func TestGuestThatPlaysWithItsMemoryWritesNothing(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{Memory: 256 * api.MiB, MaxMemory: api.GiB})
	q := e.fakes.qemu()
	q.IgnoreUnplug(true) // it does not take what it is asked to take
	e.change(id, func(vm *api.VM) { vm.Spec.Memory = 512 * api.MiB })
	e.wait(id, "waited for", func(vm api.VM) bool { return condition(vm, ConditionChanging) != "" })
	e.until("a second look", func() bool { e.h.Wake(); return q.Count("qom-list") > 3 }, nothing)
	before := e.db.Local().Revision()
	const times = 10
	for i := range times {
		looks := q.Count("qom-list")
		q.SetProperty(argv.MemoryID, "size", int64(i)*2<<20)
		q.Emit("MEMORY_DEVICE_SIZE_CHANGE", `{}`)
		e.until("it was looked at", func() bool { return q.Count("qom-list") > looks }, nothing)
	}
	looks := q.Count("qom-list") // the one before has written by the next
	e.until("the last look", func() bool { e.h.Wake(); return q.Count("qom-list") > looks }, nothing)
	if n := e.db.Local().Revision() - before; n > 2 {
		t.Errorf("%d writes for %d words of the guest", n, times)
	}
}

// A kernel of the user's own may panic and reset itself all the time.
func TestGuestThatPanicsAllTheTimeWritesOnce(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	q := e.fakes.qemu()
	panicked := func(vm api.VM) bool { return condition(vm, ConditionGuestPanicked) != "" }
	q.Emit("GUEST_PANICKED", `{"action": "run"}`)
	e.wait(id, "panicked", panicked)
	before := e.db.Local().Revision()
	for range 10 {
		for _, event := range []string{"RESET", "GUEST_PANICKED"} {
			looks := q.Count("query-status")
			q.Emit(event, `{"guest": true, "action": "run", "reason": "guest-reset"}`)
			e.until("it was looked at", func() bool { return q.Count("query-status") > looks }, nothing)
		}
	}
	q.Emit("RESET", `{"guest": true, "reason": "guest-reset"}`)
	looks := q.Count("query-status")
	e.until("the last look", func() bool { e.h.Wake(); return q.Count("query-status") > looks+1 }, nothing)
	if n := e.db.Local().Revision() - before; n > 1 {
		t.Errorf("%d writes", n)
	}
	e.clock.advance(PanicTime)
	e.h.Wake()
	e.wait(id, "it is over", func(vm api.VM) bool { return !panicked(vm) })
}
