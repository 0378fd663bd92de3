// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

func (e *env) path(volume string) string {
	e.t.Helper()
	p, _, err := e.vols.Resolve(nil, "", volume)
	must(e.t, err)
	return p
}

func TestSnapshotsOfAStoppedVM(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{CPUs: 1})
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	disks := []string{e.path("web1-disk0"), e.path("web1-disk1")}
	for i, p := range disks {
		write(t, p, []string{"0x11", "0x12"}[i])
	}
	e.done(id, api.ActionVMSnapshot, "one", false)
	one := e.snap(id, "one")
	if s := one.Status; s.Phase != api.SnapshotReady || s.Consistency != api.ConsistencyStopped || s.Power != api.PowerStopped || len(s.Disks) != 2 || !s.Current || s.TakenAt == nil || s.Hardware == nil || s.Hardware.CPUs != 1 {
		t.Errorf("%+v", s)
	}
	for i, p := range disks {
		write(t, p, []string{"0x21", "0x22"}[i])
	}
	e.done(id, api.ActionVMSnapshot, "two", false)
	if two := e.snap(id, "two"); two.Spec.Parent != "one" || !two.Status.Current || e.snap(id, "one").Status.Current {
		t.Errorf("%+v", two)
	}
	for i, p := range disks {
		write(t, p, []string{"0x31", "0x32"}[i])
	}
	e.change(id, func(vm *api.VM) { vm.Spec.CPUs = 4 })
	e.done(id, api.ActionVMRevert, "one", false)
	reads(t, disks[0], "0x11")
	reads(t, disks[1], "0x12")
	if vm := e.vm(id); vm.Spec.CPUs != 1 || vm.Spec.Power != api.PowerStopped || e.hasSaved(id) {
		t.Errorf("after the revert: %+v", vm.Spec)
	}
	if !e.snap(id, "one").Status.Current || e.snap(id, "two").Status.Current {
		t.Error("the present place is wrong")
	}
	e.done(id, api.ActionVMSnapshot, "three", false)
	if p := e.snap(id, "three").Spec.Parent; p != "one" {
		t.Error("parent", p)
	}
	e.done(id, api.ActionVMForget, "one", false)
	if e.snap(id, "two").Spec.Parent != "" || e.snap(id, "three").Spec.Parent != "" {
		t.Error("the children of a deleted snapshot keep it as their parent")
	}
	e.done(id, api.ActionVMRevert, "two", false)
	reads(t, disks[0], "0x21")
	reads(t, disks[1], "0x22")
	e.done(id, api.ActionVMForget, "two", false)
	e.done(id, api.ActionVMForget, "three", false)
	e.noTags("web1-disk0", "web1-disk1")
	if all := e.snapshots(id); len(all) != 0 {
		t.Errorf("%+v", all)
	}
}

func TestAFailedSnapshotLeavesNothing(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{})
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	e.guard.lease(0)
	e.request(id, api.ActionVMSnapshot, "a", false)
	if st := e.ended(id, api.TaskFailed); !strings.Contains(st.Message, "no lease") || st.Code != api.CodeRefused {
		t.Errorf("%+v", st)
	}
	e.guard.lease(1)
	if all := e.snapshots(id); len(all) != 0 {
		t.Errorf("a snapshot stays: %+v", all)
	}
	e.noTags("web1-disk0", "web1-disk1")
	e.vols.mu.Lock()
	delete(e.vols.paths, "web1-disk1")
	e.vols.mu.Unlock()
	e.request(id, api.ActionVMSnapshot, "a", false)
	st := e.ended(id, api.TaskFailed)
	if !strings.Contains(st.Message, "web1-disk1") {
		t.Errorf("%+v", st)
	}
	e.noTags("web1-disk0")
}

