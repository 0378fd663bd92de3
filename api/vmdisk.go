// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Limits of disks and drives.
const (
	// MaxCDROMs bounds the CD-ROM drives of a VM.
	MaxCDROMs = 4
	// MaxQueues bounds the request queues of a disk.
	MaxQueues = 64
	// maxSATA and maxIDE are the places on the controllers of q35 and pc.
	maxSATA = 6
	maxIDE  = 4
	// maxMMIO are the places for virtio devices of a microvm: QEMU gives it 24
	// with a second interrupt controller, and serial port, random numbers and
	// balloon take one each.
	maxMMIO = 24 - 3
)

// DiskBus is how a disk or drive is connected.
type DiskBus string

// The buses. virtio is a PCI device for each disk, scsi one virtio-scsi
// controller for all, sata the AHCI controller of q35, ide the one of pc.
const (
	BusVirtio DiskBus = "virtio"
	BusSCSI   DiskBus = "scsi"
	BusSATA   DiskBus = "sata"
	BusIDE    DiskBus = "ide"
)

// DiskCache is how a disk uses the node's page cache.
type DiskCache string

// The caches. With each of them what a guest has flushed is on the disk.
const (
	// CacheWriteback (default) reads and writes through the page cache.
	CacheWriteback DiskCache = "writeback"
	// CacheNone passes it by (O_DIRECT); the pool's file system must know that.
	CacheNone DiskCache = "none"
	// CacheWritethrough ends a write when it is on the disk.
	CacheWritethrough DiskCache = "writethrough"
	// CacheDirectsync is both.
	CacheDirectsync DiskCache = "directsync"
)

// DiskAIO is how QEMU hands reads and writes to the kernel.
type DiskAIO string

// The ways. native needs a cache that passes the page cache by.
const (
	AIOThreads DiskAIO = "threads"
	AIONative  DiskAIO = "native"
	AIOURing   DiskAIO = "io_uring"
)

// DiskDiscard is what becomes of blocks that the guest discards.
type DiskDiscard string

// The choices: give the space back (default), or keep it.
const (
	DiscardUnmap  DiskDiscard = "unmap"
	DiscardIgnore DiskDiscard = "ignore"
)

// BusOf is the bus with its default.
func (o *VMDisk) BusOf() DiskBus {
	if o.Bus == "" {
		return BusVirtio
	}
	return o.Bus
}

func (o *VMDisk) validateOptions(field string) error {
	for _, err := range []error{
		oneOf(field+".bus", o.Bus, BusVirtio, BusSCSI, BusSATA, BusIDE),
		oneOf(field+".cache", o.Cache, CacheWriteback, CacheNone, CacheWritethrough, CacheDirectsync),
		oneOf(field+".aio", o.AIO, AIOThreads, AIOURing, AIONative),
		oneOf(field+".discard", o.Discard, DiscardUnmap, DiscardIgnore),
	} {
		if err != nil {
			return err
		}
	}
	queued := o.BusOf() == BusVirtio || o.BusOf() == BusSCSI
	switch {
	case o.AIO == AIONative && o.Cache != CacheNone && o.Cache != CacheDirectsync:
		return Invalid(field+".aio", "is native, which works without the page cache only; set %s.cache to none or directsync", field)
	case o.Queues < 0 || o.Queues > MaxQueues:
		return Invalid(field+".queues", "is %d; give 1 to %d, or 0 for QEMU's choice", o.Queues, MaxQueues)
	case o.Queues > 0 && !queued:
		return Invalid(field+".queues", "has a meaning on the buses virtio and scsi only; the bus is %s", o.Bus)
	case o.IOThread && !queued:
		return Invalid(field+".iothread", "has a meaning on the buses virtio and scsi only; the bus is %s", o.Bus)
	}
	return nil
}

// validateBuses refuses what is on a bus that the machine does not have, or has
// no more places on.
func (s *VMSpec) validateBuses() error {
	used := map[DiskBus]int{}
	for i := range s.Disks {
		field := fmt.Sprintf("spec.disks[%d]", i)
		if err := s.Disks[i].validateOptions(field); err != nil {
			return err
		}
		if err := s.place(used, s.Disks[i].BusOf(), field+".bus"); err != nil {
			return err
		}
	}
	for i := range s.CDROMs {
		if err := s.place(used, s.CDROMs[i].Bus, fmt.Sprintf("spec.cdroms[%d].bus", i)); err != nil {
			return err
		}
	}
	if c := s.CloudInit; c != nil && c.Format == CloudInitConfigDrive {
		bus := BusSATA
		if s.machine() == MachinePC {
			bus = BusIDE
		}
		if err := s.place(used, bus, "spec.cloudInit.format"); err != nil {
			return err
		}
	}
	if s.machine() != MachineMicroVM {
		return nil
	}
	n := len(s.Disks) + len(s.NICs)
	if s.CloudInit != nil {
		n++
	}
	if n > maxMMIO {
		return Invalid("spec.disks", "%d disks and network interfaces are too many for a microvm, which has places for %d; use spec.machine q35", n, maxMMIO)
	}
	return nil
}

