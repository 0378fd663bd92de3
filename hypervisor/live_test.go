// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// volume makes a volume that belongs to a VM, with its file.
func (e *env) volume(name, vmID string) api.Volume {
	e.t.Helper()
	e.vols.put(name, e.runDir+"/"+name)
	vol := api.Volume{Meta: api.NewMeta(api.KindVolume, "", name), Spec: api.VolumeSpec{Size: api.GiB}}
	tx := &configdb.Txn{}
	must(e.t, configdb.Volumes.Create(tx, &vol))
	tx.Put(configdb.Volumes.RefPrefix(vol.Meta.ID)+"vm/"+vmID, nil)
	e.commit(tx)
	return vol
}

// detach does what rest does: the disk leaves the spec, the volume is marked.
func (e *env) detach(id string, vol api.Volume) {
	e.t.Helper()
	_, err := configdb.Transact(e.t.Context(), e.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
		vm, err := configdb.VMs.Get(v, id)
		if err != nil {
			return err
		}
		vm.Spec.Disks = slices.DeleteFunc(vm.Spec.Disks, func(d api.VMDisk) bool { return d.Volume == vol.Meta.Name })
		configdb.Detach(v, tx, id, vol.Meta.ID)
		return configdb.VMs.UpdateSpec(v, tx, &vm)
	})
	must(e.t, err)
}

func (e *env) referred(vol api.Volume) bool {
	return len(configdb.Volumes.Referrers(e.db.Local(), vol.Meta.ID)) > 0
}

func condition(vm api.VM, typ string) string {
	c, _ := api.FindCondition(vm.Status.Conditions, typ)
	return c.Message
}

func (e *env) attach(id, volume string, slot int) {
	e.t.Helper()
	e.change(id, func(vm *api.VM) { vm.Spec.Disks = append(vm.Spec.Disks, api.VMDisk{Volume: volume, Slot: slot}) })
}

func hasDisk(slot int) func(api.VM) bool {
	return func(vm api.VM) bool {
		if vm.Status.Hardware == nil {
			return false
		}
		_, ok := vm.Status.Hardware.DiskIn(slot)
		return ok
	}
}

func TestADiskComesAndGoesWhileTheVMRuns(t *testing.T) {
	e := newEnv(t, false)
	id, vm := e.running(api.VMSpec{})
	if b := vm.Status.Hardware.Boot; b == nil || b.DiskPorts != 4 || b.NICPorts != 2 || b.MaxCPUs != 4 {
		t.Fatalf("%+v", b)
	}
	data := e.volume("data", id)
	e.attach(id, "data", 3)
	vm = e.wait(id, "attached", hasDisk(3))
	q := e.fakes.qemu()
	if !slices.Contains(q.Devices(), "vd3") || q.Property("vd3", "bus") != "pd3" || !slices.Contains(q.Nodes(), "file3") {
		t.Fatalf("devices %v, nodes %v", q.Devices(), q.Nodes())
	}
	if len(vm.Status.Conditions) != 0 || vm.Status.PID == 0 {
		t.Errorf("%+v", vm.Status)
	}

	q.IgnoreUnplug(true)
	e.detach(id, data)
	e.wait(id, "asked", func(vm api.VM) bool { return strings.Contains(condition(vm, ConditionChanging), "disk data (slot 3)") })
	if !e.referred(data) {
		t.Fatal("the volume was released although QEMU has it open")
	}
	e.clock.advance(UnplugTimeout)
	e.h.Wake()
	vm = e.wait(id, "the condition", func(vm api.VM) bool { return condition(vm, ConditionUnplugIgnored) != "" })
	if !hasDisk(3)(vm) || !e.referred(data) || !strings.Contains(condition(vm, ConditionUnplugIgnored), "muster vm stop web1") {
		t.Fatalf("%+v", vm.Status)
	}
	q.IgnoreUnplug(false)
	e.clock.advance(UnplugInterval)
	e.h.Wake()
	vm = e.wait(id, "detached", func(vm api.VM) bool { return !hasDisk(3)(vm) })
	e.until("released", func() bool { return !e.referred(data) }, nothing)
	if slices.Contains(q.Nodes(), "disk3") || slices.Contains(q.Nodes(), "file3") {
		t.Errorf("nodes are left: %v", q.Nodes())
	}
	e.wait(id, "quiet", func(vm api.VM) bool { return len(vm.Status.Conditions) == 0 })
}