func TestARevertTakesAllDisksOrNone(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{})
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	disks := []string{e.path("web1-disk0"), e.path("web1-disk1")}
	write(t, disks[0], "0x11")
	write(t, disks[1], "0x12")
	e.done(id, api.ActionVMSnapshot, "one", false)
	write(t, disks[0], "0x21")
	write(t, disks[1], "0x22")
	tag := e.snap(id, "one").Status.Tag
	e.snaps.failOnce("apply web1-disk1 " + tag)
	e.request(id, api.ActionVMRevert, "one", false)
	if st := e.ended(id, api.TaskFailed); !strings.Contains(st.Message, "web1-disk1") || !strings.Contains(st.Message, "as they were before") {
		t.Errorf("%+v", st)
	}
	reads(t, disks[0], "0x21")
	reads(t, disks[1], "0x22")
	if s := e.snap(id, "one"); s.Status.Phase != api.SnapshotReady {
		t.Errorf("%+v", s.Status)
	}

	// Neither forward nor back: the VM does not start until a revert succeeds.
	e.snaps.failOnce("apply web1-disk1 " + tag)
	e.snaps.failOnce("apply web1-disk0 " + undoTag)
	e.request(id, api.ActionVMRevert, "one", false)
	if st := e.ended(id, api.TaskFailed); !strings.Contains(st.Message, "does not start until") {
		t.Errorf("%+v", st)
	}
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
	e.wait(id, "refused", func(vm api.VM) bool {
		return vm.Status.Phase == api.VMFailed && strings.Contains(vm.Status.Message, "revert again")
	})
	if e.guard.startCount() != 0 {
		t.Fatal("a VM started on a mixture of disks")
	}
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerStopped })
	e.done(id, api.ActionVMRevert, "one", false)
	reads(t, disks[0], "0x11")
	reads(t, disks[1], "0x12")
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
	e.wait(id, "running", running)
}

func TestARevertGoesOnAfterTheDaemonWasKilled(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{})
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	disks := []string{e.path("web1-disk0"), e.path("web1-disk1")}
	write(t, disks[0], "0x11")
	write(t, disks[1], "0x12")
	e.done(id, api.ActionVMSnapshot, "one", false)
	write(t, disks[0], "0x21")
	write(t, disks[1], "0x22")
	block := make(chan struct{})
	e.snaps.mu.Lock()
	e.snaps.block = block
	e.snaps.mu.Unlock()
	e.request(id, api.ActionVMRevert, "one", false)
	e.until("the first disk", func() bool {
		e.snaps.mu.Lock()
		defer e.snaps.mu.Unlock()
		return slices.ContainsFunc(e.snaps.calls, func(c string) bool { return strings.HasPrefix(c, "apply web1-disk0") })
	}, nothing)
	stopped := make(chan struct{})
	go func() { e.stop(); close(stopped) }()
	e.snaps.mu.Lock()
	e.snaps.block = nil
	e.snaps.mu.Unlock()
	close(block)
	<-stopped
	e.snaps.failOnce("delete web1-disk1 " + undoTag)
	e.begin()
	e.ended(id, api.TaskSucceeded)
	reads(t, disks[0], "0x11")
	reads(t, disks[1], "0x12")
	e.until("nothing of the way back is left", func() bool {
		for _, d := range disks {
			if tags, err := tagsOf(d); err != nil || len(tags) != 1 {
				return false
			}
		}
		return !e.snap(id, "one").Status.Undo
	}, nothing)
}

func TestARevertDetachesWhatWasAddedAndRefusesWhatIsMissing(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{})
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	find := func(name string) api.Volume {
		vol, err := configdb.Volumes.Find(e.db.Local(), "", name)
		must(t, err)
		return vol
	}
	e.change(id, func(vm *api.VM) { vm.Spec.Disks = vm.Spec.Disks[:1] })
	second := find("web1-disk1")
	tx := &configdb.Txn{}
	configdb.Volumes.Release(tx, second.Meta.ID, api.KindVM, id)
	e.commit(tx)
	e.done(id, api.ActionVMSnapshot, "one", false)
	e.change(id, func(vm *api.VM) {
		vm.Spec.Disks = append(vm.Spec.Disks, api.VMDisk{Volume: "web1-disk1", Slot: 2})
	})
	tx = &configdb.Txn{}
	configdb.Volumes.Refer(tx, second.Meta.ID, api.KindVM, id)
	e.commit(tx)
	e.done(id, api.ActionVMSnapshot, "two", false)
	e.done(id, api.ActionVMRevert, "one", false)
	vm := e.vm(id)
	if len(vm.Spec.Disks) != 1 || len(configdb.Volumes.Referrers(e.db.Local(), second.Meta.ID)) != 0 {
		t.Errorf("the disk that was added is still attached: %+v", vm.Spec.Disks)
	}
	e.done(id, api.ActionVMRevert, "two", false)
	if vm := e.vm(id); len(vm.Spec.Disks) != 2 || vm.Spec.Disks[1].Slot != 2 || len(configdb.Volumes.Referrers(e.db.Local(), second.Meta.ID)) != 1 {
		t.Errorf("the disk of then is not attached: %+v", vm.Spec.Disks)
	}
	e.done(id, api.ActionVMRevert, "one", false)
	tx = &configdb.Txn{}
	vol := find("web1-disk1")
	configdb.Volumes.Delete(tx, &vol)
	e.commit(tx)
	e.request(id, api.ActionVMRevert, "two", false)
	if st := e.ended(id, api.TaskFailed); !strings.Contains(st.Message, "web1-disk1") || !strings.Contains(st.Message, "is gone") || st.Code != api.CodeRefused {
		t.Errorf("%+v", st)
	}
	if vm := e.vm(id); len(vm.Spec.Disks) != 1 {
		t.Error("a refused revert changed the VM")
	}
	e.done(id, api.ActionVMForget, "two", false)
}

