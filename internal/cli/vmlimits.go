// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"github.com/spf13/pflag"

	"github.com/muster-vm/muster/api"
)

// limitSizeFlag is a size of which 0 takes a limit away.
type limitSizeFlag struct{ sizeFlag }

func (s limitSizeFlag) Set(v string) (err error) {
	*s.n, err = api.ParseSize(v)
	return err
}

// limitFlags are the flags of what a VM may take of its host.
type limitFlags struct {
	limits api.VMLimits
	set    *pflag.FlagSet
}

func (f *limitFlags) add(fs *pflag.FlagSet) {
	f.set = fs
	fs.IntVar(&f.limits.CPUWeight, "cpu-weight", 0, "share of scarce CPUs against other VMs, 1-10000 (usually 100)")
	fs.IntVar(&f.limits.CPUMax, "cpu-max", 0, "most CPU time in percent of one CPU, such as 150; 0 for no limit")
	fs.StringVar(&f.limits.CPUSet, "cpu-set", "", "the node's CPUs that the VM may run on, such as 0-3,8; \"\" for all")
	fs.Var(limitSizeFlag{sizeFlag{&f.limits.MemoryMax}}, "memory-max", "most memory of QEMU with its guest, such as 5G; 0 for no limit")
	fs.IntVar(&f.limits.IOWeight, "io-weight", 0, "share of busy disks against other VMs, 1-10000 (usually 100)")
}

// into puts the flags that were given into a spec.
func (f *limitFlags) into(spec map[string]any) {
	given := map[string]any{}
	for name, field := range map[string]struct {
		key   string
		value any
	}{
		"cpu-weight": {"cpuWeight", f.limits.CPUWeight}, "cpu-max": {"cpuMax", f.limits.CPUMax}, "cpu-set": {"cpuSet", f.limits.CPUSet},
		"memory-max": {"memoryMax", f.limits.MemoryMax}, "io-weight": {"ioWeight", f.limits.IOWeight},
	} {
		if f.set.Changed(name) {
			given[field.key] = field.value
		}
	}
	if len(given) > 0 {
		spec["limits"] = given
	}
}
