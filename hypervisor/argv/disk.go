// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package argv

import (
	"fmt"
	"strconv"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/rbdname"
)

// CDROM is one drive.
type CDROM struct {
	// Path of the image, empty for an empty tray; Format is its format.
	Path, Format string
	// Bus is sata, ide or scsi.
	Bus api.DiskBus
}

// The names that QEMU knows disks and drives by. A drive's number is its place
// in spec.cdroms, from 0.

// DiskID is the device of the disk in a slot, DiskNode its block node, FileNode
// the one below that, of the file.
func DiskID(slot int) string { return "vd" + strconv.Itoa(slot) }

// DiskNode is the block node of the disk in a slot.
func DiskNode(slot int) string { return "disk" + strconv.Itoa(slot) }

// FileNode is the block node of the file of the disk in a slot.
func FileNode(slot int) string { return "file" + strconv.Itoa(slot) }

// CDROMID is the device of a drive: blockdev-open-tray and its kin take it.
func CDROMID(n int) string { return "cd" + strconv.Itoa(n) }

// CDROMNode is the block node of what is in a drive, CDROMFileNode that of the
// file.
func CDROMNode(n int) string { return "cdrom" + strconv.Itoa(n) }

// CDROMFileNode is the block node of the file in a drive.
func CDROMFileNode(n int) string { return "cdfile" + strconv.Itoa(n) }

// Places on controllers.
const (
	sataPorts = 6
	idePlaces = 4
	// cdromTarget is the SCSI target of the first drive; disks have their slot.
	cdromTarget = 100
)

// bootIndexes are the places in the boot order, from 1; 0 is not to be booted.
type bootIndexes struct {
	index map[string]int
}

func (m *Machine) bootIndexes() bootIndexes {
	b := bootIndexes{index: map[string]int{}}
	order := m.BootOrder
	if len(order) == 0 {
		for i := range m.Disks {
			order = append(order, "disk"+strconv.Itoa(i))
		}
		for i := range m.CDROMs {
			order = append(order, "cdrom"+strconv.Itoa(i))
		}
	}
	for i, entry := range order {
		b.index[entry] = i + 1
	}
	return b
}

func (b bootIndexes) disk(i int) int  { return b.index["disk"+strconv.Itoa(i)] }
func (b bootIndexes) cdrom(i int) int { return b.index["cdrom"+strconv.Itoa(i)] }
func (b bootIndexes) nic(i int) int   { return b.index["nic"+strconv.Itoa(i)] }

func bootOption(index int) string {
	if index == 0 {
		return ""
	}
	return ",bootindex=" + strconv.Itoa(index)
}

// places are the next free places on the controllers: disks begin at the first,
// drives at the last.
type places struct {
	ports, disks, drives int
	pc                   bool
}

func newPlaces(m *Machine) *places {
	p := &places{ports: sataPorts, pc: m.Type == api.MachinePC}
	if p.pc {
		p.ports = idePlaces
	}
	return p
}

func (p *places) disk() string {
	p.disks++
	return p.at(p.disks - 1)
}

func (p *places) drive() string {
	p.drives++
	return p.at(p.ports - p.drives)
}

func (p *places) at(n int) string {
	if p.pc {
		return ",bus=ide." + strconv.Itoa(n/2) + ",unit=" + strconv.Itoa(n%2)
	}
	return ",bus=ide." + strconv.Itoa(n)
}

// controllers are the virtio-scsi controller and the threads of disks.
func (m *Machine) controllers() []string {
	var a []string
	queues, scsi, thread := 0, false, false
	for _, d := range m.Disks {
		o := &d.Options
		switch {
		case o.BusOf() == api.BusSCSI:
			scsi, thread, queues = true, thread || o.IOThread, max(queues, o.Queues)
		case o.IOThread:
			a = append(a, "-object", "iothread,id=io"+strconv.Itoa(d.Slot))
		}
	}
	for _, c := range m.CDROMs {
		scsi = scsi || c.Bus == api.BusSCSI
	}
	if !scsi {
		return a
	}
	v := m.virtio("virtio-scsi") + ",id=scsi0"
	if thread {
		a = append(a, "-object", "iothread,id=ioscsi0")
		v += ",iothread=ioscsi0"
	}
	if queues = queuesOf(m.Boot, queues); queues > 0 {
		v += ",num_queues=" + strconv.Itoa(queues)
	}
	return append(a, "-device", v)
}

