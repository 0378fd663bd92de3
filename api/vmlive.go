// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import "slices"

// VMBoot is what of a VM's hardware is fixed from the start of its QEMU to its
// end: how much room there is for what is plugged in while it runs. Together
// with the rest of status.hardware it describes the machine completely, so that
// another QEMU (a migration's target, a resumed snapshot) is built the same.
type VMBoot struct {
	// Memory that the guest began with. What it has beyond that is in a
	// virtio-mem device, which can grow and shrink, up to MaxMemory in all.
	Memory    Size `json:"memory"`
	MaxMemory Size `json:"maxMemory"`
	// MaxCPUs is how many CPUs the machine has places for.
	MaxCPUs int `json:"maxCPUs"`
	// DiskPorts and NICPorts are PCIe root ports for the slots from 1 up. A
	// device in a slot beyond has no place until the next start.
	DiskPorts int `json:"diskPorts"`
	NICPorts  int `json:"nicPorts"`
	// Queues of requests of what does not say how many: QEMU would count the CPUs
	// of the moment in which it makes the device. 0 is one that QEMU chose.
	Queues int `json:"queues,omitempty"`
	// Cards are the network cards as QEMU made them; a QEMU of an earlier version
	// did not say.
	Cards []VMCard `json:"cards,omitzero"`
}

// VMCard is what the guest's device of a network card keeps as long as it has it,
// whatever becomes of the network and of the boot order meanwhile.
type VMCard struct {
	Slot int `json:"slot"`
	// MTU that the guest's driver was told, 0 for the usual.
	MTU int `json:"mtu,omitempty"`
	// ROM is whether it can boot from the network: one that was plugged in while
	// the guest ran cannot.
	ROM bool `json:"rom,omitempty"`
}

// CardIn returns the network card in a slot as QEMU made it.
func (b *VMBoot) CardIn(slot int) (VMCard, bool) {
	if b == nil {
		return VMCard{}, false
	}
	i := slices.IndexFunc(b.Cards, func(c VMCard) bool { return c.Slot == slot })
	if i < 0 {
		return VMCard{}, false
	}
	return b.Cards[i], true
}

// SetCard takes note of a card. A machine of which it is not
// known what cards it began with stays so.
func (b *VMBoot) SetCard(c VMCard) {
	b.DropCard(c.Slot)
	if b.Cards != nil {
		b.Cards = append(b.Cards, c)
	}
}

// DropCard forgets a card.
func (b *VMBoot) DropCard(slot int) {
	b.Cards = slices.DeleteFunc(b.Cards, func(c VMCard) bool { return c.Slot == slot })
}

// Conditions of a VM about a change of its running hardware: it is under way;
// QEMU refused it; it takes effect at the next start.
const (
	ConditionChanging       = "Changing"
	ConditionHotplugFailed  = "HotplugFailed"
	ConditionPendingRestart = "PendingRestart"
)

// Room for what is plugged in while the VM runs. A root port costs QEMU some
// 0.5 MB of memory and under 1 ms at its start, so not every slot has one.
const (
	// SpareDiskPorts and SpareNICPorts are free at least, ports come in groups.
	SpareDiskPorts = 2
	SpareNICPorts  = 1
	diskPortGroup  = 4
	nicPortGroup   = 2
	// MinHotMemory is the memory from which on a VM has room for more without
	// asking: where memory may come above 4 GiB, Linux sets 64 MiB aside for
	// devices that cannot reach there (swiotlb), too much for a small guest.
	MinHotMemory = 2 * GiB
	// HotplugFactor is how many times its CPUs and memory a VM may have while it
	// runs, unless it says otherwise; MaxHotMemory bounds what that adds, because
	// the processor's physical addresses are limited.
	HotplugFactor = 4
	MaxHotMemory  = 192 * GiB
	// MemoryBlock is the step in which the memory of a running VM changes.
	MemoryBlock = 2 * MiB
	// OverheadPerVM is what QEMU itself takes beside the guest's memory.
	OverheadPerVM = 64 * MiB
	// maxMachineCPUs is what QEMU's q35 machine has places for.
	maxMachineCPUs = MaxCPUs
)

// PowerOn is the hardware that a start now gives the VM, complete with Boot.
func (s *VMSpec) PowerOn() *VMSpec {
	h := s.Hardware()
	h.AssignSlots(nil)
	for i := range h.Disks {
		h.Disks[i].Limit = DiskLimit{} // set when QEMU runs, as is the state of links
	}
	for i := range h.NICs {
		h.NICs[i].Link = ""
	}
	b := &VMBoot{Memory: h.Memory, MaxMemory: h.MaxMemory, MaxCPUs: h.MaxCPUs}
	if s.fixedCPUs() {
		b.MaxCPUs = h.CPUs
	}
	switch {
	case s.fixedMemory(), b.MaxMemory == 0 && h.Memory < MinHotMemory:
		b.MaxMemory = h.Memory
	case b.MaxMemory == 0:
		b.MaxMemory = h.Memory + min((HotplugFactor-1)*h.Memory, MaxHotMemory, MaxMemory-h.Memory)
	}
	b.MaxMemory = h.Memory + max(b.MaxMemory-h.Memory, 0)/MemoryBlock*MemoryBlock
	if b.MaxCPUs == 0 {
		b.MaxCPUs = max(h.CPUs, min(HotplugFactor*h.CPUs, maxMachineCPUs))
	}
	if s.machine() != MachineMicroVM { // whose devices have one
		b.Queues = min(h.CPUs, MaxQueues)
	}
	disk, nic := 0, 0
	for _, d := range h.Disks {
		disk = max(disk, d.Slot)
	}
	for _, n := range h.NICs {
		nic = max(nic, n.Slot)
	}
	if s.machine() != MachineQ35 { // the only one with root ports
		h.Boot = b
		return h
	}
	b.DiskPorts = min(roundUp(disk+SpareDiskPorts, diskPortGroup), MaxDisks)
	b.NICPorts = min(roundUp(nic+SpareNICPorts, nicPortGroup), MaxNICs)
	h.Boot = b
	return h
}

