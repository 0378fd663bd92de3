// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"slices"
	"strconv"
	"strings"
)

// Limits of limits.
const (
	// MaxWeight is the highest weight; DefaultWeight what a VM without one has.
	MaxWeight     = 10000
	DefaultWeight = 100
	// MaxCPUPercent: all of 512 CPUs.
	MaxCPUPercent = 100 * 512
	// MinMemoryMargin is what QEMU needs at least besides the guest's memory.
	MinMemoryMargin = 128 * MiB
	// maxCPUNumber bounds the numbers of host CPUs, maxCPUList a list of them.
	maxCPUNumber = 8191
	maxCPUList   = 1024
)

// VMLimits are what a VM may take of its host, by control groups. They may be
// changed while the VM runs. 0 and empty mean no limit, or the usual weight.
type VMLimits struct {
	// CPUWeight is the VM's share where CPUs are scarce, 1-10000 against the
	// other VMs; 100 when 0.
	CPUWeight int `json:"cpuWeight,omitempty" minimum:"0" maximum:"10000"`
	// CPUMax is the most CPU time in percent of one CPU: 150 is one and a half.
	CPUMax int `json:"cpuMax,omitempty" minimum:"0" maximum:"51200"`
	// CPUSet are the host's CPUs that the VM may run on, such as 0-3,8.
	CPUSet string `json:"cpuSet,omitempty" maxLength:"1024"`
	// MemoryMax is the most memory of QEMU with its guest and the page cache of
	// its disks; what goes beyond is reclaimed, and if that is not enough, the VM
	// is killed by the kernel and started again. At least spec.memory and 128 MiB.
	MemoryMax Size `json:"memoryMax,omitempty"`
	// IOWeight is the VM's share where disks are busy, 1-10000; 100 when 0. Limits
	// of single disks are theirs.
	IOWeight int `json:"ioWeight,omitempty" minimum:"0" maximum:"10000"`
}

// validate checks the limits of a VM with this much memory.
func (l *VMLimits) validate(memory Size) error {
	if l == nil {
		return nil
	}
	for _, w := range []struct {
		name  string
		value int
	}{{"cpuWeight", l.CPUWeight}, {"ioWeight", l.IOWeight}} {
		if w.value < 0 || w.value > MaxWeight {
			return Invalid("spec.limits."+w.name, "is %d; give 1 to %d, or 0 for the usual %d", w.value, MaxWeight, DefaultWeight)
		}
	}
	if l.CPUMax < 0 || l.CPUMax > MaxCPUPercent {
		return Invalid("spec.limits.cpuMax", "is %d; give percent of one CPU, 1 to %d, or 0 for no limit", l.CPUMax, MaxCPUPercent)
	}
	if l.MemoryMax != 0 && l.MemoryMax < memory+MinMemoryMargin {
		return Invalid("spec.limits.memoryMax", "is %s; QEMU needs %s besides the guest's memory, so give at least %s, or 0 for no limit", l.MemoryMax, MinMemoryMargin, memory+MinMemoryMargin)
	}
	if _, err := CPUList(l.CPUSet); err != nil {
		return err
	}
	return nil
}

// CPUList reads a list of host CPUs such as 0-3,8 (cpuset(7), "List format") and
// returns their numbers in order.
func CPUList(text string) ([]int, error) {
	if text == "" {
		return nil, nil
	}
	bad := Invalid("spec.limits.cpuSet", "is %q; give numbers of the host's CPUs such as 0-3,8", clip(text))
	if len(text) > maxCPUList {
		return nil, bad
	}
	seen := map[int]bool{}
	for part := range strings.SplitSeq(text, ",") {
		a, b, isRange := strings.Cut(part, "-")
		if !isRange {
			b = a
		}
		first, ok1 := cpuNumber(a)
		last, ok2 := cpuNumber(b)
		if !ok1 || !ok2 || last < first {
			return nil, bad
		}
		for n := first; n <= last; n++ {
			seen[n] = true
		}
	}
	out := make([]int, 0, len(seen))
	for n := range seen {
		out = append(out, n)
	}
	slices.Sort(out)
	return out, nil
}

func cpuNumber(s string) (int, bool) {
	n, err := strconv.Atoi(s)
	return n, err == nil && n >= 0 && n <= maxCPUNumber && strconv.Itoa(n) == s
}
