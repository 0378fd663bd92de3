// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"fmt"
	"time"
)

// VM is a virtual machine.
type VM = Object[VMSpec, VMStatus]

// PowerState is the wish for a VM.
type PowerState string

// The power states that a user can wish for.
const (
	PowerStopped PowerState = "stopped"
	PowerRunning PowerState = "running"
	PowerPaused  PowerState = "paused"
	// PowerSuspended: the memory is on disk. Only a suspend makes it so.
	PowerSuspended PowerState = "suspended"
)

// HAPolicy says what happens to a VM when its node is lost.
type HAPolicy string

// The policies. A VM with HANone stays bound to its node until that node
// returns; one with HARestart is killed by its node's guard when the node
// loses its lease, and is restarted elsewhere.
const (
	HANone    HAPolicy = "none"
	HARestart HAPolicy = "restart"
)

// Limits of a VM's hardware.
const (
	MaxCPUs   = 255 // of QEMU's machines without interrupt remapping
	MinMemory = 16 * MiB
	MaxMemory = 8 * TiB
	MaxDisks  = 24
	MinDisk   = 1 * MiB
	MaxDisk   = 256 * TiB
)

// VMSpec is the wish.
type VMSpec struct {
	// CPUs is the number of virtual CPUs, 1-255.
	CPUs int `json:"cpus" minimum:"1" maximum:"255" doc:"virtual CPUs"`
	// Memory of the guest: 16 MiB to 8 TiB, a multiple of 1 MiB.
	Memory Size `json:"memory" doc:"guest memory in bytes, or a string such as 512M"`
	// Disks in boot order, at most 24.
	Disks []VMDisk `json:"disks,omitempty" maxItems:"24"`
	// NICs in order of the guest's slots, at most 8.
	NICs []VMNIC `json:"nics,omitempty" maxItems:"8"`
	// Machine is q35 (default), pc or microvm.
	Machine MachineType `json:"machine,omitempty" enum:"q35,pc,microvm"`
	// CPU is the model and arrangement of the CPUs.
	CPU *VMCPU `json:"cpu,omitempty"`
	// Firmware is BIOS or UEFI.
	Firmware *VMFirmware `json:"firmware,omitempty"`
	// Kernel is started directly, without a boot loader.
	Kernel *VMKernel `json:"kernel,omitempty"`
	// TPM gives the VM a TPM 2.0.
	TPM *VMTPM `json:"tpm,omitempty"`
	// NUMA nodes of the guest, at most 16; without any it has one.
	NUMA []VMNUMANode `json:"numa,omitempty" maxItems:"16"`
	// Hugepages that back the memory: off (default), 2M or 1G.
	Hugepages Hugepages `json:"hugepages,omitempty" enum:"off,2M,1G"`
	// Watchdog gives the VM a watchdog.
	Watchdog *VMWatchdog `json:"watchdog,omitempty"`
	// Vsock gives the VM a socket to its host.
	Vsock *VMVsock `json:"vsock,omitempty"`
	// CDROMs are the VM's CD-ROM drives, at most 4.
	CDROMs []VMCDROM `json:"cdroms,omitempty" maxItems:"4"`
	// BootOrder names what to boot from, in order: disk0, cdrom1, nic0. Without
	// it: the disks, then the drives.
	BootOrder []string `json:"bootOrder,omitempty"`
	// HostDevices of the node that the VM has for itself, at most 16.
	HostDevices []VMHostDevice `json:"hostDevices,omitempty" maxItems:"16"`
	// ExtraArgs are added to QEMU's arguments. Only administrators may set them.
	ExtraArgs []string `json:"extraArgs,omitempty" maxItems:"64"`
	// MaxCPUs and MaxMemory are how far CPUs and memory can be raised while the VM
	// runs; four times what it starts with when left out.
	MaxCPUs   int  `json:"maxCPUs,omitempty" minimum:"0" maximum:"255"`
	MaxMemory Size `json:"maxMemory,omitempty"`
	// MemoryMin lets the node take memory from the guest, through its balloon, down
	// to this, when it is short of memory. Without it the guest keeps its memory.
	MemoryMin Size `json:"memoryMin,omitempty"`
	// Boot is set in status.hardware only.
	Boot *VMBoot `json:"boot,omitempty" doc:"what is fixed while the VM runs; in status.hardware only"`
	// HA is "none" (default) or "restart".
	HA HAPolicy `json:"ha,omitempty" enum:"none,restart"`
	// Recovery says how the VM is recovered.
	Recovery *VMRecovery `json:"recovery,omitempty"`
	// Power is the wished power state: stopped (default), running or paused;
	// suspended is set by POST /vms/{name}/suspend only.
	Power PowerState `json:"power,omitempty" enum:"stopped,running,paused,suspended"`
	// ForceStop makes a stop immediate, like pulling the plug, instead of the
	// ACPI power button. Meaningful with power "stopped".
	ForceStop bool `json:"forceStop,omitempty"`
	// Reboots counts the reboots asked for; raising it reboots a running guest
	// once (QMP system_reset).
	Reboots uint64 `json:"reboots,omitempty"`
	// Display is "vnc" (default) or "none"; it is changed while the VM is stopped.
	Display Display `json:"display,omitempty" enum:"vnc,none"`
	// CloudInit is what the guest is told at its first boot; nothing when absent.
	CloudInit *CloudInit `json:"cloudInit,omitempty"`
	// Limits of what the VM may take of its host; changed while it runs.
	Limits *VMLimits `json:"limits,omitempty"`
}

