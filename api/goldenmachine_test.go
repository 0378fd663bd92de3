// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

// goldenMachine sets every field of a VM's machine.
func goldenMachine(s VMSpec) VMSpec {
	one := 1
	d := &s.Disks[0]
	d.Bus, d.Cache, d.AIO, d.IOThread, d.Discard, d.Queues = BusSCSI, CacheNone, AIOURing, true, DiscardIgnore, 4
	s.Machine, s.Hugepages = MachineQ35, Hugepages2M
	s.CPU = &VMCPU{Model: "Haswell", Sockets: 1, Cores: 1, Threads: 2}
	s.Firmware, s.TPM = &VMFirmware{Type: FirmwareUEFI, SecureBoot: true, Volume: "web1-uefi"}, &VMTPM{Volume: "web1-tpm"}
	s.Kernel = &VMKernel{Image: "linux", Initrd: "initrd", Cmdline: "quiet"}
	s.NUMA = []VMNUMANode{{CPUs: "0-1", Memory: GiB, HostNode: &one}}
	s.Watchdog, s.Vsock = &VMWatchdog{Action: WatchdogPause}, &VMVsock{CID: 42}
	s.CDROMs = []VMCDROM{{Image: "debian", Bus: BusSATA, Force: true}}
	s.BootOrder = []string{"cdrom0", "disk0"}
	s.HostDevices = []VMHostDevice{{Node: "n1", PCI: "0000:01:00.0", USB: "1234:5678"}}
	s.ExtraArgs = []string{"-device", "edu"}
	return s
}

func goldenFacts() NodeFacts {
	one := 1
	pages := []HostHugepages{{Size: 2 * MiB, Total: 512}}
	return NodeFacts{
		Meta: goldenMeta(KindNodeFacts), Spec: NodeFactsSpec{NodeID: "n"},
		Status: NodeFactsStatus{
			Node: "n1", QEMUVersion: "7.2.22", Accelerator: AccelKVM, Machines: []string{"pc-q35-7.2"},
			CPU:           HostCPU{Vendor: "GenuineIntel", Name: "Xeon", Sockets: 1, Cores: 2, Threads: 4, Flags: []string{"aes"}},
			GuestFeatures: []string{"aes"},
			CPUModels:     []CPUModelFacts{{Name: "Haswell", Missing: []string{"avx2"}, Features: 1}},
			Memory:        GiB, NUMA: []HostNUMA{{ID: 1, CPUs: "0-3", Memory: GiB, Hugepages: pages}}, Hugepages: pages,
			PCI:     []HostPCI{{Address: "0000:01:00.0", Vendor: "8086", Device: "1572", Class: "0200", Driver: "vfio-pci", IOMMUGroup: &one, NUMANode: &one}},
			USB:     []HostUSB{{ID: "1234:5678", Port: "1-2", Name: "key"}},
			Missing: map[HostFeature]string{FeatureTPM: "install the package swtpm"},
		},
	}
}

func goldenBaseline() CPUBaseline {
	return CPUBaseline{Meta: goldenMeta(KindCPUBaseline), Spec: CPUBaselineSpec{Model: "Haswell", Features: []string{"aes"}, Nodes: []string{"n1"}, Vendors: []string{"GenuineIntel"}}}
}
