// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"slices"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
)

func (a *app) vmDiskSet() *cobra.Command {
	var l api.DiskLimit
	flags := map[string]func(to *api.DiskLimit){
		"limit-iops":       func(to *api.DiskLimit) { to.IOPS = l.IOPS },
		"limit-iops-read":  func(to *api.DiskLimit) { to.IOPSRead = l.IOPSRead },
		"limit-iops-write": func(to *api.DiskLimit) { to.IOPSWrite = l.IOPSWrite },
		"limit-bps":        func(to *api.DiskLimit) { to.BPS = l.BPS },
		"limit-bps-read":   func(to *api.DiskLimit) { to.BPSRead = l.BPSRead },
		"limit-bps-write":  func(to *api.DiskLimit) { to.BPSWrite = l.BPSWrite },
		"burst":            func(to *api.DiskLimit) { to.Burst = l.Burst },
		"burst-seconds":    func(to *api.DiskLimit) { to.BurstSeconds = l.BurstSeconds },
	}
	cmd := &cobra.Command{
		Use: "set VM DISK", Short: "Limit a disk", Args: args("VM", "DISK"),
		Long: `Limits what a disk, given by its volume or its slot, does in a second; 0 takes a limit
away. A limit for both ways and one for a single way do not go together. Limits are in
force at once, also of a running VM.`,
		Example: `  muster vm disk set web1 data --limit-iops 500 --limit-bps 50M
  muster vm disk set web1 1 --limit-iops-write 100 --burst 5 --burst-seconds 10`,
		ValidArgsFunction: a.completeNames(api.KindVM),
		RunE: func(cmd *cobra.Command, names []string) error {
			given := func(name string) bool { return cmd.Flags().Changed(name) }
			some := false
			for name := range flags {
				some = some || given(name)
			}
			if !some {
				return usagef("vm disk set: nothing to change; give a limit")
			}
			return a.editVM(cmd.Context(), names[0], func(vm *api.VM) (map[string]any, error) {
				at := slices.IndexFunc(vm.Spec.Disks, func(d api.VMDisk) bool { return d.Volume == names[1] || names[1] == strconv.Itoa(d.Slot) })
				if at < 0 {
					return nil, api.Errorf(api.CodeNotFound, "vm %s has no volume %s attached; see muster vm show %s", names[0], names[1], names[0])
				}
				for name, set := range flags {
					if given(name) {
						set(&vm.Spec.Disks[at].Limit)
					}
				}
				list, err := asList(vm.Spec.Disks)
				return map[string]any{"disks": list}, err
			})
		},
	}
	fs := cmd.Flags()
	fs.Int64Var(&l.IOPS, "limit-iops", 0, "requests in a second")
	fs.Int64Var(&l.IOPSRead, "limit-iops-read", 0, "requests to read in a second")
	fs.Int64Var(&l.IOPSWrite, "limit-iops-write", 0, "requests to write in a second")
	fs.Var(limitSizeFlag{sizeFlag{&l.BPS}}, "limit-bps", "bytes in a second, such as 50M")
	fs.Var(limitSizeFlag{sizeFlag{&l.BPSRead}}, "limit-bps-read", "bytes read in a second")
	fs.Var(limitSizeFlag{sizeFlag{&l.BPSWrite}}, "limit-bps-write", "bytes written in a second")
	fs.IntVar(&l.Burst, "burst", 0, "how many times the limits may be passed after a quiet time; 0 for never")
	fs.IntVar(&l.BurstSeconds, "burst-seconds", 0, "for how long; 1 when left out")
	return cmd
}
