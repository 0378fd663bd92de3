// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"time"
	"unicode"
)

// Snapshot is the state of a VM at one moment: of its disks, and of its memory
// if it was asked for. Its name is unique among those of its VM; other names
// are found by ID only. It is deleted with the VM.
type Snapshot = Object[SnapshotSpec, SnapshotStatus]

// Limits of snapshots.
const (
	// MaxSnapshots of one VM.
	MaxSnapshots = 64
	// MaxDescription is the longest description, in bytes.
	MaxDescription = 1024
)

// SnapshotSpec is the wish.
type SnapshotSpec struct {
	// VM is the name of the VM, VMID its ID.
	VM   string `json:"vm" doc:"name of the VM"`
	VMID string `json:"vmID,omitempty" readOnly:"true"`
	// Memory says whether the guest's memory is part of it.
	Memory bool `json:"memory,omitempty" doc:"with the guest's memory, so that a revert goes on where the guest was"`
	// Description is for people: at most 1024 bytes, one line.
	Description string `json:"description,omitempty" maxLength:"1024"`
	// Temporary snapshots are made to copy disks from, and removed after that.
	Temporary bool `json:"temporary,omitempty" readOnly:"true"`
	// Parent is the name of the snapshot that the VM's state descended from when
	// this one was taken; empty for the first.
	Parent string `json:"parent,omitempty" readOnly:"true"`
}

// SetDefaults implements Spec.
func (s *SnapshotSpec) SetDefaults() {}

// Validate implements Spec.
func (s *SnapshotSpec) Validate() error {
	if err := ValidName("spec.vm", s.VM); err != nil {
		return err
	}
	if len(s.Description) > MaxDescription || strings.ContainsFunc(s.Description, unicode.IsControl) {
		return Invalid("spec.description", "must be one line of at most %d bytes", MaxDescription)
	}
	return nil
}

// SnapshotPhase is where a snapshot is in its life.
type SnapshotPhase string

// The phases. A snapshot whose making failed is gone. One in SnapshotReverting
// without an operation on its VM was interrupted: the VM's disks are not all of
// one moment, and the VM does not start until a revert has succeeded.
const (
	SnapshotCreating  SnapshotPhase = "creating"
	SnapshotReady     SnapshotPhase = "ready"
	SnapshotReverting SnapshotPhase = "reverting"
	SnapshotDeleting  SnapshotPhase = "deleting"
	// SnapshotFailed is shown for one that its node could not finish or clean up,
	// because it was lost. It can be deleted.
	SnapshotFailed SnapshotPhase = "failed"
)

// Consistency says what a snapshot's disks hold.
type Consistency string

// The values, from the best to the least.
const (
	// ConsistencyMemory: the guest goes on where it was.
	ConsistencyMemory Consistency = "memory"
	// ConsistencyStopped: the VM was stopped.
	ConsistencyStopped Consistency = "stopped"
	// ConsistencyQuiesced: the guest agent froze the file systems meanwhile.
	ConsistencyQuiesced Consistency = "quiesced"
	// ConsistencyCrash: as after a power cut at that moment, on all disks at once.
	ConsistencyCrash Consistency = "crash"
)

// SnapshotDisk is one disk in a snapshot.
type SnapshotDisk struct {
	// Volume is the name of the volume, VolumeID its ID.
	Volume   string `json:"volume"`
	VolumeID string `json:"volumeID"`
	// Slot of a disk; 0 of the variables of UEFI, which are beside the disks.
	Slot int `json:"slot"`
	// Size that the guest saw.
	Size Size `json:"size,omitempty"`
}

// SavedMachine is what memory depends on that the VM's spec alone does not say:
// a default may mean something else later, or on another node.
type SavedMachine struct {
	// Type is QEMU's name of the machine with its version, such as pc-q35-7.2.
	Type string `json:"type,omitempty"`
	// CPU is the value of -cpu.
	CPU         string      `json:"cpu,omitempty"`
	Accelerator Accelerator `json:"accelerator,omitempty"`
	// QEMUVersion is of the QEMU that it was; older ones cannot load its memory.
	QEMUVersion string `json:"qemuVersion,omitempty"`
	// CloudInit is the format of the CD-ROM for cloud-init; empty: there is none.
	CloudInit CloudInitFormat `json:"cloudInit,omitempty"`
}

