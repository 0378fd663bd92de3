// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"slices"
	"strings"
)

// NodeFacts is what a node is made of, as far as VMs can use it; its ID is the
// node's. It is an object of its own so that the node's status, which many look
// at, stays small.
type NodeFacts = Object[NodeFactsSpec, NodeFactsStatus]

// NodeFactsSpec names the node.
type NodeFactsSpec struct {
	NodeID string `json:"nodeID"`
}

// HostFeature is something that a VM may need of its node.
type HostFeature string

// The features.
const (
	FeatureUEFI       HostFeature = "uefi"
	FeatureUEFISecure HostFeature = "uefi-secure"
	FeatureTPM        HostFeature = "tpm"
	FeatureVsock      HostFeature = "vsock"
	FeatureVFIO       HostFeature = "vfio"
	FeaturePostCopy   HostFeature = "postcopy"
)

// NodeFactsStatus is written by the hypervisor module of the node when it
// differs.
type NodeFactsStatus struct {
	// Node is the name of the node.
	Node string `json:"node"`
	// QEMUVersion, Accelerator and Machines say what QEMU offers here; Machines
	// are names such as pc-q35-7.2.
	QEMUVersion string      `json:"qemuVersion,omitempty"`
	Accelerator Accelerator `json:"accelerator,omitempty"`
	Machines    []string    `json:"machines,omitempty"`
	// CPU is the host's.
	CPU HostCPU `json:"cpu"`
	// GuestFeatures are the CPU features that a guest can have here, by QEMU's
	// names, in order (QAPI query-cpu-model-expansion).
	GuestFeatures []string `json:"guestFeatures,omitempty"`
	// CPUModels are QEMU's models (QAPI query-cpu-definitions).
	CPUModels []CPUModelFacts `json:"cpuModels,omitempty"`
	// Memory of the host, and its NUMA nodes.
	Memory Size       `json:"memory,omitempty"`
	NUMA   []HostNUMA `json:"numa,omitempty"`
	// Hugepages that the administrator has set aside.
	Hugepages []HostHugepages `json:"hugepages,omitempty"`
	// PCI and USB devices.
	PCI []HostPCI `json:"pci,omitempty"`
	USB []HostUSB `json:"usb,omitempty"`
	// Missing says of each feature that VMs cannot have here why, and what to
	// install.
	Missing map[HostFeature]string `json:"missing,omitempty"`
}

// HostCPU is a host's processor.
type HostCPU struct {
	// Vendor is such as GenuineIntel, Name the model's name.
	Vendor string `json:"vendor,omitempty"`
	Name   string `json:"name,omitempty"`
	// Sockets, Cores (of all sockets) and Threads (of all cores).
	Sockets int `json:"sockets,omitempty"`
	Cores   int `json:"cores,omitempty"`
	Threads int `json:"threads,omitempty"`
	// Flags as /proc/cpuinfo has them.
	Flags []string `json:"flags,omitempty"`
}

// CPUModelFacts is one of QEMU's CPU models.
type CPUModelFacts struct {
	Name string `json:"name"`
	// Missing features keep the model from running on this node.
	Missing []string `json:"missing,omitempty"`
	// Features is how many the model has; 0 if it does not run here.
	Features int `json:"features,omitempty"`
}

// HostNUMA is one NUMA node of a host.
type HostNUMA struct {
	ID int `json:"id"`
	// CPUs is a list such as 0-3,8.
	CPUs   string `json:"cpus"`
	Memory Size   `json:"memory"`
	// Hugepages set aside on this NUMA node.
	Hugepages []HostHugepages `json:"hugepages,omitempty"`
}

// HostHugepages are the pages of one size.
type HostHugepages struct {
	Size  Size `json:"size"`
	Total int  `json:"total"`
}