// The running VM, with a scripted QEMU.

func TestSnapshotsOfARunningVM(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{Power: api.PowerRunning})
	e.wait(id, "running", running)
	q := e.fakes.qemu()
	e.done(id, api.ActionVMSnapshot, "disks", false)
	if s := e.snap(id, "disks").Status; s.Consistency != api.ConsistencyCrash || s.Power != api.PowerRunning || s.MemorySize != 0 || q.Count("transaction") != 1 {
		t.Errorf("%+v", s)
	}
	e.done(id, api.ActionVMSnapshot, "memory", true)
	s := e.snap(id, "memory")
	if s.Status.Consistency != api.ConsistencyMemory || s.Status.MemorySize == 0 || s.Spec.Parent != "disks" {
		t.Errorf("%+v", s)
	}
	if tags := q.Tags(); len(tags["disk1"]) != 2 || len(tags["disk2"]) != 2 {
		t.Errorf("%v", tags)
	}
	e.done(id, api.ActionVMForget, "disks", false)
	e.done(id, api.ActionVMForget, "memory", false)
	if tags := q.Tags(); len(tags["disk1"]) != 0 || len(tags["disk2"]) != 0 {
		t.Errorf("%v", tags)
	}
	if vm := e.vm(id); vm.Status.Phase != api.VMRunning || vm.Status.Crashes != 0 {
		t.Errorf("%+v", vm.Status)
	}
}

// quiet is a guest agent.
type quiet struct{ calls chan string }

func (q quiet) Freeze(context.Context, string, time.Duration) (int, error) {
	q.calls <- "freeze"
	return 1, nil
}
func (q quiet) Thaw(context.Context, string) error { q.calls <- "thaw"; return nil }

func TestAnAgentFreezesTheGuestForASnapshot(t *testing.T) {
	e := newEnv(t, false)
	agent := quiet{make(chan string, 8)}
	e.h.cfg.Quiesce = agent
	id := e.twoDisks(api.VMSpec{Power: api.PowerRunning})
	e.wait(id, "running", running)
	e.done(id, api.ActionVMSnapshot, "a", false)
	if c := e.snap(id, "a").Status.Consistency; c != api.ConsistencyQuiesced {
		t.Error(c)
	}
	if a, b := <-agent.calls, <-agent.calls; a != "freeze" || b != "thaw" {
		t.Error(a, b)
	}
	e.fakes.qemu().FailCommand("transaction", "no")
	e.request(id, api.ActionVMSnapshot, "b", false)
	e.ended(id, api.TaskFailed)
	if a, b := <-agent.calls, <-agent.calls; a != "freeze" || b != "thaw" {
		t.Error("after a failure:", a, b)
	}
}

