// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package argv turns a VM into the argument vector of QEMU. It is one pure
// function without goroutines, clocks or I/O.
//
// Guarantees:
//   - Equal input gives equal output; testdata holds golden vectors.
//   - QEMU never probes a disk's format: every blockdev names its driver.
//   - Whatever a path or name holds, it stays one value (commas are doubled);
//     what QEMU could not take is refused with an error.
//   - No device, monitor, network card or configuration file that is not named.
//
// Non-guarantees: it does not look whether files exist.
//
// Choices, with their reasons:
//   - The page cache is used (cache.direct=off) and flushes are honoured
//     (cache.no-flush=off): what a guest has fsynced is on the disk. Directories
//     on any file system work, also those without O_DIRECT.
//   - locking=on: a second QEMU on the same file is refused by QEMU itself.
//   - werror=enospc, rerror=report: a full host disk pauses the guest, which
//     goes on when there is space again; every other error is the guest's to
//     handle, as with a real disk. Disks in a Ceph cluster halt it at every error.
//   - panic=none: a guest panic is reported by an event, and the guest does what
//     its own settings say.
//   - QEMU exits when the guest powers off, and stays for a reset.
//   - vnet_hdr=off with a switch in user space: it does not know frames whose
//     checksums and segmentation were left to the card, and drops them.
//   - romfile= is empty unless the guest shall boot from the network: then the
//     ROM's package need not be installed.
package argv

import (
	"fmt"
	"net"
	"strings"

	"github.com/muster-vm/muster/api"
)

// Limits.
const (
	// MaxSocketPath is the longest path of a unix socket (sun_path without its
	// final NUL).
	MaxSocketPath = 107
	// MaxCPUs is what the q35 machine takes without an interrupt-remapping
	// IOMMU, which this version does not give it.
	MaxCPUs = 255
	// maxDevice is the longest name of a network device (IFNAMSIZ - 1).
	maxDevice = 15
	// minMTU is what IPv4 asks of a link (RFC 791), maxMTU what the field takes.
	minMTU = 68
	maxMTU = 65535
)

// Machine is everything that decides about the argument vector.
type Machine struct {
	// QEMU is the absolute path of the program.
	QEMU string
	// ID is the VM's UUID, Name its name.
	ID, Name string
	CPUs     int
	// Memory in bytes, a multiple of 1 MiB.
	Memory api.Size
	// Disks in boot order.
	Disks []Disk
	// NICs in the order of the guest's slots.
	NICs []NIC
	// Boot is the room for what is plugged in while the guest runs; nil: none.
	Boot *api.VMBoot
	// Accelerator is kvm or tcg.
	Accelerator api.Accelerator
	// Paused starts QEMU without running the guest.
	Paused bool
	// Incoming starts QEMU waiting for the memory of a guest that runs elsewhere.
	Incoming bool
	// QMP, Agent and Serial are paths of unix sockets that QEMU makes; Log
	// receives a copy of the serial output.
	QMP, Agent, Serial, Log string
	// VNC is the socket of the screen; the machine has none if it is empty.
	VNC string
	// Seed is the CD-ROM for the first boot, nil for none.
	Seed *Seed
	Board
}

// Disk is one disk that exists as a file, or in a pool of type rbd.
type Disk struct {
	// Path is absolute, or a name (internal/rbdname).
	Path string
	// Slot is its place in the guest's hardware, from 1; node and device names
	// have it.
	Slot int
	// Format is qcow2 or raw, as the storage module knows it.
	Format string
	// Options of the disk as the VM's spec has them; only what says how it is
	// connected counts.
	Options api.VMDisk
}

// NIC is one network card with a tap device that exists.
type NIC struct {
	// Slot is its place in the guest's hardware, from 1.
	Slot int
	// Device is the tap's name.
	Device string
	// MAC is its address in lower case with colons.
	MAC string
	// MTU that the guest's driver is told, 0 for the usual.
	MTU int
	// Offload lets the guest leave checksums and segmentation to the switch.
	Offload bool
	// ROM is whether the card has one to boot from the network with; nil: if the
	// boot order names it.
	ROM *bool
}