func (m *Machine) disk(d Disk, bootIndex int, p *places) []string {
	a := []string{"-blockdev", d.FileOptions().String(), "-blockdev", d.DiskOptions().String()}
	o := &d.Options
	switch o.BusOf() {
	case api.BusSCSI:
		device := "scsi-hd,bus=scsi0.0,channel=0,scsi-id=" + strconv.Itoa(d.Slot) + ",lun=0"
		return append(a, "-device", device+d.otherDevice(bootIndex))
	case api.BusSATA, api.BusIDE:
		return append(a, "-device", "ide-hd"+p.disk()+d.otherDevice(bootIndex))
	}
	return append(a, "-device", d.virtioOptions(m.virtio("virtio-blk"), m.port("pd", d.Slot), bootIndex, queuesOf(m.Boot, o.Queues)).String())
}

// otherDevice is what a disk that is not on virtio has beside its place.
func (d Disk) otherDevice(bootIndex int) string {
	return ",id=" + DiskID(d.Slot) + ",drive=" + DiskNode(d.Slot) + bootOption(bootIndex) + writeCache(&d.Options) + ",werror=" + d.onWriteError() + ",rerror=" + d.onReadError()
}

// writeCache tells the device whether a write may end before it is on the disk.
func writeCache(o *api.VMDisk) string {
	if o.Cache == api.CacheWritethrough || o.Cache == api.CacheDirectsync {
		return ",write-cache=off"
	}
	return ""
}

func (m *Machine) cdrom(n int, c CDROM, bootIndex int, p *places) []string {
	device := "ide-cd"
	if c.Bus == api.BusSCSI {
		device = "scsi-cd,bus=scsi0.0,channel=0,scsi-id=" + strconv.Itoa(cdromTarget+n) + ",lun=0"
	} else {
		device += p.drive()
	}
	device += ",id=" + CDROMID(n) + bootOption(bootIndex)
	if c.Path == "" {
		return []string{"-device", device}
	}
	return []string{"-blockdev", c.FileOptions(n).String(), "-blockdev", c.MediumOptions(n).String(), "-device", device + ",drive=" + CDROMNode(n)}
}

// FileOptions are the block node of the file in a drive, MediumOptions the one
// above it that the drive has.
func (c CDROM) FileOptions(n int) Options {
	o := fileNode(CDROMFileNode(n), c.Path, nil)
	o = append(o, Option{"read-only", true})
	if !rbdname.Is(c.Path) {
		o = append(o, Option{"locking", "on"})
	}
	return append(o, Option{"cache.no-flush", false})
}

// MediumOptions are the block node that a drive has.
func (c CDROM) MediumOptions(n int) Options {
	return Options{{"driver", c.Format}, {"node-name", CDROMNode(n)}, {"file", CDROMFileNode(n)}, {"read-only", true}}
}

func (m *Machine) validateDrives() error {
	if len(m.CDROMs) > api.MaxCDROMs {
		return api.Invalid("spec.cdroms", "has %d drives; at most %d are allowed", len(m.CDROMs), api.MaxCDROMs)
	}
	for i, c := range m.CDROMs {
		if c.Path == "" {
			continue
		}
		if c.Format != "qcow2" && c.Format != "raw" {
			return fmt.Errorf("build the QEMU command of vm %s: drive %d has an image of format %q, which is neither qcow2 nor raw", m.Name, i, c.Format)
		}
		if err := validFile("drive", c.Path); err != nil {
			return err
		}
	}
	return m.validateSlots()
}

// pcSlots are the places for devices on the one PCI bus of a pc, after its own.
const pcSlots = 29

// validateSlots refuses more PCI devices than a pc has places for.
func (m *Machine) validateSlots() error {
	if m.Type != api.MachinePC {
		return nil
	}
	n := 3 + len(m.NICs) // serial, random numbers, balloon
	scsi := false
	for _, d := range m.Disks {
		scsi = scsi || d.Options.BusOf() == api.BusSCSI
		if d.Options.BusOf() == api.BusVirtio {
			n++
		}
	}
	for _, c := range m.CDROMs {
		scsi = scsi || c.Bus == api.BusSCSI
	}
	for _, d := range m.HostDevices {
		if d.PCI != "" {
			n++
		}
	}
	for _, on := range []bool{scsi, m.hasUSB(), m.VNC != "", m.Seed != nil && !m.Seed.SATA, m.Watchdog != "", m.Vsock != 0} {
		if on {
			n++
		}
	}
	if n > pcSlots {
		return api.Invalid("spec.machine", "pc has places for %d devices and the VM has %d; put disks on the bus scsi, or use q35", pcSlots, n)
	}
	return nil
}

// onWriteError and onReadError are QEMU's policies (qemu(1), -device werror, rerror). A
// disk in a Ceph cluster halts the guest at any error: what is refused there, because
// the host is locked out, may not make its file system read-only.
func (d Disk) onWriteError() string {
	if rbdname.Is(d.Path) {
		return "stop"
	}
	return "enospc"
}

func (d Disk) onReadError() string {
	if rbdname.Is(d.Path) {
		return "stop"
	}
	return "report"
}
