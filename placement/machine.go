// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package placement

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// machineNeeds turns what the machine keeps and reads beside its disks into
// demands: the volumes of its state, and the images in its drives. A volume that
// is made with the VM is not there yet; its pool is among the new disks.
func (f *fleet) machineNeeds(v *configdb.View, vm *api.VM) ([]need, error) {
	var out []need
	for _, name := range vm.Spec.StateVolumes() {
		vol, err := configdb.Volumes.Find(v, vm.Meta.Project, name)
		if api.CodeOf(err) == api.CodeNotFound && err != nil {
			continue
		}
		if err != nil {
			return nil, err
		}
		n, err := f.volumeNeed(vol, "spec")
		if err != nil {
			return nil, err
		}
		out = append(out, n)
	}
	images := vm.Spec.MachineImages()
	for _, field := range slices.Sorted(maps.Keys(images)) {
		n, err := f.imageNeed(v, vm, *images[field], field)
		if err != nil {
			return nil, err
		}
		out = append(out, n)
	}
	return out, nil
}

// imageNeed is what an image in a drive asks of a node.
func (f *fleet) imageNeed(v *configdb.View, vm *api.VM, name, field string) (need, error) {
	img, err := configdb.Images.Find(v, vm.Meta.Project, name)
	if err != nil {
		return need{}, err
	}
	if img.Meta.Deleting() {
		return need{}, &api.Error{Code: api.CodeRefused, Field: field, Detail: fmt.Sprintf("image %q is being deleted", img.Meta.Name)}
	}
	pool, err := f.pool(img.Spec.Pool, field)
	n := need{pool: pool, what: fmt.Sprintf("image %q", img.Meta.Name)}
	if pool.Spec.Type == api.PoolDir {
		n.pin = img.Spec.Node
	}
	return n, err
}

// machine is what a VM's machine asks of the node itself.
type machine struct {
	vm       *api.VM
	asks     bool // anything that a node of an earlier version does not know
	facts    map[string]*api.NodeFactsStatus
	baseline *api.CPUBaselineSpec
	saved    *savedMemory // nil: the VM starts anew
}

// machine reads what is needed to judge nodes; it reads no facts for a VM that
// asks nothing.
func (f *fleet) machine(v *configdb.View, vm *api.VM) (*machine, error) {
	s := &vm.Spec
	m := &machine{vm: vm, facts: map[string]*api.NodeFactsStatus{}}
	m.asks = s.AsksForMachine()
	var err error
	if m.saved, err = savedOf(v, vm); err != nil {
		return nil, err
	}
	if !m.asks && m.saved == nil {
		return m, nil
	}
	all, err := configdb.NodeFacts.List(v)
	if err != nil {
		return nil, err
	}
	for i := range all {
		m.facts[all[i].Spec.NodeID] = &all[i].Status
	}
	if s.CPUModel() == api.CPUCluster {
		b, err := configdb.CPUBaselines.List(v)
		if err != nil {
			return nil, err
		}
		if len(b) > 0 {
			m.baseline = &b[0].Spec
		}
	}
	if !m.asks {
		return m, nil
	}
	return m, m.known()
}

// Check fails if no node could ever run the VM, whatever else runs there.
func Check(v *configdb.View, vm *api.VM) error {
	f, err := load(v, vm.Meta.ID)
	if err != nil {
		return fmt.Errorf("check vm %q: %w", vm.Meta.Name, err)
	}
	if len(f.hosts) > 0 && f.tooSmall(vm.Spec.Memory) {
		return api.Invalid("spec.memory", "is %s, more than any node has for VMs; the largest gives %s", vm.Spec.Memory, f.largest())
	}
	_, err = f.machine(v, vm)
	return err
}

// largest is the most memory that a VM could have.
func (f *fleet) largest() (most api.Size) {
	for _, h := range f.hosts {
		if h.node.Spec.Role != api.RoleWitness {
			most = max(most, h.node.Status.Memory-h.node.Spec.ReservedMemory-OverheadPerVM)
		}
	}
	return most
}

// known refuses a CPU model that no node's QEMU has ever heard of.
func (m *machine) known() error {
	model := m.vm.Spec.CPUModel()
	if model == api.CPUHost || model == api.CPUCluster || len(m.facts) == 0 {
		return nil
	}
	for _, f := range m.facts {
		if _, ok := f.Model(model); ok {
			return nil
		}
	}
	return api.Invalid("spec.cpu.model", "no node's QEMU knows the CPU model %q; muster node facts NODE lists those that it knows", model)
}

// lacking returns what the node has not that the machine needs.
func (m *machine) lacking(h *host) (why []string) {
	if !m.asks {
		return nil
	}
	f := m.facts[h.node.Meta.ID]
	if f == nil {
		return []string{"has not told its facts yet"}
	}
	s := &m.vm.Spec
	if t := s.MachineType(); !f.HasMachine(t) {
		why = append(why, fmt.Sprintf("its QEMU has no machine %s", t))
	}
	why = append(why, m.cpuLacking(f)...)
	for _, need := range []struct {
		asked   bool
		feature api.HostFeature
		what    string
	}{
		{s.UEFI() && !s.SecureBoot(), api.FeatureUEFI, "UEFI"}, {s.SecureBoot(), api.FeatureUEFISecure, "Secure Boot"},
		{s.TPM != nil, api.FeatureTPM, "TPM"}, {s.Vsock != nil, api.FeatureVsock, "vsock"},
	} {
		if reason, missing := f.Missing[need.feature]; need.asked && missing {
			why = append(why, need.what+": "+reason)
		}
	}
	why = append(why, m.pagesLacking(h, f)...)
	return append(why, m.devicesLacking(h, f)...)
}

