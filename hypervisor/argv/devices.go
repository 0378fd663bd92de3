// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package argv

import (
	"fmt"
	"strconv"

	"github.com/muster-vm/muster/api"
)

// The guest finds each device at an address that follows from its slot alone,
// whether it was there at the start or plugged in later: disks and network
// cards sit behind PCIe root ports, and those are functions of fixed devices of
// the root bus, eight to a device.
const (
	firstNICPort  = 0x10 // device number on pcie.0
	firstDiskPort = 0x11
	memoryDevice  = 0x18
	portsPerBus   = 8
)

// NICDevice is the device of the network card in a slot, Netdev the host's end.
func NICDevice(slot int) string { return "nic" + strconv.Itoa(slot) }

// Netdev is the host's end of the network card in a slot.
func Netdev(slot int) string { return "net" + strconv.Itoa(slot) }

// MemoryID is the virtio-mem device, memoryBackend its memory.
const (
	MemoryID      = "vmem0"
	memoryBackend = "vmemory0"
)

// ports are the root ports of a machine.
func ports(b *api.VMBoot) []string {
	var out []string
	add := func(name string, first, n int) {
		for i := range n {
			o := Options{
				{"driver", "pcie-root-port"},
				{"id", name + strconv.Itoa(i+1)},
				{"chassis", (first-firstNICPort)*portsPerBus + i + 1},
				{"bus", "pcie.0"},
				{"addr", fmt.Sprintf("0x%x.%x", first+i/portsPerBus, i%portsPerBus)},
			}
			if i%portsPerBus == 0 {
				o = append(o, Option{"multifunction", true})
			}
			out = append(out, "-device", o.String())
		}
	}
	add("pn", firstNICPort, b.NICPorts)
	add("pd", firstDiskPort, b.DiskPorts)
	return out
}

// port is the bus of a slot, "" if it has no port of its own.
func (m *Machine) port(name string, slot int) string {
	if m.Boot == nil || name == "pd" && slot > m.Boot.DiskPorts || name == "pn" && slot > m.Boot.NICPorts {
		return ""
	}
	return name + strconv.Itoa(slot)
}

// FileOptions are the block node of a disk's file, DiskOptions the one above it
// that the guest's device has.
func (d Disk) FileOptions() Options {
	aio := d.Options.AIO
	if aio == "" {
		aio = api.AIOThreads
	}
	return append(fileNode(FileNode(d.Slot), d.Path, Options{{"locking", "on"}, {"aio", string(aio)}}), d.cacheOptions()...)
}

// DiskOptions are the block node that the guest's device has.
func (d Disk) DiskOptions() Options {
	return append(Options{{"driver", d.Format}, {"node-name", DiskNode(d.Slot)}, {"file", FileNode(d.Slot)}}, d.cacheOptions()...)
}

// cacheOptions are those of both nodes.
func (d Disk) cacheOptions() Options {
	direct := d.Options.Cache == api.CacheNone || d.Options.Cache == api.CacheDirectsync
	discard := d.Options.Discard
	if discard == "" {
		discard = api.DiscardUnmap
	}
	return Options{{"cache.direct", direct}, {"cache.no-flush", false}, {"discard", string(discard)}}
}

// virtioOptions are a disk on virtio as the guest sees it. Without a bus it has
// the next free place.
func (d Disk) virtioOptions(driver, bus string, bootIndex, queues int) Options {
	o := Options{{"driver", driver}}
	if d.Options.IOThread {
		o = append(o, Option{"iothread", "io" + strconv.Itoa(d.Slot)})
	}
	if queues > 0 {
		o = append(o, Option{"num-queues", queues})
	}
	o = append(o, Option{"id", DiskID(d.Slot)}, Option{"drive", DiskNode(d.Slot)})
	if bus != "" {
		o = append(o, Option{"bus", bus})
	}
	if bootIndex > 0 {
		o = append(o, Option{"bootindex", bootIndex})
	}
	if writeCache(&d.Options) != "" {
		o = append(o, Option{"write-cache", "off"})
	}
	return append(o, Option{"werror", d.onWriteError()}, Option{"rerror", d.onReadError()})
}

// queuesOf is how many queues a device gets that says so many.
func queuesOf(b *api.VMBoot, said int) int {
	if said == 0 && b != nil {
		return b.Queues
	}
	return said
}

// HotOptions are the device of a disk that is plugged in while QEMU runs. It has
// no place in the boot order, of which QEMU refuses one twice, until the next
// start.
func (d Disk) HotOptions(b *api.VMBoot) Options {
	return d.virtioOptions("virtio-blk-pci", "pd"+strconv.Itoa(d.Slot), 0, queuesOf(b, d.Options.Queues))
}