func TestADiskGrowsWhileTheVMRuns(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	data := e.volume("data", id)
	e.attach(id, "data", 2)
	e.wait(id, "attached", hasDisk(2))
	q := e.fakes.qemu()
	change := func(f func(*api.Volume)) {
		_, err := configdb.Transact(t.Context(), e.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
			vol, err := configdb.Volumes.Get(v, data.Meta.ID)
			must(t, err)
			f(&vol)
			must(t, configdb.Volumes.UpdateSpec(v, tx, &vol))
			return configdb.Volumes.UpdateStatus(v, tx, &vol)
		})
		must(t, err)
	}
	change(func(vol *api.Volume) { vol.Status.Phase, vol.Status.Size = api.StorageReady, api.GiB })
	change(func(vol *api.Volume) { vol.Spec.Size = 2 * api.GiB })
	e.until("enlarged", func() bool { return q.Size("disk2") == float64(2*api.GiB) }, nothing)
	for range 5 {
		e.h.Wake()
	}
	change(func(vol *api.Volume) { vol.Status.Size = 2 * api.GiB })
	change(func(vol *api.Volume) { vol.Spec.Size = 3 * api.GiB })
	e.until("enlarged again", func() bool { return q.Size("disk2") == float64(3*api.GiB) }, nothing)
	if n := q.Count("block_resize"); n != 2 {
		t.Errorf("it was enlarged %d times", n)
	}
}

func TestWhatQEMURefusesLeavesNothingBehind(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	e.volume("data", id)
	q := e.fakes.qemu()
	q.Refuse("device_add", "no such bus")
	e.attach(id, "data", 2)
	vm := e.wait(id, "the condition", func(vm api.VM) bool { return condition(vm, ConditionHotplugFailed) != "" })
	if m := condition(vm, ConditionHotplugFailed); !strings.Contains(m, "disk data (slot 2): no such bus") || hasDisk(2)(vm) {
		t.Fatalf("%s, %+v", m, vm.Status.Hardware)
	}
	if slices.Contains(q.Nodes(), "disk2") || slices.Contains(q.Nodes(), "file2") || slices.Contains(q.Devices(), "vd2") {
		t.Fatalf("left: %v, %v", q.Nodes(), q.Devices())
	}
	q.Refuse("device_add", "")
	e.clock.advance(HotplugRetry)
	e.h.Wake()
	e.wait(id, "attached", func(vm api.VM) bool { return hasDisk(2)(vm) && len(vm.Status.Conditions) == 0 })
}

// A daemon that dies between the command and the status finds the device.
func TestAPluggedDeviceIsFoundAgain(t *testing.T) {
	e := newEnv(t, false)
	id, vm := e.running(api.VMSpec{})
	data := e.volume("data", id)
	before := vm.Status.Hardware
	e.attach(id, "data", 2)
	e.wait(id, "attached", hasDisk(2))
	e.stop()
	forget := func(change func(*api.VM)) {
		_, err := configdb.Transact(t.Context(), e.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
			vm, err := configdb.VMs.Get(v, id)
			must(t, err)
			change(&vm)
			return configdb.VMs.UpdateStatus(v, tx, &vm)
		})
		must(t, err)
	}
	forget(func(vm *api.VM) { vm.Status.Hardware = before })
	q := e.fakes.qemu()
	adds := q.Count("device_add")
	e.begin()
	e.wait(id, "found again", hasDisk(2))
	if n := q.Count("device_add"); n != adds {
		t.Errorf("it was added %d times more", n-adds)
	}
	// The same, and the user changed his mind meanwhile.
	e.stop()
	forget(func(vm *api.VM) { vm.Status.Hardware = before })
	e.detach(id, data)
	e.begin()
	e.until("released", func() bool { return !e.referred(data) }, nothing)
	if slices.Contains(q.Devices(), "vd2") || slices.Contains(q.Nodes(), "disk2") {
		t.Errorf("released while QEMU has it: %v", q.Nodes())
	}
	// Without any status the note beside the sockets says what was started.
	e.stop()
	e.change(id, func(vm *api.VM) { vm.Spec.MaxCPUs = 77 })
	forget(func(vm *api.VM) { vm.Status.Hardware = nil })
	e.begin()
	vm = e.wait(id, "hardware", func(vm api.VM) bool { return vm.Status.Hardware != nil })
	if vm.Status.Hardware.MaxCPUs != 0 || vm.Status.Hardware.Boot == nil {
		t.Errorf("%+v", vm.Status.Hardware)
	}
}