// LinkState is the state of a virtual cable.
type LinkState string

// The states; without one the link is up.
const (
	LinkUp   LinkState = "up"
	LinkDown LinkState = "down"
)

// fixedMemory reports that QEMU's memory is laid out so that nothing can be
// added while it runs.
func (s *VMSpec) fixedMemory() bool {
	return s.machine() != MachineQ35 || len(s.NUMA) > 0 || s.Hugepages.Size() > 0
}

// fixedCPUs reports that the CPUs are arranged by the user, or cannot be added.
func (s *VMSpec) fixedCPUs() bool {
	arranged := s.CPU != nil && (s.CPU.Sockets > 0 || s.CPU.Cores > 0 || s.CPU.Threads > 0)
	return s.machine() != MachineQ35 || len(s.NUMA) > 0 || arranged
}

// Hotpluggable reports whether a disk can come and go while the VM runs.
func (d *VMDisk) Hotpluggable() bool { return d.BusOf() == BusVirtio && !d.IOThread }

func roundUp(n, step int) int { return (n + step - 1) / step * step }

// validateLive checks the fields about change while the VM runs.
func (s *VMSpec) validateLive() error {
	switch {
	case s.Boot != nil:
		return Invalid("spec.boot", "is found out by the node and shown in status.hardware only; leave it out")
	case s.MaxCPUs != 0 && (s.MaxCPUs < s.CPUs || s.MaxCPUs > maxMachineCPUs):
		return Invalid("spec.maxCPUs", "is %d; give %d (spec.cpus) to %d, or leave it out", s.MaxCPUs, s.CPUs, maxMachineCPUs)
	case s.MaxMemory != 0 && (s.MaxMemory < s.Memory || s.MaxMemory > MaxMemory):
		return Invalid("spec.maxMemory", "is %s; give %s (spec.memory) to %s, or leave it out", s.MaxMemory, s.Memory, MaxMemory)
	case s.MemoryMin != 0 && (s.MemoryMin < MinMemory || s.MemoryMin > s.Memory || s.MemoryMin%MiB != 0):
		return Invalid("spec.memoryMin", "is %s; give a multiple of 1 MiB from %s to %s (spec.memory), or leave it out", s.MemoryMin, MinMemory, s.Memory)
	case s.MaxMemory%MiB != 0:
		return Invalid("spec.maxMemory", "is %d bytes; give a multiple of 1 MiB", int64(s.MaxMemory))
	}
	return nil
}

// DiskIn returns the disk in a slot.
func (s *VMSpec) DiskIn(slot int) (VMDisk, bool) {
	i := slices.IndexFunc(s.Disks, func(d VMDisk) bool { return d.Slot == slot })
	if i < 0 {
		return VMDisk{}, false
	}
	return s.Disks[i], true
}

// NICIn returns the network card in a slot.
func (s *VMSpec) NICIn(slot int) (VMNIC, bool) {
	i := slices.IndexFunc(s.NICs, func(n VMNIC) bool { return n.Slot == slot })
	if i < 0 {
		return VMNIC{}, false
	}
	return s.NICs[i], true
}

// VMMemory is what the node decided about the memory of a VM that it may
// squeeze (spec.memoryMin).
type VMMemory struct {
	// Target is what the guest may use, between spec.memoryMin and the memory that
	// the VM has.
	Target Size `json:"target"`
	// Reason of the last change of Target.
	Reason string `json:"reason,omitempty"`
	// Silent says that the guest's balloon does not report: it has no driver, or
	// has not booted yet. Then nobody counts on memory that it might give back.
	Silent bool `json:"silent,omitempty"`
}

// Elastic reports whether the VM may be squeezed.
func (s *VMSpec) Elastic() bool {
	return s.MemoryMin > 0 && s.MemoryMin < s.Memory && !s.unsqueezable()
}

// unsqueezable reports memory that no balloon gives back: a device of the host that
// writes into the guest's memory pins all of it.
func (s *VMSpec) unsqueezable() bool {
	return s.Hugepages.Size() > 0 || slices.ContainsFunc(s.HostDevices, func(d VMHostDevice) bool { return d.PCI != "" })
}

// Elastic reports whether the VM may be squeezed as it runs now: its machine is
// that of its start, whatever the spec says of the next one.
func (st *VMStatus) Elastic(s *VMSpec) bool {
	return s.Elastic() && (st.Hardware == nil || !st.Hardware.unsqueezable())
}

// HeldMemory is what a VM takes of its node in the end: the larger of what is
// wished for and what its QEMU has; of one that can be squeezed, the minimum.
func (st *VMStatus) HeldMemory(s *VMSpec) Size {
	held := s.Memory
	if st.Hardware != nil {
		held = max(held, st.Hardware.Memory)
	}
	if !st.Elastic(s) || st.Memory != nil && st.Memory.Silent {
		return held
	}
	if st.Hardware == nil || st.Hardware.Boot == nil {
		return s.MemoryMin
	}
	// What was plugged in is in no balloon's reach.
	return min(max(s.MemoryMin, st.Hardware.Memory-st.Hardware.Boot.Memory+MinMemory), held)
}