func TestAFailedJobLeavesNothing(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{Power: api.PowerRunning})
	e.wait(id, "running", running)
	q := e.fakes.qemu()
	q.FailJob("snapshot-save", "Error -28 while writing VM: No space left on device")
	e.request(id, api.ActionVMSnapshot, "a", true)
	if st := e.ended(id, api.TaskFailed); st.Code != api.CodeStorageFull || !strings.Contains(st.Message, "free some space") {
		t.Errorf("%+v", st)
	}
	q.FailCommand("transaction", "Device 'disk1' is busy")
	e.request(id, api.ActionVMSnapshot, "a", false)
	if st := e.ended(id, api.TaskFailed); !strings.Contains(st.Message, "is busy") {
		t.Errorf("%+v", st)
	}
	if tags := q.Tags(); len(tags["disk1"])+len(tags["disk2"]) != 0 || len(e.snapshots(id)) != 0 {
		t.Errorf("left behind: %v, %+v", tags, e.snapshots(id))
	}
	q.FailJob("snapshot-save", "no")
	e.request(id, api.ActionVMSuspend, "", false)
	e.ended(id, api.TaskFailed)
	e.wait(id, "running again", func(vm api.VM) bool { return running(vm) && q.State() == "running" })
	if tags := q.Tags(); len(tags["disk1"])+len(tags["disk2"]) != 0 || e.hasSaved(id) {
		t.Errorf("left behind: %v", tags)
	}
	e.done(id, api.ActionVMSnapshot, "a", true) // as if nothing had been
}

func TestQEMUKilledInTheMiddleOfAJob(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{Power: api.PowerRunning})
	was := e.wait(id, "running", running)
	q := e.fakes.qemu()
	q.HoldJobs(true)
	e.request(id, api.ActionVMSnapshot, "a", true)
	e.until("the job", func() bool { return len(q.JobTypes()) == 1 }, nothing)
	q.Exit(-1, int(syscall.SIGKILL))
	st := e.ended(id, api.TaskFailed)
	if len(e.snapshots(id)) != 0 {
		t.Errorf("%+v: %+v", st, e.snapshots(id))
	}
	vm := e.wait(id, "restarted", func(vm api.VM) bool { return running(vm) && vm.Status.PID != was.Status.PID })
	if vm.Status.Crashes != 1 {
		t.Errorf("%+v", vm.Status)
	}
}

func TestDaemonKilledDuringASnapshot(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{Power: api.PowerRunning})
	e.wait(id, "running", running)
	q := e.fakes.qemu()
	for _, action := range []api.Action{api.ActionVMSnapshot, api.ActionVMSuspend} {
		q.HoldJobs(true)
		e.request(id, action, "a", true)
		e.until("the job", func() bool { return len(q.JobTypes()) == 1 }, nothing)
		e.stop()
		q.HoldJobs(false) // QEMU finishes it while no daemon looks
		e.begin()
		if st := e.ended(id, api.TaskFailed); !strings.Contains(st.Message, "restarted meanwhile") {
			t.Errorf("%+v", st)
		}
		if tags := q.Tags(); len(tags["disk1"])+len(tags["disk2"]) != 0 || len(e.snapshots(id)) != 0 || e.hasSaved(id) || len(q.JobTypes()) != 0 {
			t.Errorf("%s left behind: %v, %+v, %v", action, tags, e.snapshots(id), q.JobTypes())
		}
		e.wait(id, "running", func(vm api.VM) bool { return running(vm) && q.State() == "running" })
	}
}

func TestSuspendAndResume(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{Power: api.PowerRunning, CPUs: 2})
	e.wait(id, "running", running)
	q := e.fakes.qemu()
	e.change(id, func(vm *api.VM) { vm.Spec.CPUs = 3 })
	e.wait(id, "a CPU plugged in", func(vm api.VM) bool { return vm.Status.Hardware.CPUs == 3 })
	e.change(id, func(vm *api.VM) { vm.Spec.Watchdog = &api.VMWatchdog{Action: "reset"} }) // takes a restart
	e.done(id, api.ActionVMSuspend, "", false)
	vm := e.wait(id, "suspended", func(vm api.VM) bool { return vm.Status.Phase == api.VMSuspended && vm.Status.PID == 0 })
	if vm.Spec.Power != api.PowerSuspended || vm.Status.Crashes != 0 || !e.hasSaved(id) || q.Count("quit") != 1 || q.State() != "paused" {
		t.Fatalf("%+v, QEMU is %s", vm, q.State())
	}
	e.fakes.onStart(func(n *qemuFake) { n.Tag(api.SuspendTag, 1); n.HoldJobs(true) })
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
	e.wait(id, "loading", func(vm api.VM) bool { return strings.Contains(vm.Status.Message, "loading the memory") })
	n := e.fakes.qemu()
	if n.Count("cont") != 0 || n.State() != "prelaunch" {
		t.Fatal("the guest ran before its memory was there")
	}
	n.HoldJobs(false)
	vm = e.wait(id, "running", running)
	if !slices.Equal(n.Loaded(), []string{api.SuspendTag}) || e.hasSaved(id) || vm.Status.Hardware == nil || vm.Status.Hardware.CPUs != 3 || vm.Status.Hardware.Watchdog != nil {
		t.Errorf("%v %+v", n.Loaded(), vm.Status)
	}
	e.until("the tag removed", func() bool { return len(n.Tags()["disk1"]) == 0 }, nothing)
	if a := strings.Join(e.guard.starts[1].Argv, " "); !strings.Contains(a, "cpus=3,maxcpus=8,") || !strings.Contains(a, "-machine pc-q35-7.2,usb=off") || strings.Contains(a, "i6300esb") || !strings.HasSuffix(a, " -S") {
		t.Error("the machine is not that of the suspend: ", a)
	}
}

