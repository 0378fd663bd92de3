// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package argv

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/muster-vm/muster/api"
)

// Board is the part of a machine that has defaults: its zero value is a q35
// with a BIOS, without a display.
type Board struct {
	// Type is q35 when empty.
	Type api.MachineType
	// Version is QEMU's own name of the type and its version, such as pc-q35-7.2;
	// empty takes the newest that it has.
	Version string
	// CPU is the value of -cpu; all that the accelerator can do when empty.
	CPU string
	// Sockets, Cores and Threads multiply to the number of CPUs; when 0, all
	// CPUs are cores of one socket.
	Sockets, Cores, Threads int
	// Firmware is UEFI; nil is the BIOS.
	Firmware *Firmware
	// Kernel is started directly; nil boots from devices.
	Kernel *Kernel
	// TPM is the path of swtpm's control socket; empty without a TPM.
	TPM string
	// NUMA nodes of the guest.
	NUMA []api.VMNUMANode
	// Hugepages is the size of the pages that back the memory, 0 for the usual.
	Hugepages api.Size
	// Watchdog is what its end of time does; empty without a watchdog.
	Watchdog api.WatchdogAction
	// Vsock is the guest's context identifier, 0 without.
	Vsock uint32
	// CDROMs are the drives, in the order of the spec.
	CDROMs []CDROM
	// BootOrder as in the spec.
	BootOrder []string
	// HostDevices of this node that the VM has.
	HostDevices []api.VMHostDevice
	// Extra arguments of an administrator.
	Extra []string
}

// Firmware is UEFI.
type Firmware struct {
	// Code is the path of the program, which is only read.
	Code string
	// Vars is the path of the VM's own variable store, VarsFormat its format.
	Vars, VarsFormat string
	// Secure protects the store from everything but the firmware (SMM).
	Secure bool
}

// Kernel is a kernel with what it is given; Initrd and Cmdline may be empty.
type Kernel struct{ Image, Initrd, Cmdline string }

// The names that QEMU knows the parts of the machine by.
const (
	// WatchdogID and VsockID are device IDs.
	WatchdogID = "watchdog0"
	VsockID    = "vsock0"
	// VarsNode is the block node of the UEFI variables.
	VarsNode = "fwvars"
	// USBBus is the bus for USB devices, if the machine has one; see display.
	USBBus = "usb0.0"
)

// pci reports whether the machine has PCI.
func (m *Machine) pci() bool { return m.Type != api.MachineMicroVM }

// virtio is the name of a virtio device on the machine's transport.
func (m *Machine) virtio(name string) string {
	if m.pci() {
		return name + "-pci"
	}
	return name + "-device"
}

// machine is the value of -machine.
func (m *Machine) machine() string {
	v := "q35,usb=off,vmport=off"
	switch m.Type {
	case api.MachinePC:
		v = "pc,usb=off,vmport=off"
	case api.MachineMicroVM:
		v = "microvm,isa-serial=on,rtc=on"
	}
	if m.Version != "" {
		_, options, _ := strings.Cut(v, ",")
		v = escape(m.Version) + "," + options
	}
	v += ",graphics=off,dump-guest-core=off"
	if f := m.Firmware; f != nil {
		if f.Secure {
			v += ",smm=on"
		}
		v += ",pflash0=fwcode,pflash1=" + VarsNode
	}
	if m.Hugepages > 0 && len(m.NUMA) == 0 {
		v += ",memory-backend=ram0"
	}
	return v
}

// cpu is the value of -cpu.
func (m *Machine) cpu() string {
	switch {
	case m.CPU != "":
		return m.CPU
	case m.Accelerator == api.AccelKVM:
		return "host"
	}
	return "max"
}