func TestWhatTakesARestartIsSaidAndAppliedByIt(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	e.volume("data", id)
	e.attach(id, "data", 9) // beyond the ports of this start
	e.change(id, func(vm *api.VM) { vm.Spec.MaxMemory = 64 * api.GiB })
	vm := e.wait(id, "the condition", func(vm api.VM) bool {
		return strings.Contains(condition(vm, ConditionPendingRestart), "disks (slot 9), maxMemory")
	})
	if m := condition(vm, ConditionPendingRestart); !strings.Contains(m, "a reboot of the guest is not enough") || hasDisk(9)(vm) {
		t.Fatal(m)
	}
	e.change(id, func(vm *api.VM) { vm.Spec.Reboots++ })
	vm = e.wait(id, "rebooted", func(vm api.VM) bool { return vm.Status.RebootsDone == 1 })
	if condition(vm, ConditionPendingRestart) == "" {
		t.Error("a reboot of the guest took it for a restart")
	}
	e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped && vm.Status.Hardware == nil })
	e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerRunning, false })
	vm = e.wait(id, "running", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning && hasDisk(9)(vm) })
	if len(vm.Status.Conditions) != 0 || vm.Status.Hardware.Boot.MaxMemory != 64*api.GiB || vm.Status.Hardware.Boot.DiskPorts != 12 {
		t.Errorf("%+v %+v", vm.Status, vm.Status.Hardware.Boot)
	}
}

// A volume that the guest never let go of is free when its QEMU has ended.
func TestTheEndOfQEMULetsGoOfEverything(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	data := e.volume("data", id)
	e.attach(id, "data", 2)
	e.wait(id, "attached", hasDisk(2))
	e.fakes.qemu().IgnoreUnplug(true)
	e.detach(id, data)
	e.wait(id, "asked", func(vm api.VM) bool { return condition(vm, ConditionChanging) != "" })
	e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	e.until("released", func() bool { return !e.referred(data) }, nothing)
}

