// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

func (a *app) nodeEvacuate() *cobra.Command {
	var parallel int
	var level string
	var stopped bool
	var force time.Duration
	cmd := &cobra.Command{
		Use: "evacuate NODE...", Short: "Move all VMs away from a node", Args: atLeastOne("NODE"),
		Long: `Puts nodes into maintenance, so that no new VM comes there, and moves away what is
there: running VMs by live migration, with the disks that only the node has; stopped
ones, whose disks others have, are bound elsewhere; with --move-stopped those whose disks
only the node has are moved with them. The cluster goes on with it when this command ends. VMs that cannot be moved while they run stay, and are named with
the reason; with --level stop they are shut down and started elsewhere.
muster node maintenance off lets VMs come again.`,
		Example: `  muster node evacuate m1
  muster node evacuate m1 --level stop --parallel 4`,
		ValidArgsFunction: a.completeNames(api.KindNode),
		RunE: func(cmd *cobra.Command, names []string) error {
			body := map[string]any{}
			set(body, "level", level)
			set(body, "moveStopped", stopped)
			set(body, "forceStopSeconds", int(force.Seconds()))
			if cmd.Flags().Changed("parallel") {
				body["parallel"] = parallel
			}
			return a.each(names, func(c *client.Client, name string) error {
				r, err := c.Action(cmd.Context(), api.KindNode, a.project, name, "evacuate", body)
				if err != nil {
					return err
				}
				return a.finish(cmd.Context(), c, mustView(api.KindNode), name, "evacuated", r)
			})
		},
	}
	cmd.Flags().IntVar(&parallel, "parallel", api.DefaultEvacuations, "how many VMs move at once, 1 to 16; a node lets 2 leave at a time")
	cmd.Flags().DurationVar(&force, "force-stop-after", 0, "with --level stop: end guests that have not shut down after this time; 0 is never")
	cmd.Flags().BoolVar(&stopped, "move-stopped", false, "also move stopped VMs whose disks only the node has, with these")
	cmd.Flags().StringVar(&level, "level", "", "live (default), or stop: shut down what cannot be moved while it runs")
	return cmd
}