// smp is the value of -smp.
func (m *Machine) smp() string {
	sockets, cores, threads := m.Sockets, m.Cores, m.Threads
	if sockets == 0 {
		sockets, cores, threads = 1, m.CPUs, 1
	}
	if m.Boot != nil && m.Boot.MaxCPUs > m.CPUs {
		return fmt.Sprintf("cpus=%d,maxcpus=%d,sockets=1,cores=%d,threads=1", m.CPUs, m.Boot.MaxCPUs, m.Boot.MaxCPUs)
	}
	return fmt.Sprintf("cpus=%d,sockets=%d,cores=%d,threads=%d", m.CPUs, sockets, cores, threads)
}

// actions is the value of -action.
func (m *Machine) actions() string {
	if m.Watchdog == "" {
		return "panic=none"
	}
	return "panic=none,watchdog=" + string(m.Watchdog)
}

// board is everything that has no options of its own in base.
func (m *Machine) board() []string {
	a := append(m.memory(), m.firmware()...)
	if k := m.Kernel; k != nil {
		a = append(a, "-kernel", k.Image)
		if k.Initrd != "" {
			a = append(a, "-initrd", k.Initrd)
		}
		if k.Cmdline != "" {
			a = append(a, "-append", k.Cmdline)
		}
	}
	if m.TPM != "" {
		a = append(a,
			"-chardev", "socket,id=tpmsock0,path="+escape(m.TPM),
			"-tpmdev", "emulator,id=tpm0,chardev=tpmsock0",
			"-device", "tpm-crb,id=tpmcrb0,tpmdev=tpm0")
	}
	return a
}

// hasUSB reports whether the machine has a USB controller.
func (m *Machine) hasUSB() bool { return m.VNC != "" || m.passesUSB() }

func (m *Machine) passesUSB() bool {
	return slices.ContainsFunc(m.HostDevices, func(d api.VMHostDevice) bool { return d.USB != "" })
}

// extras are what few machines have and the devices of the node. They come last,
// so that no other device changes its slot, and after the screen, whose USB
// controller they share.
func (m *Machine) extras() []string {
	var a []string
	if m.Watchdog != "" {
		a = append(a, "-device", "i6300esb,id="+WatchdogID)
	}
	if m.Vsock != 0 {
		a = append(a, "-device", m.virtio("vhost-vsock")+",id="+VsockID+",guest-cid="+strconv.FormatUint(uint64(m.Vsock), 10))
	}
	if m.passesUSB() && m.VNC == "" {
		a = append(a, "-device", usbController)
	}
	for i, d := range m.HostDevices {
		a = append(a, hostDevice(i, d)...)
	}
	return a
}

// firmware is UEFI's program and variables.
func (m *Machine) firmware() []string {
	f := m.Firmware
	if f == nil {
		return nil
	}
	a := []string{
		"-blockdev", "driver=file,node-name=fwcodefile,filename=" + escape(f.Code) + ",read-only=on,locking=on,cache.no-flush=off",
		"-blockdev", "driver=raw,node-name=fwcode,file=fwcodefile,read-only=on",
		"-blockdev", append(fileNode(VarsNode+"file", f.Vars, Options{{"locking", "on"}}), Option{"cache.no-flush", false}).String(),
		"-blockdev", "driver=" + f.VarsFormat + ",node-name=" + VarsNode + ",file=" + VarsNode + "file",
	}
	if f.Secure {
		a = append(a, "-global", "driver=cfi.pflash01,property=secure,value=on")
	}
	return a
}

// memory is what backs the guest's memory, and how it is divided.
func (m *Machine) memory() []string {
	if len(m.NUMA) == 0 {
		if m.Hugepages == 0 {
			return nil
		}
		return []string{"-object", m.ram("ram0", m.Memory, nil)} // never with room for more, see api.VMSpec.PowerOn
	}
	var a []string
	for i, n := range m.NUMA {
		id := "ram" + strconv.Itoa(i)
		node := "node,nodeid=" + strconv.Itoa(i) + ",memdev=" + id
		for part := range strings.SplitSeq(n.CPUs, ",") {
			node += ",cpus=" + part
		}
		a = append(a, "-object", m.ram(id, n.Memory, n.HostNode), "-numa", node)
	}
	return a
}

