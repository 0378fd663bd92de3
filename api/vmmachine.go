// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode"
)

// Limits of a VM's machine.
const (
	// MaxExtraArgs and MaxExtraArg bound what administrators add to QEMU's
	// arguments: their number, and the bytes of each.
	MaxExtraArgs = 64
	MaxExtraArg  = 1024
	// MaxHostDevices bounds the devices of a node that a VM is given.
	MaxHostDevices = 16
	// MinVsockCID is the first context identifier of a guest; those below it
	// are taken (vsock(7)). MaxVsockCID is the last that the field takes.
	MinVsockCID = 3
	MaxVsockCID = 1<<32 - 2
	// MaxCmdline bounds a kernel's command line (COMMAND_LINE_SIZE of x86, less
	// the final NUL).
	MaxCmdline = 2047
	// maxCPUModel bounds the name of a CPU model.
	maxCPUModel = 64
)

// MachineType is QEMU's machine.
type MachineType string

// The machine types. q35 has PCI Express and everything else that a VM may
// have; pc is the older i440FX, for guests that need it; microvm has no PCI, no
// display, and nothing that boots from disks: it starts a kernel.
const (
	MachineQ35     MachineType = "q35"
	MachinePC      MachineType = "pc"
	MachineMicroVM MachineType = "microvm"
)

// The CPU models that are not QEMU's own names.
const (
	// CPUHost is everything that the node's CPU has; with TCG everything that
	// TCG can do.
	CPUHost = "host"
	// CPUCluster is the baseline that every node can run.
	CPUCluster = "cluster"
)

// VMCPU is the kind and arrangement of the virtual CPUs.
type VMCPU struct {
	// Model is host (default), cluster, or one of QEMU's models such as
	// Haswell-noTSX.
	Model string `json:"model,omitempty" maxLength:"64" doc:"host, cluster, or one of QEMU's CPU models"`
	// Sockets, Cores of a socket and Threads of a core: their product is
	// spec.cpus. What is left out follows from the rest; without any, all CPUs
	// are cores of one socket.
	Sockets int `json:"sockets,omitempty" minimum:"0" maximum:"255"`
	Cores   int `json:"cores,omitempty" minimum:"0" maximum:"255"`
	Threads int `json:"threads,omitempty" minimum:"0" maximum:"255"`
}

// FirmwareType is what begins a guest.
type FirmwareType string

// The firmware types.
const (
	FirmwareBIOS FirmwareType = "bios"
	FirmwareUEFI FirmwareType = "uefi"
)

// VMFirmware is what begins the guest.
type VMFirmware struct {
	// Type is bios (default) or uefi.
	Type FirmwareType `json:"type,omitempty" enum:"bios,uefi"`
	// SecureBoot runs only what is signed by a key of the variable store, which
	// begins with Microsoft's.
	SecureBoot bool `json:"secureBoot,omitempty"`
	// Volume keeps the UEFI variables; made with the VM as "<vm>-uefi".
	Volume string `json:"volume,omitempty" readOnly:"true"`
}

// VMKernel is a kernel that the firmware starts directly.
type VMKernel struct {
	// Image and Initrd are names of images: the kernel and, if there is one, its
	// initial RAM disk.
	Image  string `json:"image"`
	Initrd string `json:"initrd,omitempty"`
	// Cmdline is the kernel's command line, at most 2047 bytes.
	Cmdline string `json:"cmdline,omitempty" maxLength:"2047"`
}

// VMTPM gives the VM a TPM 2.0.
type VMTPM struct {
	// Volume keeps the TPM's state, a secret; made with the VM as "<vm>-tpm".
	Volume string `json:"volume,omitempty" readOnly:"true"`
}

// WatchdogAction is what QEMU does when the guest has not fed its watchdog.
type WatchdogAction string

// The actions (QAPI WatchdogAction).
const (
	WatchdogReset     WatchdogAction = "reset"
	WatchdogShutdown  WatchdogAction = "shutdown"
	WatchdogPoweroff  WatchdogAction = "poweroff"
	WatchdogPause     WatchdogAction = "pause"
	WatchdogInjectNMI WatchdogAction = "inject-nmi"
	WatchdogNone      WatchdogAction = "none"
)

// VMWatchdog gives the VM an Intel 6300ESB watchdog.
type VMWatchdog struct {
	// Action is reset (default), shutdown, poweroff, pause, inject-nmi, or none,
	// which only reports it.
	Action WatchdogAction `json:"action,omitempty" enum:"reset,shutdown,poweroff,pause,inject-nmi,none"`
}