// place counts one device on a bus.
func (s *VMSpec) place(used map[DiskBus]int, bus DiskBus, field string) error {
	used[bus]++
	m := s.machine()
	switch {
	case bus == BusSATA && m != MachineQ35:
		return Invalid(field, "is sata, which the machine %s does not have; it has %s", m, busesOf(m))
	case bus == BusIDE && m != MachinePC:
		return Invalid(field, "is ide, which the machine %s does not have; it has %s", m, busesOf(m))
	case bus == BusSCSI && m == MachineMicroVM:
		return Invalid(field, "is scsi, which the machine %s does not have; it has %s", m, busesOf(m))
	case bus == BusSATA && used[bus] > maxSATA:
		return Invalid(field, "is sata, which has places for %d disks and drives; use scsi", maxSATA)
	case bus == BusIDE && used[bus] > maxIDE:
		return Invalid(field, "is ide, which has places for %d disks and drives; use scsi", maxIDE)
	}
	return nil
}

func busesOf(m MachineType) string {
	switch m {
	case MachinePC:
		return "virtio, scsi and ide"
	case MachineMicroVM:
		return "virtio only"
	}
	return "virtio, scsi and sata"
}

func (s *VMSpec) validateCDROMs() error {
	if len(s.CDROMs) > MaxCDROMs {
		return Invalid("spec.cdroms", "has %d drives; at most %d are allowed", len(s.CDROMs), MaxCDROMs)
	}
	for i, c := range s.CDROMs {
		field := fmt.Sprintf("spec.cdroms[%d]", i)
		if c.Image != "" {
			if err := ValidName(field+".image", c.Image); err != nil {
				return err
			}
		}
		if err := oneOf(field+".bus", c.Bus, BusSATA, BusIDE, BusSCSI); err != nil {
			return err
		}
	}
	return nil
}

var bootDevice = regexp.MustCompile(`^(disk|cdrom|nic)(0|[1-9][0-9]?)$`)

// BootDevice splits an entry of the boot order: disk, cdrom or nic, and its
// number in its list.
func BootDevice(entry string) (kind string, index int, ok bool) {
	m := bootDevice.FindStringSubmatch(entry)
	if m == nil {
		return "", 0, false
	}
	index, err := strconv.Atoi(m[2])
	return m[1], index, err == nil
}

func (s *VMSpec) validateBootOrder() error {
	for i, entry := range s.BootOrder {
		field := fmt.Sprintf("spec.bootOrder[%d]", i)
		kind, n, ok := BootDevice(entry)
		if !ok {
			return Invalid(field, "is %q; give disk, cdrom or nic with its number in its list, such as disk0", clip(entry))
		}
		have := map[string]int{"disk": len(s.Disks), "cdrom": len(s.CDROMs), "nic": len(s.NICs)}[kind]
		if n >= have {
			return Invalid(field, "is %s, but the VM has %d of that kind", entry, have)
		}
		if slices.Contains(s.BootOrder[:i], entry) {
			return Invalid(field, "names %s twice", entry)
		}
		if kind == "nic" && s.machine() == MachineMicroVM {
			return Invalid(field, "is %s, but a microvm cannot boot from the network; use spec.machine q35", entry)
		}
	}
	return nil
}

var (
	pciAddress = regexp.MustCompile(`^[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$`)
	usbProduct = regexp.MustCompile(`^[0-9a-f]{4}:[0-9a-f]{4}$`)
)

func (s *VMSpec) validateHostDevices() error {
	if len(s.HostDevices) > MaxHostDevices {
		return Invalid("spec.hostDevices", "has %d devices; at most %d are allowed", len(s.HostDevices), MaxHostDevices)
	}
	for i := range s.HostDevices {
		d, field := &s.HostDevices[i], fmt.Sprintf("spec.hostDevices[%d]", i)
		switch {
		case (d.PCI == "") == (d.USB == ""):
			return Invalid(field, "gives not one of pci and usb")
		case d.PCI != "" && !pciAddress.MatchString(d.PCI):
			return Invalid(field+".pci", "%q is not the address of a PCI device; give it as 0000:01:00.0, in lower case", clip(d.PCI))
		case d.USB != "" && !usbProduct.MatchString(d.USB):
			return Invalid(field+".usb", "%q is not vendor and product of a USB device; give them as 046d:c52b, in lower case", clip(d.USB))
		}
		if d.Node != "" {
			if err := ValidName(field+".node", d.Node); err != nil {
				return err
			}
		}
		for _, o := range s.HostDevices[:i] {
			if o.Key() == d.Key() && (o.Node == d.Node || o.Node == "" || d.Node == "") {
				return Invalid(field, "names %s twice", d.Key())
			}
		}
	}
	if s.HA == HARestart && s.pinned() {
		return Invalid("spec.ha", "is restart, but spec.hostDevices names one node only, so the VM cannot run elsewhere; name devices of other nodes, too, or set ha to none")
	}
	return nil
}

// pinned reports that the host devices leave one node.
func (s *VMSpec) pinned() bool {
	nodes := map[string]bool{}
	for _, d := range s.HostDevices {
		if d.Node != "" {
			nodes[d.Node] = true
		}
	}
	return len(nodes) == 1
}

// HostDevicesOn are the devices that the VM has on a node, by name; ok is false
// if it must not run there.
func (s *VMSpec) HostDevicesOn(node string) (out []VMHostDevice, ok bool) {
	named, here := false, false
	for _, d := range s.HostDevices {
		named, here = named || d.Node != "", here || d.Node == node
		if d.Node == "" || d.Node == node {
			out = append(out, d)
		}
	}
	return out, !named || here
}

// HostDeviceNodes are the names of the nodes that entries name, joined.
func (s *VMSpec) HostDeviceNodes() string {
	var out []string
	for _, d := range s.HostDevices {
		if d.Node != "" && !slices.Contains(out, d.Node) {
			out = append(out, d.Node)
		}
	}
	return strings.Join(out, ", ")
}