// VMDisk is one disk: an existing volume, or a new one made with the VM as a
// linked clone of an image or empty.
type VMDisk struct {
	// Volume is the name of the volume; when empty at creation it is made as
	// "<vm>-disk<N>".
	Volume string `json:"volume,omitempty"`
	// Image is the name of the image to clone, at creation only.
	Image string `json:"image,omitempty"`
	// Size of a new disk: 1 MiB to 256 TiB. With an image, 0 means the image's.
	Size Size `json:"size,omitempty"`
	// Pool is the name of the pool for a new disk; "local" when empty.
	Pool string `json:"pool,omitempty"`
	// Slot is the disk's place in the guest's hardware, 1-24. It is chosen when
	// left out and stays with the volume.
	Slot int `json:"slot,omitempty" minimum:"0" maximum:"24"`
	// Bus is virtio (default), scsi, or sata on q35 and ide on pc.
	Bus DiskBus `json:"bus,omitempty" enum:"virtio,scsi,sata,ide"`
	// Cache is writeback (default), none, writethrough or directsync.
	Cache DiskCache `json:"cache,omitempty" enum:"writeback,none,writethrough,directsync"`
	// AIO is threads (default), io_uring or native.
	AIO DiskAIO `json:"aio,omitempty" enum:"threads,io_uring,native"`
	// IOThread gives the disk a thread of its own; disks on scsi share that of
	// their controller.
	IOThread bool `json:"iothread,omitempty"`
	// Discard is unmap (default) or ignore.
	Discard DiskDiscard `json:"discard,omitempty" enum:"unmap,ignore"`
	// Queues of requests, 1-64, on virtio and scsi; QEMU's choice when 0. Disks
	// on scsi share the most that one of them asks for.
	Queues int `json:"queues,omitempty" minimum:"0" maximum:"64"`
	// Limit bounds what the disk does in a second.
	Limit DiskLimit `json:"limit,omitzero"`
}

// SetDefaults implements Spec.
func (s *VMSpec) SetDefaults() {
	if s.HA == "" {
		s.HA = HANone
	}
	if s.Power == "" {
		s.Power = PowerStopped
	}
	if s.CPUs == 0 {
		s.CPUs = 1
	}
	if s.Memory == 0 {
		s.Memory = 512 * MiB
	}
	s.setMachineDefaults()
}

