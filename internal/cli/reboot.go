// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

func (a *app) nodeReboot(action api.RebootAction) *cobra.Command {
	var level string
	var parallel int
	var stopped, stay, anyway bool
	var force, within time.Duration
	word := string(action)
	short, done, tail := "Empty a node, reboot its host and let it take VMs again", "rebooted", `When the host runs its next boot and the node is ready, the maintenance ends and what
was shut down is started again; what was moved stays where it is.`
	if action == api.ShutdownHost {
		short, done, tail = "Empty a node and shut its host down", "shut down", `The task ends when the node is silent. When the host is switched on again, the
maintenance ends and what was shut down is started again.`
	}
	cmd := &cobra.Command{
		Use: word + " NODE", Short: short, Args: args("NODE"),
		Long: `Puts the node into maintenance, which moves the leadership away, empties it as muster
node evacuate does, and has it run its host's command. The node is expected to be away:
ha does not take that for a failure. Refused if too few voters would be left, while
another node goes the same way, and, before the command, if a VM runs on the node that
could not leave, or one is bound to it that ha protects.
` + tail,
		Example:           "  muster node " + word + " m1\n  muster node " + word + " m1 --level stop --force-stop-after 2m\n  muster node " + word + " m1 --no-evacuate --level stop --no-wait",
		ValidArgsFunction: a.completeNames(api.KindNode),
		RunE: func(cmd *cobra.Command, names []string) error {
			body, ev := map[string]any{}, map[string]any{}
			set(ev, "level", level)
			set(ev, "moveStopped", stopped)
			set(ev, "forceStopSeconds", int(force.Seconds()))
			if cmd.Flags().Changed("parallel") {
				ev["parallel"] = parallel
			}
			if len(ev) > 0 {
				body["evacuate"] = ev
			}
			set(body, "noEvacuate", stay)
			set(body, "force", anyway)
			set(body, "withinSeconds", int(within.Seconds()))
			return a.each(names, func(c *client.Client, name string) error {
				r, err := c.Action(cmd.Context(), api.KindNode, a.project, name, word, body)
				if err != nil {
					return err
				}
				return a.finish(cmd.Context(), c, mustView(api.KindNode), name, done, r)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&level, "level", "", "live (default), or stop: shut down what cannot be moved while it runs")
	f.IntVar(&parallel, "parallel", api.DefaultEvacuations, "how many VMs move at once, 1 to 16")
	f.BoolVar(&stopped, "move-stopped", false, "also move stopped VMs whose disks only the node has, with these")
	f.DurationVar(&force, "force-stop-after", 0, "with --level stop: end guests that have not shut down after this time; 0 is never")
	f.BoolVar(&stay, "no-evacuate", false, "move nothing; with --level stop what runs is shut down, and started again later")
	f.BoolVar(&anyway, "force", false, "also while another node is being rebooted or shut down")
	if action == api.RebootHost {
		f.DurationVar(&within, "within", 0, "for how long the host may be away, 30s to 24h (default 15m)")
	}
	return cmd
}
