// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package placement

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
)

func (w *world) facts(n api.Node, change func(*api.NodeFactsStatus)) {
	w.tb.Helper()
	f := api.NodeFacts{Meta: api.NewMeta(api.KindNodeFacts, "", n.Meta.Name), Spec: api.NodeFactsSpec{NodeID: n.Meta.ID}}
	f.Meta.ID = n.Meta.ID
	group := 7
	f.Status = api.NodeFactsStatus{
		Node: n.Meta.Name, Machines: []string{"microvm", "pc-i440fx-7.2", "pc-q35-7.2"}, GuestFeatures: []string{"aes", "sse2"},
		CPUModels: []api.CPUModelFacts{{Name: "Haswell-v1", Missing: []string{"avx2", "pcid"}}, {Name: "Westmere-v1", Features: 40}},
		NUMA:      []api.HostNUMA{{ID: 0}}, Hugepages: []api.HostHugepages{{Size: 2 * api.MiB, Total: 512}},
		PCI: []api.HostPCI{
			{Address: "0000:01:00.0", Driver: "vfio-pci", IOMMUGroup: &group}, {Address: "0000:02:00.0", Driver: "nvme", IOMMUGroup: new(8)}, {Address: "0000:03:00.0"},
			{Address: "0000:04:00.0", Driver: "vfio-pci", IOMMUGroup: new(9)}, {Address: "0000:04:00.1", Driver: "snd", IOMMUGroup: new(9)},
		},
		USB:     []api.HostUSB{{ID: "046d:c52b", Port: "1-1"}},
		Missing: map[api.HostFeature]string{},
	}
	if change != nil {
		change(&f.Status)
	}
	w.do(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.NodeFacts.CreateUnnamed(tx, &f) })
}