// Build returns the argument vector, with the program as its first element.
func Build(m Machine) ([]string, error) {
	if err := m.validate(); err != nil {
		return nil, err
	}
	a := append(append(base(m), m.secrets()...), m.board()...)
	a = append(a,
		"-device", m.virtio("virtio-serial")+",id=vser0",
		"-chardev", "socket,id=ga0,path="+escape(m.Agent)+",server=on,wait=off",
		"-device", "virtserialport,id=agent0,bus=vser0.0,chardev=ga0,name=org.qemu.guest_agent.0",
		"-chardev", "socket,id=serial0,path="+escape(m.Serial)+",server=on,wait=off,logfile="+escape(m.Log)+",logappend=on",
		"-device", "isa-serial,id=com0,chardev=serial0",
		"-object", "rng-random,id=rng0,filename=/dev/urandom",
		"-device", m.virtio("virtio-rng")+",id=vrng0,rng=rng0",
		"-device", m.virtio("virtio-balloon")+",id=balloon0,deflate-on-oom=on,free-page-reporting=on",
		"-device", "pvpanic,id=panic0",
	)
	if m.Boot != nil {
		a = append(a, ports(m.Boot)...)
		a = append(a, m.hotMemory()...)
	}
	boot, places := m.bootIndexes(), newPlaces(&m)
	a = append(a, m.controllers()...)
	for i, d := range m.Disks {
		a = append(a, m.disk(d, boot.disk(i), places)...)
	}
	for i, c := range m.CDROMs {
		a = append(a, m.cdrom(i, c, boot.cdrom(i), places)...)
	}
	for i := range m.NICs {
		a = append(a, m.nic(i, boot.nic(i))...)
	}
	a = append(a, display(m)...) // no device before it changes its slot
	cd, err := m.seed(places)
	if err != nil {
		return nil, err
	}
	a = append(a, cd...)
	a = append(a, m.extras()...)
	a = append(a, m.Extra...)
	if m.Paused || m.Incoming {
		a = append(a, "-S")
	}
	if m.Incoming {
		a = append(a, "-incoming", "defer")
	}
	return a, nil
}

// base is the part without devices.
func base(m Machine) []string {
	accel := "tcg,thread=multi"
	if m.Accelerator == api.AccelKVM {
		accel = "kvm"
	}
	return []string{
		m.QEMU,
		"-nodefaults", "-no-user-config", "-display", "none", "-vga", "none",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-name", "guest=" + escape(m.Name) + ",debug-threads=on",
		"-uuid", m.ID,
		"-machine", m.machine(),
		"-accel", accel,
		"-cpu", m.cpu(),
		"-smp", m.smp(),
		"-m", m.size(),
		"-rtc", "base=utc",
		"-boot", "strict=on",
		"-action", m.actions(),
		"-msg", "timestamp=on",
		"-smbios", "type=1,manufacturer=Muster,product=Muster VM,uuid=" + m.ID + ",serial=" + escape(m.Name),
		"-fw_cfg", "name=opt/muster/name,string=" + escape(m.Name),
		"-fw_cfg", "name=opt/muster/id,string=" + m.ID,
		"-chardev", "socket,id=qmp0,path=" + escape(m.QMP) + ",server=on,wait=off",
		"-mon", "chardev=qmp0,mode=control",
	}
}

// escape keeps a value whole in a QEMU option string.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }

func (m *Machine) validate() error {
	if err := api.ValidName("meta.name", m.Name); err != nil {
		return err
	}
	if !api.IsID(m.ID) {
		return api.Invalid("meta.id", "%q is not an object ID", m.ID)
	}
	if m.CPUs < 1 || m.CPUs > MaxCPUs {
		return api.Invalid("spec.cpus", "is %d; QEMU's q35 machine takes 1 to %d virtual CPUs", m.CPUs, MaxCPUs)
	}
	if m.Memory < api.MinMemory || m.Memory%api.MiB != 0 {
		return api.Invalid("spec.memory", "is %d bytes; give a multiple of 1 MiB, at least %s", int64(m.Memory), api.MinMemory)
	}
	if m.Accelerator != api.AccelKVM && m.Accelerator != api.AccelTCG {
		return fmt.Errorf("build the QEMU command of vm %s: accelerator %q is neither kvm nor tcg", m.Name, m.Accelerator)
	}
	if len(m.Disks) > api.MaxDisks {
		return api.Invalid("spec.disks", "has %d disks; at most %d are allowed", len(m.Disks), api.MaxDisks)
	}
	slots := map[int]bool{}
	for i, d := range m.Disks {
		if d.Slot < 1 || d.Slot > api.MaxDisks || slots[d.Slot] {
			return fmt.Errorf("build the QEMU command of vm %s: disk %d has slot %d, which is out of range or taken", m.Name, i, d.Slot)
		}
		slots[d.Slot] = true
		if d.Format != "qcow2" && d.Format != "raw" {
			return fmt.Errorf("build the QEMU command of vm %s: disk %d has format %q, which is neither qcow2 nor raw", m.Name, i, d.Format)
		}
		if err := validFile("disk", d.Path); err != nil {
			return err
		}
	}
	if err := m.validateNICs(); err != nil {
		return err
	}
	if err := m.validateBoot(); err != nil {
		return err
	}
	if err := m.validateBoard(); err != nil {
		return err
	}
	for _, p := range []struct{ what, path string }{{"QMP socket", m.QMP}, {"guest agent socket", m.Agent}, {"serial socket", m.Serial}, {vncSocket, m.VNC}} {
		if p.path == "" && p.what == vncSocket {
			continue // no screen
		}
		if len(p.path) > MaxSocketPath {
			return fmt.Errorf("path %q of the %s has %d bytes; unix sockets take at most %d: choose a shorter data directory", p.path, p.what, len(p.path), MaxSocketPath)
		}
		if err := validPath(p.what, p.path); err != nil {
			return err
		}
	}
	if m.Seed != nil {
		if err := validPath("cloud-init CD-ROM", m.Seed.Path); err != nil {
			return err
		}
	}
	if err := validPath("serial log", m.Log); err != nil {
		return err
	}
	return validPath("QEMU program", m.QEMU)
}

func (m *Machine) validateNICs() error {
	if len(m.NICs) > api.MaxNICs {
		return api.Invalid("spec.nics", "has %d interfaces; at most %d are allowed", len(m.NICs), api.MaxNICs)
	}
	slots := map[int]bool{}
	for i, n := range m.NICs {
		if n.Slot < 1 || n.Slot > api.MaxNICs || slots[n.Slot] {
			return fmt.Errorf("build the QEMU command of vm %s: network card %d has slot %d, which is out of range or taken", m.Name, i, n.Slot)
		}
		slots[n.Slot] = true
		hw, err := net.ParseMAC(n.MAC)
		if err != nil || len(hw) != 6 || hw.String() != n.MAC {
			return fmt.Errorf("build the QEMU command of vm %s: network card %d has the MAC address %q", m.Name, i, n.MAC)
		}
		if n.Device == "" || len(n.Device) > maxDevice || strings.ContainsAny(n.Device, "/ \x00\n") {
			return fmt.Errorf("build the QEMU command of vm %s: network card %d has the device %q", m.Name, i, n.Device)
		}
		if n.MTU != 0 && (n.MTU < minMTU || n.MTU > maxMTU) {
			return fmt.Errorf("build the QEMU command of vm %s: network card %d has the MTU %d", m.Name, i, n.MTU)
		}
	}
	return nil
}

// validPath refuses what an argument cannot carry, and relative paths, which
// QEMU would read as "protocol:rest" or below its own working directory.
func validPath(what, p string) error {
	if !strings.HasPrefix(p, "/") || strings.ContainsAny(p, "\x00\n\r") {
		return fmt.Errorf("path %q of the %s is not absolute or has a control character", p, what)
	}
	return nil
}