func TestALoadThatFailsLosesNothing(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{Power: api.PowerRunning})
	e.wait(id, "running", running)
	e.done(id, api.ActionVMSuspend, "", false)
	e.wait(id, "suspended", func(vm api.VM) bool { return vm.Status.Phase == api.VMSuspended })
	e.fakes.onStart(func(n *qemuFake) { n.Tag(api.SuspendTag, 1); n.FailJob("snapshot-load", "Unknown savevm section") })
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
	vm := e.wait(id, "told", func(vm api.VM) bool {
		return vm.Status.Phase == api.VMSuspended && strings.Contains(vm.Status.Message, "Unknown savevm section")
	})
	if !strings.Contains(vm.Status.Message, "--discard-suspend") || vm.Spec.Power != api.PowerSuspended || !e.hasSaved(id) {
		t.Errorf("%+v", vm)
	}
	if n := e.fakes.qemu(); n.Count("cont") != 0 {
		t.Error("the guest ran without its memory")
	}
	e.fakes.onStart(func(n *qemuFake) { n.Tag(api.SuspendTag, 1) })
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
	e.wait(id, "running at the second try", running)
	if e.hasSaved(id) {
		t.Error("the saved state is still there")
	}
}

func TestDiscardStartsCold(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{Power: api.PowerRunning})
	e.wait(id, "running", running)
	e.done(id, api.ActionVMSuspend, "", false)
	e.wait(id, "suspended", func(vm api.VM) bool { return vm.Status.Phase == api.VMSuspended })
	_, err := configdb.Transact(t.Context(), e.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
		st, err := configdb.SavedStates.Get(v, id)
		must(t, err)
		st.Spec.Discard = true
		vm, err := configdb.VMs.Get(v, id)
		must(t, err)
		vm.Spec.Power = api.PowerRunning
		must(t, configdb.VMs.UpdateSpec(v, tx, &vm))
		return configdb.SavedStates.UpdateSpec(v, tx, &st)
	})
	must(t, err)
	e.wait(id, "running", running)
	if n := e.fakes.qemu(); len(n.Loaded()) != 0 || e.hasSaved(id) {
		t.Error("the memory was loaded")
	}
	if a := e.guard.starts[1].Argv; a[len(a)-1] == "-S" {
		t.Error("a cold start waits")
	}
}

func TestDaemonKilledAroundSuspendAndResume(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{Power: api.PowerRunning})
	e.wait(id, "running", running)
	q := e.fakes.qemu()
	// Killed after the commit and before the quit: the next life ends QEMU.
	e.done(id, api.ActionVMSuspend, "", false)
	e.stop()
	e.begin()
	e.wait(id, "suspended", func(vm api.VM) bool { return vm.Status.Phase == api.VMSuspended && vm.Status.PID == 0 })

	// Killed while it loads: what was loaded is not trusted, and never ran.
	e.fakes.onStart(func(n *qemuFake) { n.Tag(api.SuspendTag, 1); n.HoldJobs(true) })
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
	e.until("the load", func() bool {
		n := e.fakes.qemu()
		return n != q && slices.Contains(n.JobTypes(), "snapshot-load")
	}, nothing)
	first := e.fakes.qemu()
	e.stop()
	first.HoldJobs(false)
	e.fakes.onStart(func(n *qemuFake) { n.Tag(api.SuspendTag, 1) })
	e.begin()
	e.wait(id, "running", running)
	if first.Count("cont") != 0 || e.fakes.qemu() == first || e.hasSaved(id) {
		t.Error("a QEMU of an earlier life went on")
	}
}

