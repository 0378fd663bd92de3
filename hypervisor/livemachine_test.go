// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// lastArgv are the arguments of the QEMU that was started last.
func (e *env) lastArgv() string {
	e.guard.mu.Lock()
	defer e.guard.mu.Unlock()
	return strings.Join(e.guard.starts[len(e.guard.starts)-1].Argv, " ")
}

// Every field of the machine may be changed while the VM runs; the condition names
// it, the next start has it.
func TestAnotherMachineWaitsForTheNextStart(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{CPUs: 2})
	for name, change := range map[string]func(*api.VMSpec){
		"bootOrder":   func(s *api.VMSpec) { s.BootOrder = []string{"disk0"} },
		"cdroms":      func(s *api.VMSpec) { s.CDROMs = []api.VMCDROM{{Bus: api.BusSATA}} },
		"cpu":         func(s *api.VMSpec) { s.CPU = &api.VMCPU{Model: "qemu64"} },
		"display":     func(s *api.VMSpec) { s.Display = api.DisplayNone },
		"extraArgs":   func(s *api.VMSpec) { s.ExtraArgs = []string{"-no-hpet"} },
		"hostDevices": func(s *api.VMSpec) { s.HostDevices = []api.VMHostDevice{{USB: "046d:c52b"}} },
		"hugepages":   func(s *api.VMSpec) { s.Hugepages = api.Hugepages2M },
		"kernel":      func(s *api.VMSpec) { s.Kernel = &api.VMKernel{Image: "linux"} },
		"machine":     func(s *api.VMSpec) { s.Machine = api.MachinePC },
		"maxCPUs":     func(s *api.VMSpec) { s.MaxCPUs = 9 },
		"numa":        func(s *api.VMSpec) { s.NUMA = []api.VMNUMANode{{CPUs: "0-1", Memory: 64 * api.MiB}} },
		"tpm":         func(s *api.VMSpec) { s.TPM = &api.VMTPM{Volume: "web1-tpm"} },
		"firmware":    func(s *api.VMSpec) { s.Firmware = &api.VMFirmware{Type: api.FirmwareUEFI, Volume: "web1-uefi"} },
		"vsock":       func(s *api.VMSpec) { s.Vsock = &api.VMVsock{CID: 7} },
		"watchdog":    func(s *api.VMSpec) { s.Watchdog = &api.VMWatchdog{Action: api.WatchdogPause} },
	} {
		was := e.vm(id).Spec
		e.change(id, func(vm *api.VM) { change(&vm.Spec) })
		vm := e.wait(id, name, func(vm api.VM) bool { return strings.Contains(condition(vm, ConditionPendingRestart), ": "+name) })
		if vm.Status.Phase != api.VMRunning || vm.Status.PID == 0 {
			t.Errorf("%s: %+v", name, vm.Status)
		}
		e.change(id, func(vm *api.VM) { vm.Spec = was })
		e.wait(id, name+" taken back", func(vm api.VM) bool { return len(vm.Status.Conditions) == 0 })
	}
	// What means the same is no change.
	e.change(id, func(vm *api.VM) {
		vm.Spec.Machine, vm.Spec.Firmware, vm.Spec.Hugepages = api.MachineQ35, &api.VMFirmware{Type: api.FirmwareBIOS}, api.HugepagesOff
	})
	vm := e.wait(id, "seen", func(vm api.VM) bool { return vm.Status.ObservedGeneration == vm.Meta.Generation })
	if len(vm.Status.Conditions) != 0 {
		t.Errorf("%+v", vm.Status.Conditions)
	}
	e.change(id, func(vm *api.VM) {
		vm.Spec.Watchdog, vm.Spec.Machine = &api.VMWatchdog{Action: api.WatchdogPause}, api.MachinePC
	})
	e.wait(id, "pending", func(vm api.VM) bool {
		return strings.Contains(condition(vm, ConditionPendingRestart), ": machine, watchdog")
	})
	e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerRunning, false })
	vm = e.wait(id, "running", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning && vm.Status.Hardware != nil })
	if args := e.lastArgv(); !strings.Contains(args, "i6300esb") || !strings.Contains(args, "-machine pc,") || len(vm.Status.Conditions) != 0 {
		t.Errorf("%s %+v", args, vm.Status.Conditions)
	}
}

