// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Limits of NUMA.
const (
	// MaxNUMANodes bounds the NUMA nodes of a guest, MaxHostNUMANode the number
	// of a node of the host (QEMU's MAX_NODES).
	MaxNUMANodes    = 16
	MaxHostNUMANode = 127
)

// Hugepages is the size of the pages of the host that back the guest's memory.
type Hugepages string

// The sizes.
const (
	HugepagesOff Hugepages = "off"
	Hugepages2M  Hugepages = "2M"
	Hugepages1G  Hugepages = "1G"
)

// Size in bytes, 0 without hugepages.
func (h Hugepages) Size() Size {
	switch h {
	case Hugepages2M:
		return 2 * MiB
	case Hugepages1G:
		return GiB
	}
	return 0
}

// VMNUMANode is one NUMA node of the guest.
type VMNUMANode struct {
	// CPUs is a list of virtual CPUs, such as 0-3,8; each is in one node.
	CPUs string `json:"cpus"`
	// Memory of the node; all together have the VM's.
	Memory Size `json:"memory"`
	// HostNode is the NUMA node of the host that the memory is taken from; any
	// when left out.
	HostNode *int `json:"hostNode,omitempty" minimum:"0" maximum:"127"`
}

// ParseCPUList reads a list such as 0-3,8: ranges in ascending order, of CPUs
// below limit.
func ParseCPUList(field, list string, limit int) ([][2]int, error) {
	var out [][2]int
	next := 0
	for part := range strings.SplitSeq(list, ",") {
		from, to, isRange := strings.Cut(part, "-")
		a, err := strconv.ParseUint(from, 10, 16)
		b := a
		if isRange && err == nil {
			b, err = strconv.ParseUint(to, 10, 16)
		}
		if err != nil || b < a {
			return nil, Invalid(field, "%q is not a list of CPUs such as 0-3,8", clip(list))
		}
		if int(b) >= limit {
			return nil, Invalid(field, "names CPU %d, but the VM has the CPUs 0-%d", b, limit-1)
		}
		if int(a) < next {
			return nil, Invalid(field, "%q is not in ascending order, or names a CPU twice", clip(list))
		}
		next = int(b) + 1
		out = append(out, [2]int{int(a), int(b)})
	}
	return out, nil
}

func (s *VMSpec) validateNUMA() error {
	if err := oneOf("spec.hugepages", s.Hugepages, HugepagesOff, Hugepages2M, Hugepages1G); err != nil {
		return err
	}
	page := s.Hugepages.Size()
	if page > 0 && s.Memory%page != 0 {
		return Invalid("spec.memory", "is %s, which is no multiple of the %s pages of spec.hugepages", s.Memory, page)
	}
	if len(s.NUMA) == 0 {
		return nil
	}
	switch {
	case len(s.NUMA) > MaxNUMANodes:
		return Invalid("spec.numa", "has %d nodes; at most %d are allowed", len(s.NUMA), MaxNUMANodes)
	case s.machine() == MachineMicroVM:
		return Invalid("spec.numa", "has a meaning for the machines q35 and pc only")
	}
	var memory Size
	in := make([]int, s.CPUs) // number of the node, from 1
	for i, n := range s.NUMA {
		field := fmt.Sprintf("spec.numa[%d]", i)
		ranges, err := ParseCPUList(field+".cpus", n.CPUs, s.CPUs)
		if err != nil {
			return err
		}
		for _, r := range ranges {
			for cpu := r[0]; cpu <= r[1]; cpu++ {
				if in[cpu] != 0 {
					return Invalid(field+".cpus", "names CPU %d, which is in spec.numa[%d] already", cpu, in[cpu]-1)
				}
				in[cpu] = i + 1
			}
		}
		unit := max(page, MiB)
		if n.Memory < unit || n.Memory > MaxMemory || n.Memory%unit != 0 {
			return Invalid(field+".memory", "is %s; give a multiple of %s", n.Memory, unit)
		}
		memory += n.Memory
		if n.HostNode != nil && (*n.HostNode < 0 || *n.HostNode > MaxHostNUMANode) {
			return Invalid(field+".hostNode", "is %d; give 0 to %d", *n.HostNode, MaxHostNUMANode)
		}
	}
	if cpu := slices.Index(in, 0); cpu >= 0 {
		return Invalid("spec.numa", "has no node for CPU %d; each CPU is in one", cpu)
	}
	if memory != s.Memory {
		return Invalid("spec.numa", "has nodes with %s together, but spec.memory is %s", memory, s.Memory)
	}
	return nil
}