// Validate implements Spec.
func (s *VMSpec) Validate() error {
	if s.CPUs < 1 || s.CPUs > MaxCPUs {
		return Invalid("spec.cpus", "is %d; give 1 to %d virtual CPUs", s.CPUs, MaxCPUs)
	}
	if s.Memory < MinMemory || s.Memory > MaxMemory {
		return Invalid("spec.memory", "is %s; give %s to %s", s.Memory, MinMemory, MaxMemory)
	}
	if s.Memory%MiB != 0 {
		return Invalid("spec.memory", "is %d bytes; give a multiple of 1 MiB", int64(s.Memory))
	}
	switch s.HA {
	case HANone, HARestart:
	default:
		return Invalid("spec.ha", "is %q; give none or restart", clip(string(s.HA)))
	}
	switch s.Power {
	case PowerStopped, PowerRunning, PowerPaused, PowerSuspended:
	default:
		return Invalid("spec.power", "is %q; give stopped, running or paused", clip(string(s.Power)))
	}
	if err := s.Recovery.validate(); err != nil {
		return err
	}
	if err := s.Display.validate(); err != nil {
		return err
	}
	if err := s.CloudInit.validate("spec.cloudInit"); err != nil {
		return err
	}
	if err := s.Limits.validate(s.Memory); err != nil {
		return err
	}
	if len(s.Disks) > MaxDisks {
		return Invalid("spec.disks", "has %d disks; at most %d are allowed", len(s.Disks), MaxDisks)
	}
	if len(s.NICs) > MaxNICs {
		return Invalid("spec.nics", "has %d interfaces; at most %d are allowed", len(s.NICs), MaxNICs)
	}
	slots := map[int]bool{}
	for i := range s.NICs {
		field := fmt.Sprintf("spec.nics[%d]", i)
		if err := s.NICs[i].validate(field); err != nil {
			return err
		}
		if err := validSlot(field, s.NICs[i].Slot, MaxNICs, slots); err != nil {
			return err
		}
	}
	seen := map[string]bool{}
	slots = map[int]bool{}
	for i := range s.Disks {
		field := fmt.Sprintf("spec.disks[%d]", i)
		if err := s.Disks[i].validate(field); err != nil {
			return err
		}
		if err := validSlot(field, s.Disks[i].Slot, MaxDisks, slots); err != nil {
			return err
		}
		if v := s.Disks[i].Volume; v != "" && seen[v] {
			return Invalid(fmt.Sprintf("spec.disks[%d].volume", i), "%q is attached twice", v)
		}
		seen[s.Disks[i].Volume] = true
	}
	if err := s.validateLive(); err != nil {
		return err
	}
	return s.validateMachine()
}

func (d *VMDisk) validate(field string) error {
	if err := d.Limit.validate(field + ".limit"); err != nil {
		return err
	}
	for _, ref := range []struct{ name, value string }{{"volume", d.Volume}, {"image", d.Image}, {"pool", d.Pool}} {
		if ref.value == "" {
			continue
		}
		if err := ValidName(field+"."+ref.name, ref.value); err != nil {
			return err
		}
	}
	if d.Volume == "" && d.Image == "" && d.Size == 0 {
		return Invalid(field, "names neither a volume, an image nor a size; give one")
	}
	if d.Size != 0 && (d.Size < MinDisk || d.Size > MaxDisk) {
		return Invalid(field+".size", "is %s; give %s to %s", d.Size, MinDisk, MaxDisk)
	}
	if d.Size%(64*KiB) != 0 {
		return Invalid(field+".size", "is %d bytes; give a multiple of 64 KiB", int64(d.Size))
	}
	return nil
}

// VMPhase is where a VM is in its life.
type VMPhase string

// The phases. Unknown means that the VM's node is unreachable and the VM is
// not protected, so nobody may say whether it still runs.
const (
	VMCreating VMPhase = "creating"
	VMStopped  VMPhase = "stopped"
	VMStarting VMPhase = "starting"
	VMRunning  VMPhase = "running"
	VMPaused   VMPhase = "paused"
	VMStopping VMPhase = "stopping"
	VMFailed   VMPhase = "failed"
	VMUnknown  VMPhase = "unknown"
	VMDeleting VMPhase = "deleting"
	// VMSuspended: the memory is on disk and takes none on the node.
	VMSuspended VMPhase = "suspended"
)