func TestWhatAMachineAsksIsRefusedByName(t *testing.T) {
	w := &world{t, storetest.New(t)}
	m1 := w.node("m1", 16*api.GiB, nil)
	w.pool("local", api.PoolDir, m1)
	w.facts(m1, func(f *api.NodeFactsStatus) {
		f.Machines = []string{"pc-q35-7.2"}
		f.Missing[api.FeatureUEFISecure] = "this node has no UEFI firmware with Secure Boot; install the package ovmf"
		f.Missing[api.FeatureTPM] = "this node has no swtpm; install the package swtpm"
		f.Missing[api.FeatureVsock] = "load vhost_vsock"
	})
	other := newVM("other", api.GiB)
	other.Spec.HostDevices = []api.VMHostDevice{{USB: "046d:c52b"}}
	other.Spec.Hugepages, other.Spec.Memory = api.Hugepages2M, 512*api.MiB
	w.bound(other, m1)
	one := 1
	for want, change := range map[string]func(*api.VMSpec){
		"its QEMU has no machine microvm":                  func(s *api.VMSpec) { s.Machine = api.MachineMicroVM },
		"its CPU lacks avx2, pcid for the model Haswell":   func(s *api.VMSpec) { s.CPU = &api.VMCPU{Model: "Haswell-v1"} },
		"the cluster has no CPU baseline yet":              func(s *api.VMSpec) { s.CPU = &api.VMCPU{Model: api.CPUCluster} },
		"install the package ovmf":                         func(s *api.VMSpec) { s.Firmware = &api.VMFirmware{Type: api.FirmwareUEFI, SecureBoot: true} },
		"install the package swtpm":                        func(s *api.VMSpec) { s.TPM = &api.VMTPM{} },
		"vsock: load vhost_vsock":                          func(s *api.VMSpec) { s.Vsock = &api.VMVsock{} },
		"in hugepages of 2 MiB, has 512 MiB left of 1 GiB": func(s *api.VMSpec) { s.Hugepages = api.Hugepages2M },
		"in hugepages of 1 GiB, has 0 B left":              func(s *api.VMSpec) { s.Hugepages = api.Hugepages1G },
		"has no NUMA node 1":                               func(s *api.VMSpec) { s.NUMA = []api.VMNUMANode{{CPUs: "0", Memory: api.GiB, HostNode: &one}} },
		"has no PCI device 0000:09:00.0":                   func(s *api.VMSpec) { s.HostDevices = []api.VMHostDevice{{PCI: "0000:09:00.0"}} },
		`has the driver "nvme"; bind it to vfio-pci`:       func(s *api.VMSpec) { s.HostDevices = []api.VMHostDevice{{PCI: "0000:02:00.0"}} },
		"is in no IOMMU group":                             func(s *api.VMSpec) { s.HostDevices = []api.VMHostDevice{{PCI: "0000:03:00.0"}} },
		`with 0000:04:00.1, which has the driver "snd"`:    func(s *api.VMSpec) { s.HostDevices = []api.VMHostDevice{{PCI: "0000:04:00.0"}} },
		"has no USB device 1111:2222":                      func(s *api.VMSpec) { s.HostDevices = []api.VMHostDevice{{USB: "1111:2222"}} },
		"device usb 046d:c52b belongs to vm other":         func(s *api.VMSpec) { s.HostDevices = []api.VMHostDevice{{USB: "046d:c52b"}} },
		"its devices are those of m2":                      func(s *api.VMSpec) { s.HostDevices = []api.VMHostDevice{{Node: "m2", USB: "046d:c52b"}} },
	} {
		vm := newVM("web1", api.GiB)
		change(&vm.Spec)
		_, err := Choose(w.db.Local(), Request{VM: vm})
		if api.CodeOf(err) != api.CodeUnplaceable || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", want, err)
		}
	}
	fits := newVM("web1", 512*api.MiB)
	fits.Spec.Firmware, fits.Spec.Hugepages = &api.VMFirmware{Type: api.FirmwareUEFI}, api.Hugepages2M
	fits.Spec.CPU, fits.Spec.HostDevices = &api.VMCPU{Model: "Westmere-v1"}, []api.VMHostDevice{{PCI: "0000:01:00.0"}}
	if _, err := Choose(w.db.Local(), Request{VM: fits}); err != nil {
		t.Error(err)
	}
	unknown := newVM("web1", api.GiB)
	unknown.Spec.CPU = &api.VMCPU{Model: "Quantum-v1"}
	_, err := Choose(w.db.Local(), Request{VM: unknown})
	var e *api.Error
	if !errors.As(err, &e) || e.Code != api.CodeInvalid || e.Field != "spec.cpu.model" {
		t.Error(err)
	}
	_, err = Choose(w.db.Local(), Request{VM: newVM("web1", api.TiB)})
	if !errors.As(err, &e) || e.Code != api.CodeUnplaceable || e.Field != "spec.memory" {
		t.Error(err)
	}
}

func TestCheckRefusesWhatNoNodeCouldEverRun(t *testing.T) {
	w := &world{t, storetest.New(t)}
	m1 := w.node("m1", 4*api.GiB, nil)
	w.node("w", api.TiB, func(n *api.Node) { n.Spec.Role = api.RoleWitness })
	w.facts(m1, nil)
	w.bound(newVM("big", 3*api.GiB), m1)
	for memory, field := range map[api.Size]string{3 * api.GiB: "", 4 * api.GiB: "spec.memory"} {
		vm := newVM("web1", memory)
		var e *api.Error
		if errors.As(Check(w.db.Local(), &vm), &e); field != "" && (e == nil || e.Field != field || e.Code != api.CodeInvalid) || field == "" && e != nil {
			t.Errorf("%s: %v", memory, e)
		}
	}
}