// HostPCI is a PCI device of a host.
type HostPCI struct {
	// Address is such as 0000:01:00.0.
	Address string `json:"address"`
	// Vendor, Device and Class are four hexadecimal digits each.
	Vendor string `json:"vendor"`
	Device string `json:"device"`
	Class  string `json:"class,omitempty"`
	// Driver that has the device, empty without one.
	Driver string `json:"driver,omitempty"`
	// IOMMUGroup is the group of devices that can only go to one VM together;
	// absent without an IOMMU.
	IOMMUGroup *int `json:"iommuGroup,omitempty"`
	// NUMANode is where the device is; absent if the host does not say.
	NUMANode *int `json:"numaNode,omitempty"`
}

// HostUSB is a USB device of a host.
type HostUSB struct {
	// ID is vendor and product, such as 046d:c52b; Port where it is plugged in.
	ID   string `json:"id"`
	Port string `json:"port"`
	// Name as the device says it.
	Name string `json:"name,omitempty"`
}

// Model returns what the node says of a CPU model.
func (f *NodeFactsStatus) Model(name string) (CPUModelFacts, bool) {
	i := slices.IndexFunc(f.CPUModels, func(m CPUModelFacts) bool { return m.Name == name })
	if i < 0 {
		return CPUModelFacts{}, false
	}
	return f.CPUModels[i], true
}

// FeaturesLacking are those of some CPU features that a guest cannot have here.
func (f *NodeFactsStatus) FeaturesLacking(wanted []string) (missing []string) {
	for _, w := range wanted {
		if !slices.Contains(f.GuestFeatures, w) {
			missing = append(missing, w)
		}
	}
	return missing
}

// HasMachine reports whether QEMU has a machine of a type here.
func (f *NodeFactsStatus) HasMachine(t MachineType) bool {
	prefix := map[MachineType]string{MachineQ35: "pc-q35-", MachinePC: "pc-i440fx-", MachineMicroVM: "microvm"}[t]
	return prefix != "" && slices.ContainsFunc(f.Machines, func(m string) bool { return strings.HasPrefix(m, prefix) })
}

// HugepagesOf is the memory in pages of a size, on one NUMA node of the host or,
// with nil, on all.
func (f *NodeFactsStatus) HugepagesOf(size Size, numa *int) Size {
	list := f.Hugepages
	if numa != nil {
		list = nil
		for _, n := range f.NUMA {
			if n.ID == *numa {
				list = n.Hugepages
			}
		}
	}
	var sum Size
	for _, h := range list {
		if h.Size == size {
			sum += size * Size(h.Total)
		}
	}
	return sum
}

// CPUBaseline is the CPU that every node can give a guest; its ID is the
// cluster's. The leader keeps it.
type CPUBaseline = Object[CPUBaselineSpec, struct{}]

// CPUBaselineSpec is the baseline. VMs with the CPU model cluster are started
// with it; those that run keep what they have. meta.generation counts its
// changes.
type CPUBaselineSpec struct {
	// Model is the richest of QEMU's models that every node can run, Features
	// all that every node can give a guest.
	Model    string   `json:"model"`
	Features []string `json:"features,omitempty"`
	// Nodes whose facts it was made of, by name, in order.
	Nodes []string `json:"nodes,omitempty"`
	// Vendors of their processors. Between two vendors a guest cannot be moved
	// while it runs, whatever the features.
	Vendors []string `json:"vendors,omitempty"`
}

// CPUBaselineStatus is the baseline as the cluster's status shows it.
type CPUBaselineStatus struct {
	// Generation counts the changes of the baseline.
	Generation uint64          `json:"generation"`
	Baseline   CPUBaselineSpec `json:"baseline"`
}

// QEMU is the baseline as the value of -cpu.
func (s *CPUBaselineSpec) QEMU() string {
	v := s.Model
	for _, f := range s.Features {
		v += ",+" + f
	}
	return v + ",enforce=on"
}

// SetDefaults implements Spec.
func (s *CPUBaselineSpec) SetDefaults() {}

// Validate implements Spec.
func (s *CPUBaselineSpec) Validate() error {
	if s.Model == "" {
		return Invalid("spec.model", "is missing")
	}
	return nil
}