func TestACardComesMovesAndGoes(t *testing.T) {
	e := newEnv(t, false)
	tx := &configdb.Txn{}
	for _, n := range []api.Network{
		{Meta: api.NewMeta(api.KindNetwork, "", "lab"), Spec: api.NetworkSpec{Type: api.NetworkVXLAN, VNI: 7}},
		{Meta: api.NewMeta(api.KindNetwork, "", "lab2"), Spec: api.NetworkSpec{Type: api.NetworkVXLAN, VNI: 8}},
		{Meta: api.NewMeta(api.KindNetwork, "", "alone"), Spec: api.NetworkSpec{Type: api.NetworkIsolated}},
	} {
		must(t, configdb.Networks.Create(tx, &n))
	}
	e.commit(tx)
	id, _ := e.running(api.VMSpec{})
	q := e.fakes.qemu()
	nic := api.VMNIC{Network: "lab", MAC: "52:54:00:00:00:01", Slot: 2}
	e.ports.set(errors.New("Open vSwitch does not run"))
	e.change(id, func(vm *api.VM) { vm.Spec.NICs = []api.VMNIC{nic} })
	e.wait(id, "the reason", func(vm api.VM) bool {
		return strings.Contains(condition(vm, ConditionChanging), "Open vSwitch does not run")
	})
	e.ports.set(nil)
	e.h.Wake()
	is := func(want api.VMNIC) func(api.VM) bool {
		return func(vm api.VM) bool {
			got, ok := vm.Status.Hardware.NICIn(2)
			return ok && got == want && len(vm.Status.Conditions) == 0
		}
	}
	e.wait(id, "plugged", is(nic))
	if q.Property("nic2", "mac") != nic.MAC || q.Property("nic2", "bus") != "pn2" {
		t.Fatal(q.Devices())
	}
	down := nic
	down.Link = api.LinkDown
	e.change(id, func(vm *api.VM) { vm.Spec.NICs = []api.VMNIC{down} })
	e.wait(id, "unplugged cable", is(down))
	if q.Property("nic2", "up") != false {
		t.Error("the link is up")
	}
	nic.Network = "lab2"
	e.clock.hold()
	e.change(id, func(vm *api.VM) { vm.Spec.NICs = []api.VMNIC{nic} })
	e.wait(id, "moved, cable out", func(vm api.VM) bool {
		got, _ := vm.Status.Hardware.NICIn(2)
		return got.Network == "lab2" && got.Link == api.LinkDown
	})
	e.clock.goOn()
	e.clock.advance(LinkPause)
	e.h.Wake()
	e.wait(id, "moved", is(nic))
	if q.Property("nic2", "up") != true || q.Count("device_add") != 1 {
		t.Error("link", q.Property("nic2", "up"), "device_add", q.Count("device_add"))
	}
	nic.Network = "alone" // with another MTU, which the device was told at its start
	e.change(id, func(vm *api.VM) { vm.Spec.NICs = []api.VMNIC{nic} })
	e.wait(id, "plugged anew", is(nic))
	if q.Count("device_add") != 2 {
		t.Error("device_add", q.Count("device_add"))
	}
	e.change(id, func(vm *api.VM) { vm.Spec.NICs = nil })
	e.wait(id, "gone", func(vm api.VM) bool { return len(vm.Status.Hardware.NICs) == 0 && len(vm.Status.Conditions) == 0 })
	if _, calls := e.ports.left(); !slices.Contains(calls, "unplug slot 2") || slices.Contains(q.Devices(), "nic2") {
		t.Error(calls, q.Devices())
	}
}