// What a suspended guest goes on with stays its own, whatever its VM was told for the
// next start before.
func TestWhatASuspendedGuestNeedsIsKept(t *testing.T) {
	e := newEnv(t, false)
	one := e.image("one", "")
	id := e.twoDisks(twoDrives())
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
	e.wait(id, "running", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning && vm.Status.Hardware != nil })
	e.reread(id, 0, "one", false)
	_, err := configdb.Transact(t.Context(), e.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
		vm, err := configdb.VMs.Get(v, id)
		must(t, err)
		configdb.ReleaseImageLater(v, tx, &vm, "one")
		vm.Spec.CDROMs = nil // fewer drives: at the next start
		return configdb.VMs.UpdateSpec(v, tx, &vm)
	})
	must(t, err)
	e.wait(id, "pending", func(vm api.VM) bool {
		return strings.Contains(condition(vm, ConditionPendingRestart), "cdroms (drive 0)")
	})
	e.done(id, api.ActionVMSuspend, "", false)
	e.wait(id, "suspended", func(vm api.VM) bool { return vm.Status.Phase == api.VMSuspended })
	if !e.read(one) {
		t.Fatal("the image of the machine that is saved can be deleted")
	}
	e.fakes.onStart(func(q *qemuFake) { q.Tag(api.SuspendTag, 1) })
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
	vm := e.wait(id, "running again", func(vm api.VM) bool {
		return vm.Status.Phase == api.VMRunning && !e.hasSaved(id) && condition(vm, ConditionPendingRestart) != ""
	})
	if !strings.Contains(e.lastArgv(), "one.iso") || !e.read(one) || len(vm.Status.Hardware.CDROMs) != 2 {
		t.Errorf("%+v %s", vm.Status.Hardware, e.lastArgv())
	}
	e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	e.until("released", func() bool { return !e.read(one) }, nothing)
}

func (e *env) makeNetwork(name string, spec api.NetworkSpec) api.Network {
	e.t.Helper()
	n := api.Network{Meta: api.NewMeta(api.KindNetwork, "", name), Spec: spec}
	tx := &configdb.Txn{}
	must(e.t, configdb.Networks.Create(tx, &n))
	e.commit(tx)
	return n
}

// Memory is loaded into the cards that it knows: a card that was plugged in has no
// ROM, whatever the boot order says of its place, and each has the MTU that its
// driver was told, whatever became of the network. Then the card is brought up to
// date.
func TestCardsAreThoseOfTheGuestsMemory(t *testing.T) {
	e := newEnv(t, false)
	lab := e.makeNetwork("lab", api.NetworkSpec{Type: api.NetworkVXLAN, VNI: 7})
	first := api.VMNIC{Network: "lab", MAC: "52:54:00:00:00:01", Slot: 1}
	second := api.VMNIC{Network: "lab", MAC: "52:54:00:00:00:02", Slot: 2}
	id := e.twoDisks(api.VMSpec{NICs: []api.VMNIC{first}, BootOrder: []string{"nic0", "disk0"}, Power: api.PowerRunning})
	e.wait(id, "running", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning && vm.Status.Hardware != nil })
	if args := e.lastArgv(); !strings.Contains(args, "id=nic1,netdev=net1,mac=52:54:00:00:00:01,bus=pn1,host_mtu=1450,bootindex=1 ") {
		t.Fatal(args)
	}
	e.change(id, func(vm *api.VM) { vm.Spec.NICs = []api.VMNIC{second} }) // nic0 is another one now
	vm := e.wait(id, "exchanged", func(vm api.VM) bool {
		_, gone := vm.Status.Hardware.NICIn(1)
		_, came := vm.Status.Hardware.NICIn(2)
		return !gone && came && len(vm.Status.Conditions) == 0
	})
	if cards := vm.Status.Hardware.Boot.Cards; len(cards) != 1 || cards[0] != (api.VMCard{Slot: 2, MTU: 1450}) {
		t.Errorf("%+v", cards)
	}
	e.done(id, api.ActionVMSuspend, "", false)
	e.wait(id, "suspended", func(vm api.VM) bool { return vm.Status.Phase == api.VMSuspended })
	e.fakes.onStart(func(q *qemuFake) { q.Tag(api.SuspendTag, 1) })
	tx := &configdb.Txn{} // the network is another one by the time it goes on
	configdb.Networks.Delete(tx, &lab)
	e.commit(tx)
	e.makeNetwork("lab", api.NetworkSpec{Type: api.NetworkIsolated})
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
	e.wait(id, "running again", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning && !e.hasSaved(id) })
	if args := e.lastArgv(); !strings.Contains(args, "id=nic2,netdev=net2,mac=52:54:00:00:00:02,bus=pn2,host_mtu=1450,romfile= ") || strings.Contains(args, "nic2,netdev=net2,mac=52:54:00:00:00:02,bus=pn2,host_mtu=1450,bootindex") {
		t.Fatal(args)
	}
	e.wait(id, "brought up to date", func(vm api.VM) bool {
		if vm.Status.Hardware == nil {
			return false
		}
		c, ok := vm.Status.Hardware.Boot.CardIn(2)
		return ok && c.MTU == 0 && len(vm.Status.Conditions) == 0
	})
	if q := e.fakes.qemu(); q.Count("device_add") != 1 || q.Property("nic2", "host_mtu") != nil {
		t.Errorf("added %d times, MTU %v", q.Count("device_add"), q.Property("nic2", "host_mtu"))
	}
}

