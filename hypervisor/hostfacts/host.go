// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hostfacts

import (
	"cmp"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/muster-vm/muster/api"
)

// Limits of what is read.
const (
	MaxFile    = 4 << 20
	MaxDevices = 1024
	// maxName bounds the name of a device.
	maxName = 80
)

// Host reads the kernel's part of a host's facts below root.
func Host(root string) api.NodeFactsStatus {
	h := host{root}
	var f api.NodeFactsStatus
	f.CPU = h.cpu()
	f.Memory = kib(field(h.text("proc/meminfo"), "MemTotal"))
	f.NUMA, f.Hugepages = h.numa(), h.hugepages("sys/kernel/mm/hugepages")
	f.PCI, f.USB = h.pci(), h.usb()
	f.Missing = map[api.HostFeature]string{}
	if !h.exists("dev/vhost-vsock") {
		f.Missing[api.FeatureVsock] = "the kernel module vhost_vsock is not loaded; load it with modprobe vhost_vsock"
	}
	if !slices.ContainsFunc(f.PCI, func(d api.HostPCI) bool { return d.IOMMUGroup != nil }) {
		f.Missing[api.FeatureVFIO] = "the host has no IOMMU in use; enable it in the firmware and with intel_iommu=on or amd_iommu=on"
	}
	return f
}

type host struct{ root string }

func (h host) path(name string) string { return filepath.Join(h.root, name) }

func (h host) exists(name string) bool {
	_, err := os.Stat(h.path(name))
	return err == nil
}

// text is the content of a file, "" if there is none.
func (h host) text(name string) string {
	f, err := os.Open(h.path(name))
	if err != nil {
		return ""
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, MaxFile))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(strings.ToValidUTF8(string(b), "?"))
}

// list are the names in a directory, in order.
func (h host) list(name string) []string {
	entries, err := os.ReadDir(h.path(name))
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range entries[:min(len(entries), MaxDevices)] {
		out = append(out, e.Name())
	}
	return out
}

// link is the last element of what a symbolic link points to.
func (h host) link(name string) string {
	to, err := os.Readlink(h.path(name))
	if err != nil {
		return ""
	}
	return filepath.Base(to)
}

// field is the value of a line "name: value".
func field(text, name string) string {
	for line := range strings.Lines(text) {
		k, v, ok := strings.Cut(line, ":")
		if ok && strings.TrimSpace(k) == name {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// kib reads "1234 kB".
func kib(v string) api.Size {
	n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(v, "kB")), 10, 64)
	if err != nil || n < 0 {
		return 0
	}
	return api.Size(n) * api.KiB
}

// cpu is the processor (proc_cpuinfo(5)).
func (h host) cpu() api.HostCPU {
	info := h.text("proc/cpuinfo")
	c := api.HostCPU{Vendor: field(info, "vendor_id"), Name: clip(field(info, "model name")), Flags: strings.Fields(field(info, "flags"))}
	slices.Sort(c.Flags)
	sockets, cores := map[string]bool{}, map[string]bool{}
	for _, name := range h.list("sys/devices/system/cpu") {
		if n, ok := strings.CutPrefix(name, "cpu"); !ok || !digits(n) {
			continue
		}
		dir := "sys/devices/system/cpu/" + name + "/topology/"
		socket := h.text(dir + "physical_package_id")
		if socket == "" {
			continue // offline
		}
		c.Threads++
		sockets[socket] = true
		cores[socket+"/"+h.text(dir+"die_id")+"/"+h.text(dir+"core_id")] = true
	}
	c.Sockets, c.Cores = len(sockets), len(cores)
	return c
}

func digits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

func clip(s string) string {
	if len(s) > maxName {
		return strings.ToValidUTF8(s[:maxName], "")
	}
	return s
}

func (h host) numa() []api.HostNUMA {
	var out []api.HostNUMA
	for _, name := range h.list("sys/devices/system/node") {
		n, ok := strings.CutPrefix(name, "node")
		if !ok || !digits(n) {
			continue
		}
		id, err := strconv.Atoi(n)
		if err != nil {
			continue
		}
		dir := "sys/devices/system/node/" + name
		out = append(out, api.HostNUMA{
			ID: id, CPUs: h.text(dir + "/cpulist"),
			Memory:    kib(field(h.text(dir+"/meminfo"), "Node "+n+" MemTotal")),
			Hugepages: h.hugepages(dir + "/hugepages"),
		})
	}
	slices.SortFunc(out, func(a, b api.HostNUMA) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// hugepages are the pools below a directory of the kernel's
// (admin-guide/mm/hugetlbpage); empty ones are left out.
func (h host) hugepages(dir string) []api.HostHugepages {
	var out []api.HostHugepages
	for _, name := range h.list(dir) {
		size, ok := strings.CutPrefix(name, "hugepages-")
		n, err := strconv.Atoi(h.text(dir + "/" + name + "/nr_hugepages"))
		if !ok || err != nil || n < 1 {
			continue
		}
		out = append(out, api.HostHugepages{Size: kib(size), Total: n})
	}
	slices.SortFunc(out, func(a, b api.HostHugepages) int { return cmp.Compare(a.Size, b.Size) })
	return out
}

func (h host) pci() []api.HostPCI {
	var out []api.HostPCI
	for _, address := range h.list("sys/bus/pci/devices") {
		dir := "sys/bus/pci/devices/" + address + "/"
		d := api.HostPCI{
			Address: address, Vendor: hex4(h.text(dir + "vendor")), Device: hex4(h.text(dir + "device")), Class: hex4(h.text(dir + "class")),
			Driver: h.link(dir + "driver"),
		}
		if n, err := strconv.Atoi(h.link(dir + "iommu_group")); err == nil {
			d.IOMMUGroup = &n
		}
		if n, err := strconv.Atoi(h.text(dir + "numa_node")); err == nil && n >= 0 {
			d.NUMANode = &n
		}
		out = append(out, d)
	}
	return out
}

// hex4 are the first four digits of a number such as 0x020000.
func hex4(s string) string {
	s = strings.TrimPrefix(s, "0x")
	return s[:min(len(s), 4)]
}

func (h host) usb() []api.HostUSB {
	var out []api.HostUSB
	for _, port := range h.list("sys/bus/usb/devices") {
		dir := "sys/bus/usb/devices/" + port + "/"
		vendor, product := h.text(dir+"idVendor"), h.text(dir+"idProduct")
		if vendor == "" || product == "" || strings.HasPrefix(port, "usb") {
			continue // an interface, or a root hub
		}
		name := strings.TrimSpace(h.text(dir+"manufacturer") + " " + h.text(dir+"product"))
		out = append(out, api.HostUSB{ID: vendor + ":" + product, Port: port, Name: clip(name)})
	}
	return out
}

// sortedTrue are the names of what is true.
func sortedTrue(props map[string]any) []string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(props)) {
		if on, ok := props[name].(bool); ok && on {
			out = append(out, name)
		}
	}
	return out
}