func TestRevertOfARunningVMToMemory(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{Power: api.PowerRunning})
	e.wait(id, "running", running)
	e.done(id, api.ActionVMSnapshot, "a", true)
	s := e.snap(id, "a")
	for _, d := range s.Status.Disks { // the scripted QEMU writes no files
		must(t, e.snaps.CreateSnapshot(t.Context(), e.db.Local(), "", d.Volume, s.Status.Tag))
	}
	e.fakes.onStart(func(n *qemuFake) { n.Tag(s.Status.Tag, 1); n.HoldJobs(true) })
	e.request(id, api.ActionVMRevert, "a", false)
	e.wait(id, "loading", func(vm api.VM) bool { return strings.Contains(vm.Status.Message, "loading the memory") })
	n := e.fakes.qemu()
	if op, err := configdb.Operations.Get(e.db.Local(), id); err != nil || op.Status.Phase != api.TaskRunning {
		t.Errorf("the revert says that it is over before the memory is loaded: %+v, %v", op.Status, err)
	}
	n.HoldJobs(false)
	e.ended(id, api.TaskSucceeded)
	e.wait(id, "running", running)
	if tags := n.Tags(); len(tags["disk1"]) != 1 {
		t.Errorf("the snapshot's own tag: %v", tags)
	}
	// Forced off, then back to the same place, which fails to load.
	e.fakes.onStart(func(n *qemuFake) { n.Tag(s.Status.Tag, 1); n.FailJob("snapshot-load", "bad") })
	e.request(id, api.ActionVMRevert, "a", false)
	if st := e.ended(id, api.TaskFailed); !strings.Contains(st.Message, "could not be loaded") {
		t.Errorf("%+v", st)
	}
	e.wait(id, "suspended", func(vm api.VM) bool { return vm.Status.Phase == api.VMSuspended && vm.Status.PID == 0 })
}

func TestAForcedStopEndsAnOperation(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{Power: api.PowerRunning})
	e.wait(id, "running", running)
	q := e.fakes.qemu()
	q.HoldJobs(true)
	e.request(id, api.ActionVMSuspend, "", false)
	e.until("the job", func() bool { return len(q.JobTypes()) == 1 }, nothing)
	e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
	e.ended(id, api.TaskFailed)
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	if e.hasSaved(id) {
		t.Error("a stopped VM has saved memory")
	}
}

func TestAStopWhileMemoryIsLoadedKeepsIt(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{Power: api.PowerRunning})
	e.wait(id, "running", running)
	e.done(id, api.ActionVMSuspend, "", false)
	e.wait(id, "suspended", func(vm api.VM) bool { return vm.Status.Phase == api.VMSuspended })
	e.fakes.onStart(func(n *qemuFake) { n.Tag(api.SuspendTag, 1); n.HoldJobs(true) })
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
	e.wait(id, "loading", func(vm api.VM) bool { return strings.Contains(vm.Status.Message, "loading the memory") })
	n := e.fakes.qemu()
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerSuspended })
	e.wait(id, "suspended again", func(vm api.VM) bool { return vm.Status.Phase == api.VMSuspended && vm.Status.PID == 0 })
	if !e.hasSaved(id) || n.Count("cont") != 0 {
		t.Error("the memory is lost")
	}
}

func TestDeletingAVMTakesItsSnapshotsAlong(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{Power: api.PowerRunning})
	e.wait(id, "running", running)
	e.done(id, api.ActionVMSnapshot, "a", false)
	e.done(id, api.ActionVMSuspend, "", false)
	e.wait(id, "suspended", func(vm api.VM) bool { return vm.Status.Phase == api.VMSuspended })
	e.change(id, func(vm *api.VM) { now := e.clock.now(); vm.Meta.DeletingAt = &now })
	e.until("its volumes marked", func() bool {
		vols, err := configdb.Volumes.List(e.db.Local())
		must(t, err)
		return !slices.ContainsFunc(vols, func(v api.Volume) bool { return !v.Meta.Deleting() })
	}, nothing)
	tx := &configdb.Txn{}
	vols, err := configdb.Volumes.List(e.db.Local())
	must(t, err)
	for i := range vols {
		configdb.Volumes.Delete(tx, &vols[i])
	}
	e.commit(tx)
	e.until("gone", func() bool { _, err := configdb.VMs.Get(e.db.Local(), id); return err != nil }, nothing)
	if e.hasSaved(id) || len(e.snapshots(id)) != 0 {
		t.Error("snapshots outlive their VM")
	}
}