func TestCPUsMemoryAndLimitsChangeWhileTheVMRuns(t *testing.T) {
	e := newEnv(t, false)
	id, vm := e.running(api.VMSpec{CPUs: 1, Memory: 512 * api.MiB, MaxMemory: 2 * api.GiB})
	q := e.fakes.qemu()
	if b := vm.Status.Hardware.Boot; b.Memory != 512*api.MiB || b.MaxMemory != 2*api.GiB {
		t.Fatalf("%+v", b)
	}
	e.change(id, func(vm *api.VM) {
		vm.Spec.CPUs, vm.Spec.Memory = 3, 768*api.MiB
		vm.Spec.Disks[0].Limit = api.DiskLimit{IOPS: 100, BPSWrite: api.MiB, Burst: 5}
	})
	vm = e.wait(id, "changed", func(vm api.VM) bool {
		h := vm.Status.Hardware
		return h.CPUs == 3 && h.Memory == 768*api.MiB && h.Disks[0].Limit.IOPS == 100 && len(vm.Status.Conditions) == 0
	})
	if !slices.Contains(q.Devices(), "cpu1") || !slices.Contains(q.Devices(), "cpu2") || slices.Contains(q.Devices(), "cpu3") {
		t.Error(q.Devices())
	}
	if n := q.Property("vmem0", "requested-size"); n != float64(256*api.MiB) {
		t.Error(n)
	}
	if got, _ := q.Property("vd1", "throttle").(map[string]any); got["iops"] != 100.0 || got["iops_max"] != 500.0 || got["bps_wr"] != float64(api.MiB) || got["bps"] != 0.0 {
		t.Error(got)
	}
	// A CPU cannot be taken away under TCG, and memory of the start not at all.
	e.change(id, func(vm *api.VM) { vm.Spec.CPUs, vm.Spec.Memory = 1, 256*api.MiB })
	vm = e.wait(id, "pending", func(vm api.VM) bool {
		return strings.Contains(condition(vm, ConditionPendingRestart), "cpus, memory") && vm.Status.Hardware.Memory == 512*api.MiB
	})
	if q.Count("device_del") != 0 || vm.Status.Hardware.CPUs != 3 {
		t.Errorf("%+v", vm.Status.Hardware)
	}

	q.IgnoreUnplug(true) // a guest without the driver
	e.change(id, func(vm *api.VM) { vm.Spec.CPUs, vm.Spec.Memory = 3, api.GiB })
	vm = e.wait(id, "changing", func(vm api.VM) bool {
		return strings.Contains(condition(vm, ConditionChanging), "take 1 GiB of memory, it has 512 MiB")
	})
	if vm.Status.Hardware.Memory != api.GiB {
		t.Error("what the guest may take is not counted", vm.Status.Hardware.Memory)
	}
	e.clock.advance(UnplugTimeout)
	e.h.Wake()
	e.wait(id, "the condition", func(vm api.VM) bool { return strings.Contains(condition(vm, ConditionMemoryIgnored), "virtio_mem") })
	q.SetProperty("vmem0", "size", int64(512*api.MiB))
	q.Emit("MEMORY_DEVICE_SIZE_CHANGE", `{"id": "vmem0", "size": 536870912, "qom-path": "/machine/peripheral/vmem0"}`)
	e.wait(id, "taken", func(vm api.VM) bool { return len(vm.Status.Conditions) == 0 })
}

// A daemon that comes anew sets what QEMU does not keep itself, and finds the
// CPUs that an earlier one plugged in.
func TestANewDaemonTrustsNothing(t *testing.T) {
	e := newEnv(t, false)
	id, vm := e.running(api.VMSpec{})
	before := vm.Status.Hardware
	e.change(id, func(vm *api.VM) { vm.Spec.CPUs = 2; vm.Spec.Disks[0].Limit.BPS = 7 * api.MiB })
	e.wait(id, "changed", func(vm api.VM) bool {
		return vm.Status.Hardware.CPUs == 2 && vm.Status.Hardware.Disks[0].Limit.BPS != 0
	})
	e.stop()
	q := e.fakes.qemu()
	n := q.Count("block_set_io_throttle")
	e.change(id, func(vm *api.VM) { vm.Spec.CPUs = 1 })
	_, err := configdb.Transact(t.Context(), e.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
		vm, err := configdb.VMs.Get(v, id)
		must(t, err)
		vm.Status.Hardware.CPUs = before.CPUs
		return configdb.VMs.UpdateStatus(v, tx, &vm)
	})
	must(t, err)
	e.begin()
	e.wait(id, "the truth", func(vm api.VM) bool {
		return vm.Status.Hardware.CPUs == 2 && strings.Contains(condition(vm, ConditionPendingRestart), "cpus")
	})
	if q.Count("block_set_io_throttle") != n+1 {
		t.Error("the limit was not set again")
	}
}