func (m *Machine) ram(id string, size api.Size, hostNode *int) string {
	v := "memory-backend-ram,id=" + id
	if m.Hugepages > 0 {
		v = "memory-backend-memfd,id=" + id + ",hugetlb=on,hugetlbsize=" + mebibytes(m.Hugepages) + ",prealloc=on"
	}
	v += ",size=" + mebibytes(size)
	if hostNode != nil {
		v += ",host-nodes=" + strconv.Itoa(*hostNode) + ",policy=bind"
	}
	return v
}

func mebibytes(n api.Size) string { return strconv.FormatInt(int64(n/api.MiB), 10) + "M" }

// hostDevice is a device of the node, for the VM alone.
func hostDevice(i int, d api.VMHostDevice) []string {
	id := "id=host" + strconv.Itoa(i)
	if d.PCI != "" {
		return []string{"-device", "vfio-pci," + id + ",host=" + d.PCI}
	}
	vendor, product, _ := strings.Cut(d.USB, ":")
	return []string{"-device", "usb-host," + id + ",bus=" + USBBus + ",vendorid=0x" + vendor + ",productid=0x" + product}
}

var (
	cpuValue  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*(,[+-]?[A-Za-z0-9][A-Za-z0-9._=-]*)*$`)
	pciValue  = regexp.MustCompile(`^[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$`)
	usbValue  = regexp.MustCompile(`^[0-9a-f]{4}:[0-9a-f]{4}$`)
	cpusValue = regexp.MustCompile(`^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$`)
)

// validateBoard refuses what the API would not let through, and what QEMU could
// not take.
func (m *Machine) validateBoard() error {
	refuse := func(what string, value any) error {
		return fmt.Errorf("build the QEMU command of vm %s: %s %q cannot be used", m.Name, what, fmt.Sprint(value))
	}
	if m.CPU != "" && !cpuValue.MatchString(m.CPU) {
		return refuse("CPU", m.CPU)
	}
	if m.Sockets != 0 && m.Sockets*m.Cores*m.Threads != m.CPUs {
		return api.Invalid("spec.cpu", "%d sockets × %d cores × %d threads do not make %d CPUs", m.Sockets, m.Cores, m.Threads, m.CPUs)
	}
	for _, n := range m.NUMA {
		if !cpusValue.MatchString(n.CPUs) {
			return refuse("list of CPUs", n.CPUs)
		}
	}
	for _, d := range m.HostDevices {
		if d.PCI != "" && !pciValue.MatchString(d.PCI) || d.PCI == "" && !usbValue.MatchString(d.USB) {
			return refuse("host device", d.Key())
		}
	}
	var paths []struct{ what, path string }
	add := func(what, path string) { paths = append(paths, struct{ what, path string }{what, path}) }
	if m.TPM != "" {
		add("TPM socket", m.TPM)
	}
	for _, p := range paths {
		if len(p.path) > MaxSocketPath {
			return fmt.Errorf("path %q of the %s has %d bytes; unix sockets take at most %d: choose a shorter data directory", p.path, p.what, len(p.path), MaxSocketPath)
		}
	}
	if f := m.Firmware; f != nil {
		if f.VarsFormat != "qcow2" && f.VarsFormat != "raw" {
			return refuse("format of the UEFI variables", f.VarsFormat)
		}
		add("UEFI program", f.Code)
		if err := validFile("UEFI variables", f.Vars); err != nil {
			return err
		}
	}
	if k := m.Kernel; k != nil {
		add("kernel", k.Image)
		if k.Initrd != "" {
			add("initial RAM disk", k.Initrd)
		}
		if strings.ContainsAny(k.Cmdline, "\x00\n\r") {
			return refuse("kernel command line", k.Cmdline)
		}
	}
	for _, p := range paths {
		if err := validPath(p.what, p.path); err != nil {
			return err
		}
	}
	for i, e := range m.Extra {
		if e == "" || strings.ContainsAny(e, "\x00\n\r") {
			return refuse(fmt.Sprintf("extra argument %d", i), e)
		}
	}
	return m.validateDrives()
}