func TestATemporarySnapshotGoesWhenItsCopiesAreDone(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{Power: api.PowerRunning})
	e.wait(id, "running", running)
	snapID := e.request(id, api.ActionVMSnapshot, "clone-1", false)
	vol := api.Volume{Meta: api.NewMeta(api.KindVolume, "", "copy"), Spec: api.VolumeSpec{Size: api.MiB, SourceVolume: "web1-disk0", SourceSnapshot: snapID}}
	_, err := configdb.Transact(t.Context(), e.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
		vol := vol.Clone()
		s, err := configdb.Snapshots.Get(v, snapID)
		must(t, err)
		s.Spec.Temporary = true
		must(t, vol.Prepare())
		must(t, configdb.Volumes.Create(tx, &vol))
		return configdb.Snapshots.UpdateSpec(v, tx, &s)
	})
	must(t, err)
	e.ended(id, api.TaskSucceeded)
	e.h.Wake()
	if len(e.snapshots(id)) != 1 {
		t.Fatal("it went before its copy was made")
	}
	_, err = configdb.Transact(t.Context(), e.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
		now, err := configdb.Volumes.Get(v, vol.Meta.ID)
		must(t, err)
		now.Status.Phase = api.StorageReady
		return configdb.Volumes.UpdateStatus(v, tx, &now)
	})
	must(t, err)
	e.ended(id, api.TaskSucceeded)
	if len(e.snapshots(id)) != 0 {
		t.Error("it is still there")
	}
	tasks, err := configdb.Tasks.List(e.db.Local())
	if err != nil || len(tasks) != 1 || tasks[0].Spec.Action != api.ActionVMForget {
		t.Errorf("%+v, %v", tasks, err)
	}
}

func TestDaemonKilledDuringADeletion(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{Power: api.PowerRunning})
	e.wait(id, "running", running)
	q := e.fakes.qemu()
	e.done(id, api.ActionVMSnapshot, "a", true)
	q.HoldJobs(true)
	e.request(id, api.ActionVMForget, "a", false)
	e.until("the job", func() bool { return slices.Contains(q.JobTypes(), "snapshot-delete") }, nothing)
	e.stop()
	q.HoldJobs(false)
	e.begin()
	e.ended(id, api.TaskSucceeded)
	if tags := q.Tags(); len(tags["disk1"])+len(tags["disk2"]) != 0 || len(e.snapshots(id)) != 0 || len(q.JobTypes()) != 0 {
		t.Errorf("left behind: %v, %+v, %v", tags, e.snapshots(id), q.JobTypes())
	}
	e.wait(id, "running", running)
}

// Memory is saved when the status says what QEMU has. A change that comes to no
// end refuses it by name.
func TestMemoryIsSavedOfKnownHardware(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{Power: api.PowerRunning})
	e.wait(id, "running", running)
	q := e.fakes.qemu()
	q.Refuse("device_add", "not now")
	e.volume("data", id)
	e.attach(id, "data", 3)
	e.wait(id, "a failed attempt", func(vm api.VM) bool { return condition(vm, ConditionHotplugFailed) != "" })
	e.request(id, api.ActionVMSuspend, "", false)
	e.until("it waits", func() bool {
		e.clock.advance(HotplugRetry)
		e.h.Wake()
		op, err := configdb.Operations.Get(e.db.Local(), id)
		return err == nil && op.Status.Phase.Final()
	}, nothing)
	if st := e.ended(id, api.TaskFailed); !strings.Contains(st.Message, "its hardware is being changed") || !strings.Contains(st.Message, "not now") || e.hasSaved(id) {
		t.Errorf("%+v", st)
	}
	q.Refuse("device_add", "")
	e.done(id, api.ActionVMSuspend, "", false)
	st, err := configdb.SavedStates.Get(e.db.Local(), id)
	if _, has := st.Spec.Hardware.DiskIn(3); err != nil || !has || len(st.Spec.Disks) != 3 {
		t.Errorf("saved without the disk: %+v, %v", st.Spec, err)
	}
}