// VMVsock gives the VM a socket to its host (vsock(7)).
type VMVsock struct {
	// CID is the guest's address, 3-4294967294, of no other VM in the cluster;
	// chosen when 0.
	CID uint32 `json:"cid,omitempty" minimum:"0" maximum:"4294967294"`
}

// VMCDROM is a CD-ROM drive.
type VMCDROM struct {
	// Image is the name of the image in the tray; empty for an empty tray.
	Image string `json:"image,omitempty"`
	// Bus is sata (default on q35), ide (default on pc) or scsi.
	Bus DiskBus `json:"bus,omitempty" enum:"sata,ide,scsi"`
	// Force takes out what is in the tray of a running VM even if its guest has
	// locked it. It is part of the wish, not of the hardware.
	Force bool `json:"force,omitempty"`
}

// VMHostDevice is a device of the node that the VM has for itself.
type VMHostDevice struct {
	// Node is the name of the node that the entry is about. Without one it is
	// about every node; with one in any entry, the VM runs only on those named.
	Node string `json:"node,omitempty"`
	// PCI is the address of a PCI device, such as 0000:01:00.0.
	PCI string `json:"pci,omitempty"`
	// USB is vendor and product of a USB device, such as 046d:c52b.
	USB string `json:"usb,omitempty"`
}

// Key says which device it is, whatever the node.
func (d *VMHostDevice) Key() string {
	if d.PCI != "" {
		return "pci " + d.PCI
	}
	return "usb " + d.USB
}

// Machine type of the VM, with its default.
func (s *VMSpec) machine() MachineType {
	if s.Machine == "" {
		return MachineQ35
	}
	return s.Machine
}

// MachineType is q35 unless the VM says otherwise.
func (s *VMSpec) MachineType() MachineType { return s.machine() }

// AsksForMachine reports whether the VM asks for anything that a VM did not have
// before there were machines to choose. A node of such a version would run it
// without.
func (s *VMSpec) AsksForMachine() bool {
	return s.MachineType() != MachineQ35 || s.CPU != nil || s.UEFI() || s.Kernel != nil || s.TPM != nil || len(s.NUMA) > 0 || s.Hugepages.Size() > 0 ||
		s.Watchdog != nil || s.Vsock != nil || len(s.CDROMs) > 0 || len(s.BootOrder) > 0 || len(s.HostDevices) > 0 || len(s.ExtraArgs) > 0 ||
		slices.ContainsFunc(s.Disks, func(d VMDisk) bool {
			return d.BusOf() != BusVirtio || d.Cache != "" || d.AIO != "" || d.IOThread || d.Discard != "" || d.Queues != 0
		})
}

// UEFI reports whether the VM begins with UEFI.
func (s *VMSpec) UEFI() bool { return s.Firmware != nil && s.Firmware.Type == FirmwareUEFI }

// SecureBoot reports whether the VM runs signed programs only.
func (s *VMSpec) SecureBoot() bool { return s.UEFI() && s.Firmware.SecureBoot }

// CPUModel is host unless the VM says otherwise.
func (s *VMSpec) CPUModel() string {
	if s.CPU == nil || s.CPU.Model == "" {
		return CPUHost
	}
	return s.CPU.Model
}

// StateVolumes are the volumes that keep what the machine itself remembers: the
// UEFI variables and the TPM. They follow the VM as its disks do.
func (s *VMSpec) StateVolumes() []string {
	var out []string
	if s.UEFI() && s.Firmware.Volume != "" {
		out = append(out, s.Firmware.Volume)
	}
	if s.TPM != nil && s.TPM.Volume != "" {
		out = append(out, s.TPM.Volume)
	}
	return out
}

// Volumes are all volumes of the VM: of its machine's state, and its disks.
func (s *VMSpec) Volumes() []string {
	out := s.StateVolumes()
	for _, d := range s.Disks {
		out = append(out, d.Volume)
	}
	return out
}

// Topology returns sockets, cores of a socket and threads of a core for a number
// of CPUs. It must have been validated for that number.
func (s *VMSpec) Topology(cpus int) (sockets, cores, threads int) {
	c := VMCPU{}
	if s.CPU != nil {
		c = *s.CPU
	}
	threads = max(c.Threads, 1)
	switch {
	case c.Sockets == 0 && c.Cores == 0:
		return 1, cpus / threads, threads
	case c.Sockets == 0:
		return cpus / (c.Cores * threads), c.Cores, threads
	case c.Cores == 0:
		return c.Sockets, cpus / (c.Sockets * threads), threads
	}
	return c.Sockets, c.Cores, threads
}

