// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
)

// vmClone is "muster vm clone".
func (a *app) vmClone() *cobra.Command {
	var snapshot string
	var full, start bool
	cmd := &cobra.Command{
		Use: "clone VM NEW", Short: "Make a new VM with copies of the disks of a VM", Args: args("VM", "NEW"),
		Long: `Makes a new VM with the hardware and labels of another and copies of its disks, as a
snapshot has them: that of --snapshot, or a temporary one that is taken now and removed
when the copies are done. The VM may run meanwhile. The new VM is itself: its ID, machine
ID, MAC addresses and reserved addresses are new. What the guest keeps on its disks, such
as its host name and SSH host keys, is copied with them: see docs/snapshots.md.
Disks that are clones of an image stay so, and only what differs is copied; with --full
the copies are independent of images.`,
		Example: `  muster vm clone web1 web2 --start
  muster vm clone web1 test1 --snapshot before-upgrade --full`,
		ValidArgsFunction: func(cmd *cobra.Command, given []string, word string) ([]string, cobra.ShellCompDirective) {
			if len(given) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return a.names(cmd.Context(), api.KindVM, nil, word), cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, names []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			body := map[string]any{"name": names[1]}
			set(body, "snapshot", snapshot)
			set(body, "full", full)
			set(body, "start", start)
			r, err := c.Action(cmd.Context(), api.KindVM, a.project, names[0], "clone", body)
			if err != nil {
				return err
			}
			return a.finish(cmd.Context(), c, mustView(api.KindVM), names[1], "cloned from "+names[0], r)
		},
	}
	cmd.Flags().StringVar(&snapshot, "snapshot", "", "copy this snapshot of the VM")
	cmd.Flags().BoolVar(&full, "full", false, "copy what comes from images, too")
	cmd.Flags().BoolVar(&start, "start", false, "start the new VM when its disks are copied")
	return cmd
}
