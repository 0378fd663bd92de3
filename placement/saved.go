// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package placement

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// Memory that was saved is loaded by a QEMU that makes the very machine again, or not at
// all. The VM is bound to a node that can, as far as nodes say; what cannot be known from
// facts QEMU itself refuses, and the VM stays suspended.

// savedMemory is the memory that a VM's next start goes on from.
type savedMemory struct {
	machine *api.SavedMachine
	// owner is the node that has the VM now, whose CPU the guest was told to have if
	// it has the host's.
	owner string
}

// savedOf returns nil for a VM that starts anew.
func savedOf(v *configdb.View, vm *api.VM) (*savedMemory, error) {
	st, err := configdb.SavedStates.Get(v, vm.Meta.ID)
	if err != nil || st.Spec.Discard || st.Spec.Machine == nil {
		return nil, api.IgnoreNotFound(err)
	}
	s := &savedMemory{machine: st.Spec.Machine}
	b, err := configdb.Bindings.Get(v, vm.Meta.ID)
	if err == nil {
		s.owner = b.Spec.NodeID
	}
	return s, api.IgnoreNotFound(err)
}

// savedLacking returns why a node cannot load the memory that a VM goes on from.
func (m *machine) savedLacking(h *host) (why []string) {
	if m.saved == nil {
		return nil
	}
	f := m.facts[h.node.Meta.ID]
	if f == nil {
		return []string{"has not told its facts yet"}
	}
	s := m.saved.machine
	if s.Accelerator != "" && f.Accelerator != "" && s.Accelerator != f.Accelerator {
		why = append(why, fmt.Sprintf("the saved memory is of a guest with %s, it has %s", s.Accelerator, f.Accelerator))
	}
	if s.Type != "" && len(f.Machines) > 0 && !slices.Contains(f.Machines, s.Type) {
		why = append(why, fmt.Sprintf("the saved memory is of the machine %s, which its QEMU does not have", s.Type))
	}
	if older(f.QEMUVersion, s.QEMUVersion) {
		why = append(why, fmt.Sprintf("the saved memory is of QEMU %s, it has the older %s", s.QEMUVersion, f.QEMUVersion))
	}
	if h.node.Meta.ID != m.saved.owner {
		why = append(why, m.savedCPULacking(f)...)
	}
	return why
}

// savedCPULacking compares the CPU that the guest has with what a node offers.
func (m *machine) savedCPULacking(f *api.NodeFactsStatus) []string {
	model, features, _ := strings.Cut(m.saved.machine.CPU, ",")
	switch model {
	case "", "max":
		return nil // not known, or all that an emulator has
	case "host":
		return m.otherHost(f)
	}
	var missing []string
	if c, ok := f.Model(model); ok {
		missing = slices.Clone(c.Missing)
	} else if len(f.CPUModels) > 0 {
		return []string{fmt.Sprintf("its QEMU does not know the CPU model %q of the saved memory", model)}
	}
	for _, o := range strings.Split(features, ",") {
		name, on := strings.CutPrefix(o, "+")
		if !on {
			name, on = strings.CutSuffix(o, "=on")
		}
		if on && name != "enforce" && name != "check" && len(f.GuestFeatures) > 0 && !slices.Contains(f.GuestFeatures, name) {
			missing = append(missing, name)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return []string{fmt.Sprintf("its CPU lacks %s, which the guest of the saved memory has", some(missing))}
}

// otherHost says what the CPU of a node lacks that the one has where the memory is.
func (m *machine) otherHost(f *api.NodeFactsStatus) []string {
	at := m.facts[m.saved.owner]
	if at == nil {
		return []string{"it is not known whether its CPU is like the one of the saved memory"}
	}
	if at.CPU.Vendor != f.CPU.Vendor {
		return []string{fmt.Sprintf("its CPU is of %s, that of the saved memory of %s", f.CPU.Vendor, at.CPU.Vendor)}
	}
	missing := f.FeaturesLacking(at.GuestFeatures)
	if len(missing) == 0 {
		return nil
	}
	return []string{fmt.Sprintf("its CPU lacks %s, which the guest of the saved memory has", some(missing))}
}

// older compares two versions of QEMU by their first two numbers; what is not known is
// not older.
func older(have, than string) bool {
	a, aok := release(have)
	b, bok := release(than)
	return aok && bok && slices.Compare(a, b) < 0
}

func release(version string) (numbers []int, ok bool) {
	parts := strings.SplitN(version, ".", 3)
	if len(parts) < 2 {
		return nil, false
	}
	for _, p := range parts[:2] {
		n, err := strconv.Atoi(p)
		if err != nil {
			return nil, false
		}
		numbers = append(numbers, n)
	}
	return numbers, true
}