// most is how many features a reason names.
const most = 5

func some(list []string) string {
	if len(list) > most {
		return strings.Join(list[:most], ", ") + fmt.Sprintf(" and %d more", len(list)-most)
	}
	return strings.Join(list, ", ")
}

func (m *machine) cpuLacking(f *api.NodeFactsStatus) []string {
	model := m.vm.Spec.CPUModel()
	var wanted []string
	switch model {
	case api.CPUHost:
		return nil
	case api.CPUCluster:
		if m.baseline == nil {
			return []string{"the cluster has no CPU baseline yet"}
		}
		model, wanted = m.baseline.Model, m.baseline.Features
	}
	c, ok := f.Model(model)
	if !ok {
		return []string{fmt.Sprintf("its QEMU does not know the CPU model %q", model)}
	}
	missing := append(slices.Clone(c.Missing), f.FeaturesLacking(wanted)...)
	if len(missing) == 0 {
		return nil
	}
	return []string{fmt.Sprintf("its CPU lacks %s for the model %s", some(missing), m.vm.Spec.CPUModel())}
}

// pagesLacking compares hugepages and NUMA nodes with what the VMs on the node
// take.
func (m *machine) pagesLacking(h *host, f *api.NodeFactsStatus) (why []string) {
	s := &m.vm.Spec
	for _, n := range s.NUMA {
		if n.HostNode == nil {
			continue
		}
		if !slices.ContainsFunc(f.NUMA, func(hn api.HostNUMA) bool { return hn.ID == *n.HostNode }) {
			why = append(why, fmt.Sprintf("has no NUMA node %d", *n.HostNode))
		}
	}
	page := s.Hugepages.Size()
	if page == 0 || len(why) > 0 {
		return why
	}
	used := api.Size(0)
	for i := range h.bound {
		var most api.Size
		for _, o := range machinesOf(h.bound[i]) {
			if o.Hugepages.Size() == page {
				most = max(most, o.Memory)
			}
		}
		used += most
	}
	if have := f.HugepagesOf(page, nil); s.Memory > have-used {
		why = append(why, fmt.Sprintf("needs %s in hugepages of %s, has %s left of %s", s.Memory, page, max(have-used, 0), have))
	}
	return why
}

// devicesLacking looks for the VM's host devices: they are there, can be given
// away, and no other VM has them.
func (m *machine) devicesLacking(h *host, f *api.NodeFactsStatus) (why []string) {
	s, name := &m.vm.Spec, h.node.Meta.Name
	devices, ok := s.HostDevicesOn(name)
	if !ok {
		return []string{"its devices are those of " + s.HostDeviceNodes()}
	}
	for _, d := range devices {
		if reason := present(f, &d); reason != "" {
			why = append(why, reason)
			continue
		}
		for i := range h.bound {
			if slices.ContainsFunc(machinesOf(h.bound[i]), func(o *api.VMSpec) bool { return hasDevice(o, name, &d) }) {
				why = append(why, fmt.Sprintf("device %s belongs to vm %s", d.Key(), h.bound[i].Meta.Name))
			}
		}
	}
	return why
}

// machinesOf are the machine that a VM is to have and the one that it has until it
// is stopped.
func machinesOf(vm *api.VM) []*api.VMSpec {
	if vm.Status.Hardware == nil {
		return []*api.VMSpec{&vm.Spec}
	}
	return []*api.VMSpec{&vm.Spec, vm.Status.Hardware}
}

func hasDevice(s *api.VMSpec, node string, d *api.VMHostDevice) bool {
	devices, _ := s.HostDevicesOn(node)
	return slices.ContainsFunc(devices, func(o api.VMHostDevice) bool { return o.Key() == d.Key() })
}

// vfioDriver is what a PCI device must be bound to before a guest can have it.
const vfioDriver = "vfio-pci"

// present returns why a node cannot give a device away.
func present(f *api.NodeFactsStatus, d *api.VMHostDevice) string {
	if d.USB != "" {
		if slices.ContainsFunc(f.USB, func(u api.HostUSB) bool { return u.ID == d.USB }) {
			return ""
		}
		return "has no USB device " + d.USB
	}
	i := slices.IndexFunc(f.PCI, func(p api.HostPCI) bool { return p.Address == d.PCI })
	switch {
	case i < 0:
		return "has no PCI device " + d.PCI
	case f.PCI[i].IOMMUGroup == nil:
		return fmt.Sprintf("PCI device %s is in no IOMMU group (%s)", d.PCI, f.Missing[api.FeatureVFIO])
	case f.PCI[i].Driver != vfioDriver:
		return fmt.Sprintf("PCI device %s has the driver %q; bind it to %s", d.PCI, f.PCI[i].Driver, vfioDriver)
	}
	for _, o := range f.PCI {
		if o.IOMMUGroup != nil && *o.IOMMUGroup == *f.PCI[i].IOMMUGroup && o.Driver != "" && o.Driver != vfioDriver && o.Driver != "pcieport" {
			return fmt.Sprintf("PCI device %s is in IOMMU group %d with %s, which has the driver %q; bind that to %s, too", d.PCI, *o.IOMMUGroup, o.Address, o.Driver, vfioDriver)
		}
	}
	return ""
}