// A wish to detach that is taken back leaves the disk, and if the guest lets go
// of it all the same, it is plugged in anew.
func TestAWishIsTakenBack(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	data := e.volume("data", id)
	e.attach(id, "data", 2)
	e.wait(id, "attached", hasDisk(2))
	q := e.fakes.qemu()
	q.IgnoreUnplug(true)
	e.detach(id, data)
	e.wait(id, "asked", func(vm api.VM) bool { return condition(vm, ConditionChanging) != "" })
	_, err := configdb.Transact(t.Context(), e.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
		vm, err := configdb.VMs.Get(v, id)
		must(t, err)
		vm.Spec.Disks = append(vm.Spec.Disks, api.VMDisk{Volume: "data", Slot: 2})
		if !configdb.KeepAttached(v, tx, id, data.Meta.ID) {
			t.Error("no mark")
		}
		return configdb.VMs.UpdateSpec(v, tx, &vm)
	})
	must(t, err)
	e.wait(id, "quiet", func(vm api.VM) bool {
		return len(vm.Status.Conditions) == 0 && vm.Status.ObservedGeneration == vm.Meta.Generation
	})
	asked, added := q.Count("device_del"), q.Count("device_add")
	e.clock.advance(time.Hour)
	e.h.Wake()
	q.LetGo("vd2")
	e.until("plugged in anew", func() bool { return q.Count("device_add") == added+1 }, nothing)
	e.wait(id, "whole", func(vm api.VM) bool { return hasDisk(2)(vm) && len(vm.Status.Conditions) == 0 })
	if q.Count("device_del") != asked || !e.referred(data) {
		t.Error("it was asked again, or the volume released")
	}
	// To another slot: the old one first, so that the file is open once.
	q.IgnoreUnplug(false)
	e.change(id, func(vm *api.VM) { vm.Spec.Disks[1].Slot = 4 })
	e.wait(id, "moved", func(vm api.VM) bool { return hasDisk(4)(vm) && !hasDisk(2)(vm) && len(vm.Status.Conditions) == 0 })
	if slices.Contains(q.Nodes(), "disk2") || !e.referred(data) {
		t.Error(q.Nodes())
	}
}

// An operation such as a migration finds the hardware as it is.
func TestHardwareStaysWhileAnOperationWorks(t *testing.T) {
	e := newEnv(t, false)
	id, vm := e.running(api.VMSpec{})
	e.volume("data", id)
	op := api.Operation{Meta: api.NewMeta(api.KindOperation, "", "web1"), Spec: api.OperationSpec{Action: "vm.test", VM: "web1", NodeID: "node-1"}}
	op.Meta.ID = id
	tx := &configdb.Txn{}
	must(t, configdb.Operations.CreateUnnamed(tx, &op))
	e.commit(tx)
	e.attach(id, "data", 2)
	e.wait(id, "seen", func(now api.VM) bool { return now.Status.ObservedGeneration > vm.Status.ObservedGeneration })
	if e.fakes.qemu().Count("device_add") != 0 {
		t.Fatal("the hardware was changed")
	}
	tx = &configdb.Txn{}
	op, err := configdb.Operations.Get(e.db.Local(), id)
	must(t, err)
	configdb.Operations.DeleteUnnamed(tx, &op)
	e.commit(tx)
	e.h.Wake()
	e.wait(id, "attached", hasDisk(2))
}

func TestDifferencesNameWhatTheyAre(t *testing.T) {
	hw := &api.VMSpec{CPUs: 1, Memory: api.GiB, Disks: []api.VMDisk{{Volume: "a", Slot: 1}, {Volume: "b", Slot: 2}}}
	for name, c := range map[string]struct {
		change func(*api.VMSpec)
		want   string
	}{
		"nothing":              {func(*api.VMSpec) {}, ""},
		"wishes about power":   {func(s *api.VMSpec) { s.Power, s.HA, s.Reboots = api.PowerPaused, api.HARestart, 3 }, ""},
		"cpus and memory":      {func(s *api.VMSpec) { s.CPUs, s.Memory = 2, 2*api.GiB }, "cpus memory"},
		"another volume":       {func(s *api.VMSpec) { s.Disks[1].Volume = "c" }, "disks (slot 2)"},
		"a disk less":          {func(s *api.VMSpec) { s.Disks = s.Disks[:1] }, "disks (slot 2)"},
		"the order of disks":   {func(s *api.VMSpec) { slices.Reverse(s.Disks) }, "disks (their order)"},
		"a first network card": {func(s *api.VMSpec) { s.NICs = []api.VMNIC{{Network: "lab", Slot: 1}} }, "nics (slot 1)"},
	} {
		want := hw.Hardware()
		c.change(want)
		if got := strings.Join(differences(hw, want), " "); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}