// setMachineDefaults fills in what follows from the rest.
func (s *VMSpec) setMachineDefaults() {
	if s.machine() == MachineMicroVM && s.Display == "" {
		s.Display = DisplayNone
	}
	if s.Firmware != nil && s.Firmware.Type == "" {
		s.Firmware.Type = FirmwareBIOS
	}
	if s.Firmware != nil && s.Firmware.Type == FirmwareBIOS {
		s.Firmware.Volume = "" // it goes with UEFI
	}
	if s.Watchdog != nil && s.Watchdog.Action == "" {
		s.Watchdog.Action = WatchdogReset
	}
	for i := range s.CDROMs {
		if s.CDROMs[i].Bus == "" {
			s.CDROMs[i].Bus = BusSATA
			if s.machine() == MachinePC {
				s.CDROMs[i].Bus = BusIDE
			}
		}
	}
}

// validateMachine checks everything of this file.
func (s *VMSpec) validateMachine() error {
	for _, check := range []func() error{
		s.validateType, s.validateCPU, s.validateFirmware, s.validateExtras, s.validateMicroVM, s.validateCDROMs,
		s.validateBuses, s.validateBootOrder, s.validateNUMA, s.validateHostDevices, s.validateExtraArgs,
	} {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

// oneOf checks a word that may be left out.
func oneOf[W ~string](field string, word W, words ...W) error {
	if word == "" || slices.Contains(words, word) {
		return nil
	}
	texts := make([]string, len(words))
	for i, w := range words {
		texts[i] = string(w)
	}
	last := len(texts) - 1
	return Invalid(field, "is %q; give %s or %s", clip(string(word)), strings.Join(texts[:last], ", "), texts[last])
}

func (s *VMSpec) validateType() error {
	return oneOf("spec.machine", s.Machine, MachineQ35, MachinePC, MachineMicroVM)
}

var cpuModelName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

func (s *VMSpec) validateCPU() error {
	if s.CPU == nil {
		return nil
	}
	c := s.CPU
	if c.Model != "" && (len(c.Model) > maxCPUModel || !cpuModelName.MatchString(c.Model)) {
		return Invalid("spec.cpu.model", "%q is not the name of a CPU model; give host, cluster, or a name that muster node facts NODE lists", clip(c.Model))
	}
	product := 1
	for _, f := range []struct {
		name string
		n    int
	}{{"sockets", c.Sockets}, {"cores", c.Cores}, {"threads", c.Threads}} {
		if f.n < 0 || f.n > MaxCPUs {
			return Invalid("spec.cpu."+f.name, "is %d; give 1 to %d, or leave it out", f.n, MaxCPUs)
		}
		product *= max(f.n, 1)
	}
	all := c.Sockets != 0 && c.Cores != 0
	if all && product != s.CPUs || s.CPUs%product != 0 {
		return Invalid("spec.cpu", "%s do not make spec.cpus %d; the product of sockets, cores and threads is the number of CPUs", c.words(), s.CPUs)
	}
	return nil
}

// words is a topology as people say it.
func (c *VMCPU) words() string {
	var out []string
	for _, f := range []struct {
		name string
		n    int
	}{{"sockets", c.Sockets}, {"cores", c.Cores}, {"threads", c.Threads}} {
		if f.n > 0 {
			out = append(out, fmt.Sprintf("%d %s", f.n, f.name))
		}
	}
	return strings.Join(out, " × ")
}

func (s *VMSpec) validateFirmware() error {
	f := s.Firmware
	if f != nil {
		if err := oneOf("spec.firmware.type", f.Type, FirmwareBIOS, FirmwareUEFI); err != nil {
			return err
		}
		if f.SecureBoot && f.Type != FirmwareUEFI {
			return Invalid("spec.firmware.secureBoot", "needs spec.firmware.type uefi")
		}
		if f.SecureBoot && s.machine() != MachineQ35 {
			return Invalid("spec.firmware.secureBoot", "needs spec.machine q35, whose firmware can protect its variables from the guest; it is %s", s.machine())
		}
		if f.Volume != "" {
			if err := ValidName("spec.firmware.volume", f.Volume); err != nil {
				return err
			}
		}
	}
	if s.TPM != nil && s.TPM.Volume != "" {
		if err := ValidName("spec.tpm.volume", s.TPM.Volume); err != nil {
			return err
		}
	}
	return s.validateKernel()
}

func (s *VMSpec) validateKernel() error {
	k := s.Kernel
	if k == nil {
		return nil
	}
	if err := ValidName("spec.kernel.image", k.Image); err != nil {
		return err
	}
	if k.Initrd != "" {
		if err := ValidName("spec.kernel.initrd", k.Initrd); err != nil {
			return err
		}
	}
	if len(k.Cmdline) > MaxCmdline || strings.ContainsFunc(k.Cmdline, unicode.IsControl) {
		return Invalid("spec.kernel.cmdline", "must have at most %d bytes, none of them a control character", MaxCmdline)
	}
	if s.SecureBoot() {
		return Invalid("spec.kernel", "goes past the boot loader, which spec.firmware.secureBoot is to check; leave one of them out")
	}
	return nil
}

// MachineImages are the images that the machine reads, by field: those in its
// drives, its kernel and what belongs to that. Their names may be changed
// through the pointers.
func (s *VMSpec) MachineImages() map[string]*string {
	out := map[string]*string{}
	for i := range s.CDROMs {
		if s.CDROMs[i].Image != "" {
			out[fmt.Sprintf("spec.cdroms[%d].image", i)] = &s.CDROMs[i].Image
		}
	}
	if k := s.Kernel; k != nil {
		out["spec.kernel.image"] = &k.Image
		if k.Initrd != "" {
			out["spec.kernel.initrd"] = &k.Initrd
		}
	}
	return out
}

// validateExtras checks watchdog and vsock.
func (s *VMSpec) validateExtras() error {
	if s.Watchdog != nil {
		if err := oneOf("spec.watchdog.action", s.Watchdog.Action, WatchdogReset, WatchdogShutdown, WatchdogPoweroff, WatchdogPause, WatchdogInjectNMI, WatchdogNone); err != nil {
			return err
		}
	}
	if s.Vsock != nil && s.Vsock.CID != 0 && (s.Vsock.CID < MinVsockCID || s.Vsock.CID > MaxVsockCID) {
		return Invalid("spec.vsock.cid", "is %d; give %d to %d, or 0 to have one chosen", s.Vsock.CID, MinVsockCID, uint32(MaxVsockCID))
	}
	return nil
}

// validateMicroVM refuses what a machine without PCI, USB and UEFI cannot have.
func (s *VMSpec) validateMicroVM() error {
	if s.machine() != MachineMicroVM {
		return nil
	}
	if s.Kernel == nil {
		return Invalid("spec.kernel", "is missing: a microvm has no firmware that boots from disks; give the kernel to start")
	}
	for _, f := range []struct {
		field string
		set   bool
		what  string
	}{
		{"spec.firmware.type", s.UEFI(), "UEFI"},
		{"spec.tpm", s.TPM != nil, "a TPM"},
		{"spec.display", s.Display.Shown(), "a screen"},
		{"spec.watchdog", s.Watchdog != nil, "a watchdog"},
		{"spec.cdroms", len(s.CDROMs) > 0, "CD-ROM drives"},
		{"spec.hostDevices", len(s.HostDevices) > 0, "devices of the host"},
	} {
		if f.set {
			return Invalid(f.field, "gives a microvm %s, and that machine has no bus for it; use spec.machine q35", f.what)
		}
	}
	return nil
}

func (s *VMSpec) validateExtraArgs() error {
	if len(s.ExtraArgs) > MaxExtraArgs {
		return Invalid("spec.extraArgs", "has %d arguments; at most %d are allowed", len(s.ExtraArgs), MaxExtraArgs)
	}
	for i, a := range s.ExtraArgs {
		field := fmt.Sprintf("spec.extraArgs[%d]", i)
		if a == "" || len(a) > MaxExtraArg || strings.ContainsFunc(a, unicode.IsControl) {
			return Invalid(field, "must have 1 to %d characters, none of them a control character", MaxExtraArg)
		}
		name, option := strings.CutPrefix(a, "-")
		if i == 0 && !option {
			return Invalid(field, "%q is no option of QEMU; the first argument begins with -", clip(a))
		}
		if option && slices.Contains(foreignArgs, strings.TrimPrefix(name, "-")) {
			return Invalid(field, "%s would take QEMU away from the node that supervises it", a)
		}
	}
	return nil
}

// foreignArgs are options after which the hypervisor module no longer knows its
// QEMU: as whom and where it runs, what it waits for, and how it is asked.
var foreignArgs = []string{"daemonize", "chroot", "runas", "pidfile", "incoming", "loadvm", "S", "preconfig", "uuid", "name", "qmp", "mon", "monitor", "readconfig", "nodefconfig"}
