// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"github.com/muster-vm/muster/api"
)

// machineFlags are the flags of a VM's machine, for vm create and vm set.
type machineFlags struct {
	machine, cpuModel, topology string
	uefi, secureBoot, bios      bool
	tpm                         bool
	watchdog                    string
	vsock                       string
	hugepages                   string
	cdroms                      []string
	boot                        []string
	pci, usb                    []string
	extra                       []string
	numa                        []string
	kernel, initrd, cmdline     string
}

const (
	none = "none"

	diskOptionHelp = "how the new disks and those of --volume are connected, as KEY=VALUE,...: bus (virtio, scsi, sata, ide), cache (writeback, none, writethrough, directsync), aio (threads, io_uring, native), discard (unmap, ignore), queues, iothread"
)

func (f *machineFlags) add(fs *pflag.FlagSet, create bool) {
	off := ""
	if !create {
		off = ", or none"
	}
	fs.StringVar(&f.machine, "machine", "", "machine type: q35, pc or microvm (default \"q35\")")
	fs.StringVar(&f.cpuModel, "cpu-model", "", "host, cluster (what every node can run) or one of QEMU's models (default \"host\")")
	fs.StringVar(&f.topology, "cpu-topology", "", "SOCKETS:CORES:THREADS; their product is --cpu")
	fs.BoolVar(&f.uefi, "uefi", false, "begin with UEFI, with variables of its own")
	fs.BoolVar(&f.secureBoot, "secure-boot", false, "UEFI that runs signed programs only")
	fs.BoolVar(&f.tpm, "tpm", false, "a TPM 2.0")
	fs.StringVar(&f.watchdog, "watchdog", "", "a watchdog, with what it does: reset, shutdown, poweroff, pause, inject-nmi"+off)
	fs.StringVar(&f.vsock, "vsock", "", "a socket to the host: auto or an address from 3 on"+off)
	fs.StringVar(&f.hugepages, "hugepages", "", "pages that back the memory: off, 2M or 1G (default \"off\")")
	fs.StringVar(&f.kernel, "kernel", "", "start the kernel in this image directly"+off)
	fs.StringVar(&f.initrd, "initrd", "", "image of the initial RAM disk for --kernel")
	fs.StringVar(&f.cmdline, "cmdline", "", "command line for --kernel")
	fs.StringArrayVar(&f.cdroms, "cdrom", nil, "a CD-ROM drive with this image, or with an empty tray: empty (repeatable)"+off)
	fs.StringSliceVar(&f.boot, "boot", nil, "what to boot from, in order, such as cdrom0,disk0,nic0 (default disks, then drives)")
	fs.StringArrayVar(&f.pci, "pci", nil, "give the VM the node's PCI device, as [NODE=]0000:01:00.0 (repeatable)"+off)
	fs.StringArrayVar(&f.usb, "usb", nil, "give the VM the node's USB device, as [NODE=]046d:c52b (repeatable)"+off)
	fs.StringArrayVar(&f.numa, "numa", nil, "a NUMA node of the guest, as CPUS:MEMORY[:HOSTNODE], such as 0-3:4G:0 (repeatable)"+off)
	fs.StringArrayVar(&f.extra, "extra-arg", nil, "an argument for QEMU, for administrators (repeatable)"+off)
	if !create {
		fs.BoolVar(&f.bios, "bios", false, "begin with the BIOS; the UEFI variables are removed")
	}
}

// list returns a repeatable flag, empty if it is the one word none.
func list(values []string) []string {
	if len(values) == 1 && values[0] == none {
		return []string{}
	}
	return values
}

// spec adds what was given to a spec, or to a merge patch of one.
func (f *machineFlags) spec(spec map[string]any, changed func(string) bool) error {
	set(spec, "machine", f.machine)
	set(spec, "hugepages", f.hugepages)
	cpu := map[string]any{}
	set(cpu, "model", f.cpuModel)
	if f.topology != "" {
		parts := strings.Split(f.topology, ":")
		if len(parts) != 3 {
			return usagef("--cpu-topology: %q is not SOCKETS:CORES:THREADS, such as 2:4:1", f.topology)
		}
		for i, key := range []string{"sockets", "cores", "threads"} {
			n, err := strconv.Atoi(parts[i])
			if err != nil || n < 1 {
				return usagef("--cpu-topology: %q is not SOCKETS:CORES:THREADS, such as 2:4:1", f.topology)
			}
			cpu[key] = n
		}
	}
	if len(cpu) > 0 {
		spec["cpu"] = cpu
	}
	switch {
	case f.bios && (f.uefi || f.secureBoot):
		return usagef("--bios and --uefi contradict each other")
	case f.bios:
		spec["firmware"] = map[string]any{"type": api.FirmwareBIOS, "secureBoot": false}
	case f.uefi || f.secureBoot:
		spec["firmware"] = map[string]any{"type": api.FirmwareUEFI, "secureBoot": f.secureBoot}
	}
	if changed("tpm") {
		spec["tpm"] = nil
		if f.tpm {
			spec["tpm"] = map[string]any{}
		}
	}
	if changed("watchdog") {
		spec["watchdog"] = nil
		if f.watchdog != none {
			spec["watchdog"] = map[string]any{"action": f.watchdog}
		}
	}
	if changed("kernel") || changed("initrd") || changed("cmdline") {
		k := map[string]any{}
		set(k, "image", f.kernel)
		set(k, "initrd", f.initrd)
		set(k, "cmdline", f.cmdline)
		spec["kernel"] = k
		if f.kernel == none {
			spec["kernel"] = nil
		}
	}
	if err := f.vsockSpec(spec, changed); err != nil {
		return err
	}
	return f.lists(spec, changed)
}

