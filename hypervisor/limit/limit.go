// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package limit

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/muster-vm/muster/api"
)

const (
	// period of the CPU bandwidth controller in microseconds, the kernel's default.
	period = 100_000
	// parent of all groups of cgroup v1.
	parent = "muster"
	// minShares and maxShares bound cpu.shares of cgroup v1, where 1024 is usual.
	minShares, maxShares, usualShares = 2, 262144, 1024
	// maxBlkioWeight and maxBFQWeight bound the weights of block devices.
	minBlkioWeight, maxBlkioWeight = 10, 1000
	noLimit                        = -1
)

// Host is where the control groups of a host are.
type Host struct {
	// Root1 is the directory that the hierarchies of cgroup v1 are mounted in,
	// Root2 the mount of cgroup v2; empty without.
	Root1, Root2 string
	// Proc is /proc.
	Proc string
}

// Find looks for the control groups of this host, in the text of
// /proc/self/mountinfo.
func Find(mountinfo string) Host {
	h := Host{Proc: "/proc"}
	for line := range strings.Lines(mountinfo) {
		before, after, ok := strings.Cut(line, " - ")
		f := strings.Fields(before)
		if !ok || len(f) < 5 {
			continue
		}
		switch kind, _, _ := strings.Cut(after, " "); {
		case kind == "cgroup2" && h.Root2 == "":
			h.Root2 = f[4]
		case kind == "cgroup" && h.Root1 == "":
			h.Root1 = filepath.Dir(f[4])
		}
	}
	return h
}

// Missing is a limit that is not in force.
type Missing struct{ Limit, Reason string }

// one is a limit with its controller, as both versions know it.
type one struct {
	name, controller string
	// set: somebody wants it. What nobody wants is set back to the usual where it
	// was set, and is never missing.
	set bool
	// file2 and file1 are what must exist for it.
	file2, file1 string
	v2           cgroup2.Resources
	v1           specs.LinuxResources
	// raw2 is written as it is, for what the library does not know.
	raw2 string
}

// limits translates the wish.
func limits(l api.VMLimits, allCPUs string) []one {
	weight := uint64(or(l.CPUWeight, api.DefaultWeight))
	quota := int64(noLimit)
	if l.CPUMax > 0 {
		quota = int64(l.CPUMax) * period / 100
	}
	p := uint64(period)
	shares := min(max(weight*usualShares/api.DefaultWeight, minShares), maxShares)
	memory := int64(noLimit)
	if l.MemoryMax > 0 {
		memory = int64(l.MemoryMax)
	}
	max2 := cgroup2.CPUMax("max " + strconv.Itoa(period))
	if l.CPUMax > 0 {
		max2 = cgroup2.NewCPUMax(&quota, &p)
	}
	ioWeight := or(l.IOWeight, api.DefaultWeight)
	blkio := uint16(min(max(ioWeight, minBlkioWeight), maxBlkioWeight))
	set := or(l.CPUSet, allCPUs)
	memory2 := "max"
	if memory > 0 {
		memory2 = strconv.FormatInt(memory, 10)
	}
	return []one{
		{
			name: "cpuWeight", controller: "cpu", set: l.CPUWeight > 0, file2: "cpu.weight", file1: "cpu.shares",
			v2: cgroup2.Resources{CPU: &cgroup2.CPU{Weight: &weight}}, v1: specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: &shares}},
		}, {
			name: "cpuMax", controller: "cpu", set: l.CPUMax > 0, file2: "cpu.max", file1: "cpu.cfs_quota_us",
			v2: cgroup2.Resources{CPU: &cgroup2.CPU{Max: max2}}, v1: specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: &quota, Period: &p}},
		}, {
			name: "cpuSet", controller: "cpuset", set: l.CPUSet != "", file2: "cpuset.cpus", file1: "cpuset.cpus",
			v2: cgroup2.Resources{CPU: &cgroup2.CPU{Cpus: set}}, v1: specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: set}},
		}, {
			name: "memoryMax", controller: "memory", set: l.MemoryMax > 0, file2: "memory.max", file1: "memory.limit_in_bytes",
			raw2: memory2, v1: specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &memory}},
		}, {
			name: "ioWeight", controller: "io", set: l.IOWeight > 0, file2: "io.weight", file1: "blkio.weight",
			raw2: "default " + strconv.Itoa(ioWeight), v1: specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{Weight: &blkio}},
		},
	}
}

func or[T comparable](v, usual T) T {
	var zero T
	if v == zero {
		return usual
	}
	return v
}

// Apply puts the limits of a VM into force for its process.
func (h Host) Apply(vm string, pid int, l api.VMLimits) (missing []Missing, err error) {
	group2, err := h.group2(pid)
	if err != nil {
		return nil, fmt.Errorf("limits of vm %s: %w", vm, err)
	}
	has2 := h.controllers2()
	all := limits(l, h.allCPUs())
	for i := range all {
		if why := h.apply(vm, pid, &all[i], group2, has2); why != nil && all[i].set {
			missing = append(missing, Missing{Limit: all[i].name, Reason: why.Error()})
		}
	}
	return missing, nil
}

