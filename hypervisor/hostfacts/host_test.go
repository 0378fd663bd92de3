// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hostfacts

import (
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
)

// tree makes files below a directory; a value that begins with "-> " is a link.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		var err error
		if to, ok := strings.CutPrefix(content, "-> "); ok {
			err = os.Symlink(to, path)
		} else {
			err = os.WriteFile(path, []byte(content+"\n"), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func twoSockets(t *testing.T) string {
	files := map[string]string{
		"proc/cpuinfo": "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Xeon\nflags\t\t: vmx fpu aes\n\nprocessor\t: 1\nvendor_id\t: Other\n",
		"proc/meminfo": "MemTotal:       8388608 kB\nMemFree: 1 kB",
		"sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages":                 "512",
		"sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages":              "0",
		"sys/devices/system/node/online":                                        "0-1",
		"sys/devices/system/node/node10/cpulist":                                "2-3",
		"sys/devices/system/node/node10/meminfo":                                "Node 10 MemTotal:  4194304 kB",
		"sys/devices/system/node/node0/cpulist":                                 "0-1",
		"sys/devices/system/node/node0/meminfo":                                 "Node 0 MemTotal:  4194304 kB",
		"sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages": "512",
		"sys/bus/pci/devices/0000:00:1f.0/vendor":                               "0x8086",
		"sys/bus/pci/devices/0000:00:1f.0/device":                               "0x2918",
		"sys/bus/pci/devices/0000:00:1f.0/class":                                "0x060100",
		"sys/bus/pci/devices/0000:00:1f.0/numa_node":                            "-1",
		"sys/bus/pci/devices/0000:01:00.0/vendor":                               "0x10de",
		"sys/bus/pci/devices/0000:01:00.0/device":                               "0x1eb8",
		"sys/bus/pci/devices/0000:01:00.0/class":                                "0x030200",
		"sys/bus/pci/devices/0000:01:00.0/numa_node":                            "1",
		"sys/bus/pci/devices/0000:01:00.0/driver":                               "-> ../../../bus/pci/drivers/vfio-pci",
		"sys/bus/pci/devices/0000:01:00.0/iommu_group":                          "-> ../../../kernel/iommu_groups/17",
		"sys/bus/usb/devices/usb1/idVendor":                                     "1d6b",
		"sys/bus/usb/devices/usb1/idProduct":                                    "0002",
		"sys/bus/usb/devices/1-2/idVendor":                                      "046d",
		"sys/bus/usb/devices/1-2/idProduct":                                     "c52b",
		"sys/bus/usb/devices/1-2/manufacturer":                                  "Logitech",
		"sys/bus/usb/devices/1-2/product":                                       strings.Repeat("x", 200),
		"sys/bus/usb/devices/1-2:1.0/bInterfaceClass":                           "03",
		"dev/vhost-vsock":                                                       "",
	}
	for cpu, socket := range []string{"0", "0", "1", "1"} {
		dir := "sys/devices/system/cpu/cpu" + string(rune('0'+cpu)) + "/topology/"
		files[dir+"physical_package_id"], files[dir+"core_id"] = socket, "0"
	}
	files["sys/devices/system/cpu/cpufreq/x"] = ""
	files["sys/devices/system/cpu/cpu9/online"] = "0"
	return tree(t, files)
}

func TestHost(t *testing.T) {
	f := Host(twoSockets(t))
	want := api.HostCPU{Vendor: "GenuineIntel", Name: "Xeon", Sockets: 2, Cores: 2, Threads: 4, Flags: []string{"aes", "fpu", "vmx"}}
	if !reflect.DeepEqual(f.CPU, want) {
		t.Errorf("cpu %+v", f.CPU)
	}
	pages := []api.HostHugepages{{Size: 2 * api.MiB, Total: 512}}
	if f.Memory != 8*api.GiB || !reflect.DeepEqual(f.Hugepages, pages) {
		t.Errorf("memory %s, hugepages %v", f.Memory, f.Hugepages)
	}
	numa := []api.HostNUMA{{ID: 0, CPUs: "0-1", Memory: 4 * api.GiB, Hugepages: pages}, {ID: 10, CPUs: "2-3", Memory: 4 * api.GiB}}
	if !reflect.DeepEqual(f.NUMA, numa) {
		t.Errorf("numa %+v", f.NUMA)
	}
	group, node := 17, 1
	pci := []api.HostPCI{
		{Address: "0000:00:1f.0", Vendor: "8086", Device: "2918", Class: "0601"},
		{Address: "0000:01:00.0", Vendor: "10de", Device: "1eb8", Class: "0302", Driver: "vfio-pci", IOMMUGroup: &group, NUMANode: &node},
	}
	if !reflect.DeepEqual(f.PCI, pci) {
		t.Errorf("pci %+v", f.PCI)
	}
	if len(f.USB) != 1 || f.USB[0].ID != "046d:c52b" || f.USB[0].Port != "1-2" || len(f.USB[0].Name) != maxName {
		t.Errorf("usb %+v", f.USB)
	}
	if len(f.Missing) != 0 {
		t.Errorf("missing %v", f.Missing)
	}
	if again := Host(twoSockets(t)); !reflect.DeepEqual(again, f) {
		t.Error("the same host is told differently")
	}
}

func TestAHostThatSaysNothing(t *testing.T) {
	f := Host(t.TempDir())
	if f.CPU.Threads != 0 || f.Memory != 0 || f.PCI != nil || !strings.Contains(f.Missing[api.FeatureVFIO], "IOMMU") || !strings.Contains(f.Missing[api.FeatureVsock], "vhost_vsock") {
		t.Errorf("%+v", f)
	}
	odd := tree(t, map[string]string{
		"proc/meminfo": "MemTotal: -5 kB", "sys/kernel/mm/hugepages/hugepages-xkB/nr_hugepages": "many",
		"sys/bus/pci/devices/0000:00:00.0/vendor": "0x", "sys/devices/system/node/nodex/cpulist": "1",
	})
	if f := Host(odd); f.Memory != 0 || f.Hugepages != nil || f.NUMA != nil || len(f.PCI) != 1 {
		t.Errorf("%+v", f)
	}
}

func TestThisHostHasACPU(t *testing.T) {
	if f := Host("/"); f.CPU.Threads < 1 || f.Memory == 0 || len(f.CPU.Flags) == 0 {
		t.Errorf("%+v", f.CPU)
	}
}

// The QEMU here is asked what it can give a guest.
func TestRealQEMUTellsItsCPUs(t *testing.T) {
	bin, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Fatal("this test needs QEMU: install qemu-system-x86")
	}
	q, err := Ask(t.Context(), bin, t.TempDir(), api.AccelTCG)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(q.GuestFeatures, "sse2") || !slices.IsSorted(q.GuestFeatures) {
		t.Errorf("features %v", q.GuestFeatures)
	}
	f := api.NodeFactsStatus{Machines: q.Machines, CPUModels: q.CPUModels}
	for _, m := range []api.MachineType{api.MachineQ35, api.MachinePC, api.MachineMicroVM} {
		if !f.HasMachine(m) {
			t.Errorf("no machine %s in %v", m, q.Machines)
		}
	}
	if m, ok := f.Model("qemu64"); !ok || len(m.Missing) > 0 || m.Features < 10 {
		t.Errorf("qemu64: %+v", m)
	}
	if m, ok := f.Model("Icelake-Server"); !ok || len(m.Missing) == 0 || m.Features != 0 {
		t.Errorf("TCG cannot do all of Icelake-Server: %+v", m)
	}
	if _, err := Ask(t.Context(), "/bin/false", t.TempDir(), api.AccelTCG); err == nil {
		t.Error("a program that is no QEMU answered")
	}
}