// A device that the guest was asked to let go of keeps its memory from being saved,
// for a while, and then the operation fails with the reason.
func TestMemoryIsNotSavedWhileADeviceLeaves(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{Power: api.PowerRunning})
	e.wait(id, "running", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning && vm.Status.Hardware != nil })
	e.fakes.qemu().IgnoreUnplug(true)
	vol, err := configdb.Volumes.Find(e.db.Local(), "", "web1-disk1")
	must(t, err)
	e.detach(id, vol)
	e.wait(id, "asked", func(vm api.VM) bool { return condition(vm, ConditionChanging) != "" })
	e.request(id, api.ActionVMSuspend, "", false)
	e.until("it fails", func() bool {
		e.clock.advance(UnplugTimeout / 2)
		e.h.Wake()
		op, err := configdb.Operations.Get(e.db.Local(), id)
		return err == nil && op.Status.Phase.Final()
	}, nothing)
	if st := e.ended(id, api.TaskFailed); !strings.Contains(st.Message, "its hardware is being changed") {
		t.Errorf("%+v", st)
	}
	if e.fakes.qemu().Count("snapshot-save") != 0 {
		t.Error("the memory was saved")
	}
}

// A machine without hot-plug has its limits and cables all the same.
func TestAMachineWithoutPortsIsLimited(t *testing.T) {
	e := newEnv(t, false)
	e.makeNetwork("lab", api.NetworkSpec{Type: api.NetworkIsolated})
	card := api.VMNIC{Network: "lab", MAC: "52:54:00:00:00:01", Slot: 1}
	id, vm := e.running(api.VMSpec{Machine: api.MachinePC, NICs: []api.VMNIC{card}})
	if b := vm.Status.Hardware.Boot; b.NICPorts != 0 || b.DiskPorts != 0 {
		t.Fatalf("%+v", b)
	}
	card.Limit, card.Link = api.NICLimit{BPSIn: api.MiB}, api.LinkDown
	e.change(id, func(vm *api.VM) {
		vm.Spec.NICs, vm.Spec.Disks[0].Limit = []api.VMNIC{card}, api.DiskLimit{IOPS: 100}
	})
	e.wait(id, "limited", func(vm api.VM) bool {
		hw := vm.Status.Hardware
		return len(vm.Status.Conditions) == 0 && hw.NICs[0] == card && hw.Disks[0].Limit.IOPS == 100
	})
	if q := e.fakes.qemu(); q.Property("nic1", "up") != false || q.Count("device_add") != 0 || q.Count("device_del") != 0 {
		t.Error(q.Property("nic1", "up"))
	}
	e.change(id, func(vm *api.VM) { vm.Spec.NICs = nil })
	e.wait(id, "pending", func(vm api.VM) bool { return strings.Contains(condition(vm, ConditionPendingRestart), "nics (slot 1)") })
}