// SnapshotStatus is written by the hypervisor module of the VM's node.
type SnapshotStatus struct {
	Phase   SnapshotPhase `json:"phase,omitempty"`
	Message string        `json:"message,omitempty"`
	// Tag is the name of the internal snapshot in each disk's file.
	Tag   string         `json:"tag,omitempty"`
	Disks []SnapshotDisk `json:"disks,omitempty"`
	// Hardware of the VM at that time, and Power what it did: running, paused or
	// stopped.
	Hardware *VMSpec    `json:"hardware,omitempty"`
	Power    PowerState `json:"power,omitempty"`
	// Machine that the memory belongs to.
	Machine *SavedMachine `json:"machine,omitempty"`
	// MemorySize is what the guest's memory takes in the file of the first disk.
	MemorySize  Size        `json:"memorySize,omitempty"`
	Consistency Consistency `json:"consistency,omitempty"`
	TakenAt     *time.Time  `json:"takenAt,omitempty"`
	// Current marks the snapshot that the VM's present state descends from.
	Current bool `json:"current,omitempty"`
	// Undo says that the way back of a revert may still be in the disks.
	Undo bool `json:"undo,omitempty"`
}

// SnapshotTag is the name of a snapshot in the files of disks.
func SnapshotTag(id string) string { return "muster-" + id }

// SuspendTag is the name of the internal snapshot that holds the state of a
// suspended VM.
const SuspendTag = "muster-suspend"

// TPMNeedsMemory says, of a VM, why it has no snapshots of its disks alone.
const TPMNeedsMemory = "vm %s has a TPM, whose state fits to the disks of its moment only and is kept with the memory: ask for the memory, too (--memory), while the vm runs; or suspend it"

// SavedState is memory that a VM's next start goes on from. Its ID is the VM's.
// While it exists the guest has not run since: it is deleted after the memory
// was loaded and before the guest goes on, and a guest never runs beside it.
type SavedState = Object[SavedStateSpec, SavedStateStatus]

// SavedStateSpec is written by the hypervisor module, and Discard by requests.
type SavedStateSpec struct {
	// Tag of the internal snapshot in the disks; the memory is in the first one.
	Tag   string         `json:"tag"`
	Disks []SnapshotDisk `json:"disks"`
	// Hardware that the guest must find again, in the same Machine.
	Hardware *VMSpec       `json:"hardware"`
	Machine  *SavedMachine `json:"machine,omitempty"`
	// SnapshotID is the snapshot that it belongs to, which keeps the tag. Empty
	// for a suspended VM, whose tag goes with this object.
	SnapshotID string    `json:"snapshotID,omitempty"`
	Size       Size      `json:"size,omitempty"`
	SavedAt    time.Time `json:"savedAt,omitzero"`
	// Discard asks the owner to drop it: the next start is a cold one.
	Discard bool `json:"discard,omitempty"`
}

// SavedStateStatus is written by the hypervisor module.
type SavedStateStatus struct {
	// Message says why the memory could not be loaded.
	Message string `json:"message,omitempty"`
}

// WithHardware returns the spec with other hardware: what Hardware leaves out
// stays.
func (s *VMSpec) WithHardware(h *VMSpec) VMSpec {
	var out VMSpec
	deepCopy(h, &out)
	out.HA, out.Power, out.ForceStop, out.Reboots = s.HA, s.Power, s.ForceStop, s.Reboots
	out.MemoryMin, out.CloudInit, out.Limits, out.Recovery = s.MemoryMin, s.CloudInit, s.Limits, s.Recovery
	out.Boot = nil // of a QEMU, not of a wish
	return out
}

// claimed are the parts of the hardware that hold something in the cluster beside
// disks and network cards: addresses, images, volumes of state, host devices.
func claimed(s *VMSpec) map[string]any {
	return map[string]any{
		"vsock": s.Vsock, "cdroms": s.CDROMs, "kernel": s.Kernel, "firmware": s.Firmware, "tpm": s.TPM, "hostDevices": s.HostDevices, "extraArgs": s.ExtraArgs,
	}
}

// ClaimedDiffers names those in which two specs differ.
func (s *VMSpec) ClaimedDiffers(other *VMSpec) []string {
	var out []string
	then := claimed(other.Hardware())
	for name, now := range claimed(s.Hardware()) {
		a, errA := json.Marshal(now)
		b, errB := json.Marshal(then[name])
		if errA != nil || errB != nil || !bytes.Equal(a, b) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// KeepClaimed takes them over from another spec, whose they are.
func (s *VMSpec) KeepClaimed(from *VMSpec) {
	var c VMSpec
	deepCopy(from, &c)
	s.Vsock, s.CDROMs, s.Kernel, s.Firmware, s.TPM, s.HostDevices, s.ExtraArgs = c.Vsock, c.CDROMs, c.Kernel, c.Firmware, c.TPM, c.HostDevices, c.ExtraArgs
}

// ForgetState takes out what belongs to one VM alone: a copy gets its own.
func (s *VMSpec) ForgetState() {
	if s.Firmware != nil {
		s.Firmware.Volume = ""
	}
	if s.TPM != nil {
		s.TPM.Volume = ""
	}
	if s.Vsock != nil {
		s.Vsock.CID = 0
	}
}