// apply returns why a limit is not in force, or nil.
func (h Host) apply(vm string, pid int, o *one, group2 string, has2 []string) error {
	if group2 != "" && slices.Contains(has2, o.controller) {
		return h.apply2(o, group2)
	}
	return h.apply1(vm, pid, o)
}

// group2 is the VM's group in cgroup v2, or empty if it has none of its own.
func (h Host) group2(pid int) (string, error) {
	b, err := os.ReadFile(filepath.Join(h.Proc, strconv.Itoa(pid), "cgroup"))
	if err != nil {
		return "", fmt.Errorf("find its control group: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok && strings.Contains(path, "/"+parent+"/") {
			return path, nil
		}
	}
	return "", nil
}

// controllers2 are those that the kernel has in cgroup v2.
func (h Host) controllers2() []string {
	if h.Root2 == "" {
		return nil
	}
	b, err := os.ReadFile(filepath.Join(h.Root2, "cgroup.controllers"))
	if err != nil {
		return nil
	}
	return strings.Fields(string(b))
}

func (h Host) apply2(o *one, group string) error {
	m, err := cgroup2.Load(group, cgroup2.WithMountpoint(h.Root2))
	if err != nil {
		return err
	}
	dir := filepath.Join(h.Root2, group)
	if !o.set && !exists(filepath.Join(dir, o.file2)) {
		return nil // never enabled, so never set
	}
	if err := m.ToggleControllers([]string{o.controller}, cgroup2.Enable); err != nil {
		return err
	}
	file := filepath.Join(dir, o.file2)
	if o.controller == "io" && !exists(file) {
		// Without the cost model there is the weight of the BFQ scheduler.
		file = filepath.Join(dir, "io.bfq.weight")
		weight, _ := strconv.Atoi(strings.TrimPrefix(o.raw2, "default "))
		o.raw2 = strconv.Itoa(min(weight, maxBlkioWeight))
	}
	if !exists(file) {
		return fmt.Errorf("the kernel of this host has no %s", filepath.Base(file))
	}
	if o.raw2 != "" {
		return os.WriteFile(file, []byte(o.raw2), 0)
	}
	return m.Update(&o.v2)
}

// subsystem of cgroup v1 for a controller of v2.
func (h Host) subsystem(controller string) cgroup1.Subsystem {
	switch controller {
	case "cpu":
		return cgroup1.NewCpu(h.Root1)
	case "cpuset":
		return cgroup1.NewCpuset(h.Root1)
	case "memory":
		return cgroup1.NewMemory(h.Root1)
	}
	return cgroup1.NewBlkio(h.Root1)
}

func name1(controller string) string {
	if controller == "io" {
		return "blkio"
	}
	return controller
}

func (h Host) path1(controller, vm string) string {
	return filepath.Join(h.Root1, name1(controller), parent, vm)
}

func (h Host) apply1(vm string, pid int, o *one) error {
	if h.Root1 == "" || !exists(filepath.Join(h.Root1, name1(o.controller))) {
		return fmt.Errorf("the kernel of this host has no controller %s for control groups", o.controller)
	}
	dir := h.path1(o.controller, vm)
	if !o.set && !exists(dir) {
		return nil // it is in no group of ours: nothing was ever set
	}
	hierarchy := func() ([]cgroup1.Subsystem, error) { return []cgroup1.Subsystem{h.subsystem(o.controller)}, nil }
	group, err := cgroup1.New(cgroup1.StaticPath("/"+parent+"/"+vm), &specs.LinuxResources{}, cgroup1.WithHierarchy(hierarchy))
	if err != nil {
		return err
	}
	if !exists(filepath.Join(dir, o.file1)) {
		return fmt.Errorf("the kernel of this host has no %s", o.file1)
	}
	if err := group.Add(cgroup1.Process{Pid: pid}); err != nil {
		return err
	}
	return group.Update(&o.v1)
}

// Release removes what Apply made for a VM without a process.
func (h Host) Release(vm string) error {
	if h.Root1 == "" {
		return nil
	}
	var errs []error
	for _, c := range []string{"cpu", "cpuset", "memory", "io"} {
		if err := os.Remove(h.path1(c, vm)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// allCPUs is what a set of CPUs is when there is no limit.
func (h Host) allCPUs() string {
	for _, path := range []string{filepath.Join(h.Root2, "cpuset.cpus.effective"), filepath.Join(h.Root1, "cpuset", "cpuset.cpus")} {
		if b, err := os.ReadFile(path); err == nil {
			return strings.TrimSpace(string(b))
		}
	}
	return ""
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