// NetdevOptions is the host's end of a network card.
func (c NIC) NetdevOptions() Options {
	o := Options{{"type", "tap"}, {"id", Netdev(c.Slot)}, {"ifname", c.Device}, {"script", "no"}, {"downscript", "no"}, {"vhost", false}}
	if !c.Offload {
		o = append(o, Option{"vnet_hdr", false})
	}
	return o
}

// HotOptions are the device of a card that is plugged in while QEMU runs.
func (c NIC) HotOptions() Options {
	return c.options("virtio-net-pci", "pn"+strconv.Itoa(c.Slot), 0, false, true)
}

// options are the network card as the guest sees it.
func (c NIC) options(driver, bus string, bootIndex int, rom, pci bool) Options {
	o := Options{{"driver", driver}, {"id", NICDevice(c.Slot)}, {"netdev", Netdev(c.Slot)}, {"mac", c.MAC}}
	if bus != "" {
		o = append(o, Option{"bus", bus})
	}
	if c.MTU > 0 {
		o = append(o, Option{"host_mtu", c.MTU})
	}
	if bootIndex > 0 {
		o = append(o, Option{"bootindex", bootIndex})
	}
	if !rom && pci {
		o = append(o, Option{"romfile", ""})
	}
	return o
}

// HasROM reports whether the card with an index among the machine's can boot.
func (m *Machine) HasROM(i int) bool {
	if rom := m.NICs[i].ROM; rom != nil {
		return *rom
	}
	return m.bootIndexes().nic(i) > 0
}

// nic is a network card. One without a ROM has no place in the boot order.
func (m *Machine) nic(i, bootIndex int) []string {
	c, rom := m.NICs[i], m.HasROM(i)
	if !rom {
		bootIndex = 0
	}
	return []string{"-netdev", c.NetdevOptions().String(), "-device", c.options(m.virtio("virtio-net"), m.port("pn", c.Slot), bootIndex, rom, m.pci()).String()}
}

// memory is the virtio-mem device, if the machine has one, with the size that
// the guest is asked to use of it.
func (m *Machine) hotMemory() []string {
	if m.Boot == nil || m.Boot.MaxMemory <= m.Boot.Memory {
		return nil
	}
	region := m.Boot.MaxMemory - m.Boot.Memory
	device := Options{
		{"driver", "virtio-mem-pci"}, {"id", MemoryID}, {"memdev", memoryBackend}, {"bus", "pcie.0"}, {"addr", fmt.Sprintf("0x%x", memoryDevice)},
		{"block-size", int(api.MemoryBlock)}, {"requested-size", int(HotMemory(m.Boot, m.Memory))},
	}
	return []string{
		"-object", "memory-backend-ram,id=" + memoryBackend + ",size=" + strconv.FormatInt(int64(region), 10) + ",reserve=off",
		"-device", device.String(),
	}
}

// HotMemory is how much of the virtio-mem device a VM with so much memory uses.
func HotMemory(b *api.VMBoot, memory api.Size) api.Size {
	return min(max(memory-b.Memory, 0), b.MaxMemory-b.Memory) / api.MemoryBlock * api.MemoryBlock
}

// size is the value of -m.
func (m *Machine) size() string {
	size := m.Memory
	if m.Boot != nil {
		size = m.Boot.Memory
	}
	v := "size=" + mebibytes(size)
	if m.Boot != nil && m.Boot.MaxMemory > size {
		v += ",maxmem=" + mebibytes(m.Boot.MaxMemory)
	}
	return v
}

func (m *Machine) validateBoot() error {
	b := m.Boot
	if b == nil {
		return nil
	}
	if b.Memory < api.MinMemory || b.Memory%api.MiB != 0 || b.MaxMemory < b.Memory || (b.MaxMemory-b.Memory)%api.MemoryBlock != 0 {
		return fmt.Errorf("build the QEMU command of vm %s: it starts with %d bytes of memory of %d", m.Name, b.Memory, b.MaxMemory)
	}
	if b.MaxCPUs < m.CPUs || b.MaxCPUs > MaxCPUs {
		return api.Invalid("spec.maxCPUs", "is %d; QEMU's q35 machine takes %d (spec.cpus) to %d", b.MaxCPUs, m.CPUs, MaxCPUs)
	}
	if b.DiskPorts < 0 || b.DiskPorts > api.MaxDisks || b.NICPorts < 0 || b.NICPorts > api.MaxNICs {
		return fmt.Errorf("build the QEMU command of vm %s: %d ports for disks and %d for network cards", m.Name, b.DiskPorts, b.NICPorts)
	}
	return nil
}