// VMStatus is written by the hypervisor module of the node that the VM is
// bound to; the transaction that raises a binding's epoch hands it over.
type VMStatus struct {
	ObservedGeneration uint64  `json:"observedGeneration,omitempty"`
	Phase              VMPhase `json:"phase,omitempty"`
	// Node is the name of the node that the VM is bound to.
	Node string `json:"node,omitempty"`
	// Epoch is the binding's epoch that this status was written under.
	Epoch uint64 `json:"epoch,omitempty"`
	// PID of QEMU on the node, 0 when it does not run.
	PID int `json:"pid,omitempty"`
	// StartedAt is when QEMU was started.
	StartedAt *time.Time `json:"startedAt,omitempty"`
	// Hardware is what the QEMU that runs has, as a spec without wishes about
	// power and availability: what it was started with and what was changed
	// since. Where it differs from the spec, the change takes a restart.
	Hardware *VMSpec `json:"hardware,omitempty"`
	// Memory is what the node decided about the memory of a VM that it may squeeze.
	Memory *VMMemory `json:"memory,omitempty"`
	// Accelerator is "kvm" or "tcg" while running.
	Accelerator string `json:"accelerator,omitempty"`
	// CPU is the model with its features that the running guest has, as QEMU was
	// told it.
	CPU string `json:"cpu,omitempty"`
	// Agent is what the guest agent says, present while one was heard.
	Agent *VMAgent `json:"agent,omitempty"`
	// StorageGuard: a protected VM that outlives the lease of its node, because its
	// disks can be locked away from that.
	StorageGuard bool `json:"storageGuard,omitempty"`
	// RebootsDone is spec.reboots as last carried out.
	RebootsDone uint64 `json:"rebootsDone,omitempty"`
	// Crashes counts unexpected ends of QEMU since the last wished start.
	Crashes uint32 `json:"crashes,omitempty"`
	// Tries are the starts that did not lead to a VM that runs, while there are any.
	Tries *VMTries `json:"tries,omitempty"`
	// Restarts are the automatic restarts after ends of the VM, while there are any.
	Restarts *VMRestarts `json:"restarts,omitempty"`
	// Awaits is set while an automatic start is held back for other VMs.
	Awaits *VMAwaits `json:"awaits,omitempty"`
	// Message is one line for people: why the VM is in this phase.
	Message    string      `json:"message,omitempty"`
	Conditions []Condition `json:"conditions,omitempty"`
}

// Binding says which node may run a VM. Its ID is the VM's. Every move raises
// the epoch; see DESIGN "Who may run a VM".
type Binding = Object[BindingSpec, struct{}]

// BindingSpec is written by placement, ha and, for Protected, the owning node.
type BindingSpec struct {
	// NodeID and Node name the owner.
	NodeID string `json:"nodeID"`
	Node   string `json:"node"`
	// Epoch is 1 for the first binding and rises by one with every move.
	Epoch uint64 `json:"epoch"`
	// Protected promises that under this epoch the VM only ever runs with its
	// node's guard killing it when the lease runs out. Only such a binding may
	// be moved by ha without the owner's word.
	Protected bool `json:"protected,omitempty"`
	// StorageGuard is set when all that the VM writes can be locked away from its
	// node, so that the guard does not kill it when the lease runs out.
	StorageGuard *StorageGuard `json:"storageGuard,omitempty"`
	// Resumes is set when a migration was taken back: the process that had handed
	// its guest over may go on.
	Resumes *Resumption `json:"resumes,omitempty"`
	// BroughtBy is the task of the last migration that was committed. It tells a
	// binding that came with the guest's memory from one that ha made.
	BroughtBy string `json:"broughtBy,omitempty"`
	// RecoveredFrom is the node that ha took the VM from; see Origin.
	RecoveredFrom *RecoveredFrom `json:"recoveredFrom,omitempty"`
}

// StorageGuard promises that under one epoch the VM writes to these pools only. It
// counts under that epoch alone. Only the owner writes it.
type StorageGuard struct {
	Epoch uint64 `json:"epoch"`
	// Pools are IDs, sorted.
	Pools []string `json:"pools"`
}

// Guarding are the pools from which a node must be locked out before somebody else
// may run the VM; none: the guard ends it with the lease, or nobody else may run it.
func (s *BindingSpec) Guarding() []string {
	if !s.Protected || s.StorageGuard == nil || s.StorageGuard.Epoch != s.Epoch {
		return nil
	}
	return s.StorageGuard.Pools
}

// Resumption lets a process of an earlier epoch go on. It counts under one epoch
// only, whatever becomes of the binding later.
type Resumption struct {
	// Process is the epoch that the process was started under, Epoch the
	// binding's under which it may go on.
	Process uint64 `json:"process"`
	Epoch   uint64 `json:"epoch"`
}

// LetsGoOn reports whether a process that was started under an epoch is the one
// that may run under the binding, even if it has handed its guest over.
func (b *BindingSpec) LetsGoOn(process uint64) bool {
	return process == b.Epoch || b.Resumes != nil && b.Resumes.Process == process && b.Resumes.Epoch == b.Epoch
}