func (f *machineFlags) vsockSpec(spec map[string]any, changed func(string) bool) error {
	if !changed("vsock") {
		return nil
	}
	switch f.vsock {
	case none:
		spec["vsock"] = nil
	case "auto":
		spec["vsock"] = map[string]any{}
	default:
		cid, err := strconv.ParseUint(f.vsock, 10, 32)
		if err != nil {
			return usagef("--vsock: %q is neither auto nor an address from %d on", f.vsock, api.MinVsockCID)
		}
		spec["vsock"] = map[string]any{"cid": cid}
	}
	return nil
}

// lists adds the repeatable flags.
func (f *machineFlags) lists(spec map[string]any, changed func(string) bool) error {
	if changed("cdrom") {
		drives := []map[string]any{}
		for _, image := range list(f.cdroms) {
			d := map[string]any{}
			if image != "empty" {
				d["image"] = image
			}
			drives = append(drives, d)
		}
		spec["cdroms"] = drives
	}
	if changed("boot") {
		spec["bootOrder"] = list(f.boot)
	}
	if changed("extra-arg") {
		spec["extraArgs"] = list(f.extra)
	}
	if changed("pci") || changed("usb") {
		devices := []map[string]any{}
		for _, kind := range []struct {
			key    string
			values []string
		}{{"pci", list(f.pci)}, {"usb", list(f.usb)}} {
			for _, v := range kind.values {
				d := map[string]any{}
				if node, device, ok := strings.Cut(v, "="); ok {
					d["node"], v = node, device
				}
				d[kind.key] = v
				devices = append(devices, d)
			}
		}
		spec["hostDevices"] = devices
	}
	if !changed("numa") {
		return nil
	}
	nodes := []map[string]any{}
	for _, v := range list(f.numa) {
		n, err := parseNUMA(v)
		if err != nil {
			return err
		}
		nodes = append(nodes, n)
	}
	spec["numa"] = nodes
	return nil
}

func parseNUMA(v string) (map[string]any, error) {
	parts := strings.Split(v, ":")
	if len(parts) != 2 && len(parts) != 3 {
		return nil, usagef("--numa: %q is not CPUS:MEMORY[:HOSTNODE], such as 0-3:4G:0", v)
	}
	memory, err := api.ParseSize(parts[1])
	if err != nil {
		return nil, usagef("--numa: %v", err)
	}
	n := map[string]any{"cpus": parts[0], "memory": memory}
	if len(parts) == 3 {
		host, err := strconv.Atoi(parts[2])
		if err != nil {
			return nil, usagef("--numa: %q is not the number of a NUMA node of the host", parts[2])
		}
		n["hostNode"] = host
	}
	return n, nil
}

// parseDiskOptions reads --disk-options.
func parseDiskOptions(text string) (map[string]any, error) {
	out := map[string]any{}
	if text == "" {
		return out, nil
	}
	for part := range strings.SplitSeq(text, ",") {
		key, value, ok := strings.Cut(part, "=")
		switch {
		case part == "iothread":
			out["iothread"] = true
		case !ok:
			return nil, usagef("--disk-options: %q is not KEY=VALUE", part)
		case key == "bus", key == "cache", key == "aio", key == "discard":
			out[key] = value
		case key == "queues":
			n, err := strconv.Atoi(value)
			if err != nil {
				return nil, usagef("--disk-options: queues is %q, which is no number", value)
			}
			out[key] = n
		case key == "iothread":
			on, err := strconv.ParseBool(value)
			if err != nil {
				return nil, usagef("--disk-options: iothread is %q; give true or false", value)
			}
			out[key] = on
		default:
			return nil, usagef("--disk-options: %q is not known; there are bus, cache, aio, discard, queues and iothread", key)
		}
	}
	return out, nil
}

// machineText is one line about a VM's machine, for people.
func machineText(s *api.VMSpec) string {
	out := []string{string(s.MachineType())}
	switch {
	case s.SecureBoot():
		out = append(out, "UEFI with Secure Boot")
	case s.UEFI():
		out = append(out, "UEFI")
	default:
		out = append(out, "BIOS")
	}
	if s.TPM != nil {
		out = append(out, "TPM 2.0")
	}
	if !s.Display.Shown() {
		out = append(out, "no screen")
	}
	if s.Watchdog != nil {
		out = append(out, "watchdog "+string(s.Watchdog.Action))
	}
	if s.Vsock != nil {
		out = append(out, fmt.Sprintf("vsock %d", s.Vsock.CID))
	}
	if s.Hugepages.Size() > 0 {
		out = append(out, string(s.Hugepages)+" pages")
	}
	for i, d := range s.CDROMs {
		out = append(out, fmt.Sprintf("cdrom%d %s", i, dash(d.Image)))
	}
	for i := range s.HostDevices {
		out = append(out, s.HostDevices[i].Key())
	}
	return strings.Join(out, ", ")
}

// cpuText is the model and, if it was asked for, the arrangement of the CPUs.
func cpuText(s *api.VMSpec) string {
	text := s.CPUModel()
	if c := s.CPU; c != nil && c.Sockets+c.Cores+c.Threads > 0 {
		sockets, cores, threads := s.Topology(s.CPUs)
		text += fmt.Sprintf(", %d sockets × %d cores × %d threads", sockets, cores, threads)
	}
	return text
}

// runningCPUText is what a guest runs with: the model and how much was added.
func runningCPUText(qemu string) string {
	model, more, _ := strings.Cut(qemu, ",")
	if n := strings.Count(","+more, ",+"); n > 0 {
		return fmt.Sprintf("%s with %d features", model, n)
	}
	return model
}