func TestAPlainVMAsksForNoFacts(t *testing.T) {
	w := &world{t, storetest.New(t)}
	m1 := w.node("m1", 16*api.GiB, nil)
	w.pool("local", api.PoolDir, m1)
	if _, err := Choose(w.db.Local(), Request{VM: newVM("web1", api.GiB)}); err != nil {
		t.Error(err)
	}
	// A node that says nothing of itself may be of an earlier version, and would
	// leave out what it does not know.
	for what, change := range map[string]func(*api.VMSpec){
		"tpm":   func(s *api.VMSpec) { s.TPM = &api.VMTPM{} },
		"drive": func(s *api.VMSpec) { s.CDROMs = []api.VMCDROM{{}} },
		"disk":  func(s *api.VMSpec) { s.Disks = []api.VMDisk{{Size: api.GiB, Bus: api.BusSCSI}} },
	} {
		vm := newVM("web1", api.GiB)
		change(&vm.Spec)
		if _, err := Choose(w.db.Local(), Request{VM: vm}); err == nil || !strings.Contains(err.Error(), "has not told its facts yet") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestStateAndImagesPinTheVM(t *testing.T) {
	w := &world{t, storetest.New(t)}
	m1, m2 := w.node("m1", 16*api.GiB, nil), w.node("m2", 64*api.GiB, nil)
	w.pool("local", api.PoolDir, m1, m2)
	w.facts(m1, nil)
	w.facts(m2, nil)
	w.volume("web1-tpm", "local", "m1")
	w.image("iso", "local", "m1")
	tpm, iso := newVM("web1", api.GiB), newVM("web2", api.GiB)
	tpm.Spec.TPM = &api.VMTPM{Volume: "web1-tpm"}
	iso.Spec.CDROMs = []api.VMCDROM{{Image: "iso"}}
	for _, vm := range []api.VM{tpm, iso} {
		if d, err := Choose(w.db.Local(), Request{VM: vm}); err != nil || d.Node != "m1" {
			t.Errorf("%s: %+v, %v", vm.Meta.Name, d, err)
		}
	}
	iso.Spec.CDROMs[0].Image = "none"
	if _, err := Choose(w.db.Local(), Request{VM: iso}); api.CodeOf(err) != api.CodeNotFound {
		t.Error(err)
	}
}

func factsOf(name, vendor string, features []string, models ...api.CPUModelFacts) api.NodeFacts {
	return api.NodeFacts{Status: api.NodeFactsStatus{Node: name, CPU: api.HostCPU{Vendor: vendor}, GuestFeatures: features, CPUModels: models}}
}

func TestBaseline(t *testing.T) {
	haswell := api.CPUModelFacts{Name: "Haswell-v1", Features: 70}
	westmere := api.CPUModelFacts{Name: "Westmere-v1", Features: 50}
	newer := factsOf("m1", "GenuineIntel", []string{"aes", "avx2", "invtsc", "sse2", "vmx"}, haswell, westmere, api.CPUModelFacts{Name: "Haswell", Features: 99})
	older := factsOf("m2", "GenuineIntel", []string{"aes", "sse2", "vmx"}, api.CPUModelFacts{Name: "Haswell-v1", Missing: []string{"avx2"}}, westmere, api.CPUModelFacts{Name: "Haswell", Features: 99})
	b, ok := Baseline([]api.NodeFacts{newer})
	if !ok || b.QEMU() != "Haswell-v1,+aes,+avx2,+sse2,enforce=on" {
		t.Errorf("one node: %s", b.QEMU())
	}
	b, ok = Baseline([]api.NodeFacts{older, newer, factsOf("witness", "", nil)})
	if !ok || b.QEMU() != "Westmere-v1,+aes,+sse2,enforce=on" || !slices.Equal(b.Nodes, []string{"m1", "m2"}) || len(b.Vendors) != 1 {
		t.Errorf("%s of %v", b.QEMU(), b.Nodes)
	}
	if _, ok := Baseline(nil); ok {
		t.Error("a baseline of nobody")
	}
	if b, ok := Baseline([]api.NodeFacts{newer, factsOf("m3", "AuthenticAMD", nil, westmere)}); !ok || len(b.Features) != 0 || len(b.Vendors) != 2 {
		t.Errorf("%+v", b)
	}
}

// Whatever the nodes have, each of them can run the baseline, and one more node
// never makes it larger.
func TestEveryNodeRunsTheBaseline(t *testing.T) {
	names := []string{"aes", "avx", "avx2", "bmi1", "pcid", "sse2", "ssse3"}
	rapid.Check(t, func(t *rapid.T) {
		var nodes []api.NodeFacts
		for i := range rapid.IntRange(1, 6).Draw(t, "nodes") {
			f := factsOf(string(rune('a'+i)), "v", rapid.SliceOfDistinct(rapid.SampledFrom(names), rapid.ID[string]).Draw(t, "features"), api.CPUModelFacts{Name: "qemu64-v1", Features: 1})
			for j, m := range []string{"A-v1", "B-v1", "C-v2"} {
				c := api.CPUModelFacts{Name: m, Features: 10 * (j + 1)}
				if rapid.Bool().Draw(t, "lacks") {
					c.Features, c.Missing = 0, []string{"x"}
				}
				f.Status.CPUModels = append(f.Status.CPUModels, c)
			}
			nodes = append(nodes, f)
		}
		b, ok := Baseline(nodes)
		if !ok {
			t.Fatal("no baseline, though all have qemu64-v1")
		}
		for i := range nodes {
			m, ok := nodes[i].Status.Model(b.Model)
			if !ok || len(m.Missing) > 0 {
				t.Fatalf("node %s cannot run %s", nodes[i].Status.Node, b.Model)
			}
			for _, f := range b.Features {
				if !slices.Contains(nodes[i].Status.GuestFeatures, f) {
					t.Fatalf("node %s lacks %s", nodes[i].Status.Node, f)
				}
			}
		}
		fewer, _ := Baseline(nodes[:max(len(nodes)-1, 1)])
		for _, f := range b.Features {
			if !slices.Contains(fewer.Features, f) {
				t.Fatalf("one more node brought %s", f)
			}
		}
		slices.Reverse(nodes)
		if again, _ := Baseline(nodes); again.QEMU() != b.QEMU() {
			t.Fatalf("the order of the nodes decides: %s, %s", b.QEMU(), again.QEMU())
		}
	})
}

// What a VM runs with is its own until it stops, whatever its spec says of the next
// start; and what the spec says is, too.
func TestWhatARunningMachineHasStaysReserved(t *testing.T) {
	w := &world{t, storetest.New(t)}
	m1 := w.node("m1", 16*api.GiB, nil)
	w.pool("local", api.PoolDir, m1)
	w.facts(m1, func(f *api.NodeFactsStatus) { f.USB = append(f.USB, api.HostUSB{ID: "1111:2222", Port: "1-2"}) })
	other := newVM("other", api.GiB)
	other.Spec.HostDevices = []api.VMHostDevice{{USB: "1111:2222"}}
	other.Status.Hardware = other.Spec.Hardware()
	other.Status.Hardware.HostDevices = []api.VMHostDevice{{USB: "046d:c52b"}}
	other.Status.Hardware.Hugepages, other.Status.Hardware.Memory = api.Hugepages2M, 768*api.MiB
	w.bound(other, m1)
	for want, change := range map[string]func(*api.VMSpec){
		"device usb 046d:c52b belongs to vm other":         func(s *api.VMSpec) { s.HostDevices = []api.VMHostDevice{{USB: "046d:c52b"}} },
		"device usb 1111:2222 belongs to vm other":         func(s *api.VMSpec) { s.HostDevices = []api.VMHostDevice{{USB: "1111:2222"}} },
		"in hugepages of 2 MiB, has 256 MiB left of 1 GiB": func(s *api.VMSpec) { s.Hugepages = api.Hugepages2M },
	} {
		vm := newVM("web1", api.GiB)
		change(&vm.Spec)
		if _, err := Choose(w.db.Local(), Request{VM: vm}); api.CodeOf(err) != api.CodeUnplaceable || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", want, err)
		}
	}
}
