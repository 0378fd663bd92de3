// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package placement

import (
	"regexp"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
)

// Baseline is the CPU that every one of the nodes can give a guest: the richest
// of QEMU's models that runs on all, with every feature that all have. QEMU's own
// query-cpu-model-baseline is for other processors than x86, so it is made of
// what each node's QEMU said of itself. ok is false if no model runs on all.
func Baseline(nodes []api.NodeFacts) (b api.CPUBaselineSpec, ok bool) {
	models, features := map[string]int{}, map[string]int{}
	richness := map[string]int{}
	n := 0
	for i := range nodes {
		st := &nodes[i].Status
		if len(st.CPUModels) == 0 {
			continue // it has no QEMU, and runs no VM
		}
		n++
		b.Nodes = append(b.Nodes, st.Node)
		if v := st.CPU.Vendor; v != "" && !slices.Contains(b.Vendors, v) {
			b.Vendors = append(b.Vendors, v)
		}
		for _, m := range st.CPUModels {
			if len(m.Missing) == 0 && m.Features > 0 {
				models[m.Name]++
				richness[m.Name] = max(richness[m.Name], m.Features)
			}
		}
		for _, f := range st.GuestFeatures {
			features[f]++
		}
	}
	slices.Sort(b.Nodes)
	slices.Sort(b.Vendors)
	for name, have := range models {
		if have == n && (b.Model == "" || better(name, b.Model, richness)) {
			b.Model = name
		}
	}
	for f, have := range features {
		if have == n && movable(f) {
			b.Features = append(b.Features, f)
		}
	}
	slices.Sort(b.Features)
	return b, b.Model != ""
}

var versioned = regexp.MustCompile(`-v[0-9]+$`)

// better prefers a name with a version, whose meaning is the same in every QEMU,
// then the richer model, then the name that sorts last.
func better(name, than string, richness map[string]int) bool {
	if a, b := versioned.MatchString(name), versioned.MatchString(than); a != b {
		return a
	}
	if richness[name] != richness[than] {
		return richness[name] > richness[than]
	}
	return name > than
}

// movable leaves out what keeps a guest from being moved while it runs: a clock
// that must not change (invtsc), and virtualization inside the guest.
func movable(feature string) bool {
	switch feature {
	case "invtsc", "vmx", "svm", "npt", "nrip-save", "lbrv", "pause-filter", "pfthreshold", "flushbyasid", "decodeassists", "tsc-scale", "vmcb-clean", "avic", "v-vmsave-vmload", "vgif", "virt-ssbd", "svm-lock", "vnmi":
		return false
	}
	return !strings.HasPrefix(feature, "vmx-") && !strings.HasPrefix(feature, "svme-")
}
