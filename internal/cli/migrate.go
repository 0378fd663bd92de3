// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

func (a *app) vmMigrate() *cobra.Command {
	var to string
	var bandwidth api.Size
	var downtime time.Duration
	var storage, dryRun, postCopy bool
	var channels int
	cmd := &cobra.Command{
		Use: "migrate NAME...", Short: "Move running VMs to another node without stopping them", Args: atLeastOne("NAME"),
		Long: `Moves running or paused VMs to the node of --to, or to the best other one. The guest
runs on; it stands still for a moment, when the last of its memory goes over. If
anything fails before that, it stays where it is. muster task cancel gives a
migration up.`,
		Example: `  muster vm migrate web1
  muster vm migrate web1 --to m2 --bandwidth 100M --max-downtime 100ms
  muster vm migrate web1 --dry-run`,
		ValidArgsFunction: a.completeNames(api.KindVM),
		RunE: func(cmd *cobra.Command, names []string) error {
			body := map[string]any{}
			set(body, "to", to)
			set(body, "bandwidth", bandwidth)
			set(body, "withStorage", storage)
			set(body, "postCopy", postCopy)
			if cmd.Flags().Changed("channels") {
				if body["channels"] = channels; channels < 1 || channels > api.MaxMigrationChannels {
					return usagef("--channels: is %d; give 1 to %d", channels, api.MaxMigrationChannels)
				}
			}
			if cmd.Flags().Changed("max-downtime") {
				body["maxDowntimeMillis"] = downtime.Milliseconds()
				if downtime < time.Millisecond {
					return usagef("--max-downtime: is %v; give %v to %v", downtime, api.MinDowntimeMillis*time.Millisecond, api.MaxDowntimeMillis*time.Millisecond)
				}
			}
			return a.each(names, func(c *client.Client, name string) error {
				if dryRun {
					return a.planMigration(cmd.Context(), c, name, body)
				}
				r, err := c.Action(cmd.Context(), api.KindVM, a.project, name, "migrate", body)
				if err != nil {
					return err
				}
				return a.finish(cmd.Context(), c, mustView(api.KindVM), name, "migrated", r)
			})
		},
	}
	cmd.Flags().StringVar(&to, "to", "", "node to move to (default the best other one)")
	cmd.Flags().Var(sizeFlag{&bandwidth}, "bandwidth", "most bytes per second, such as 100M")
	cmd.Flags().BoolVar(&storage, "with-storage", false, "copy the disks that only the present node has")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only say where to, what would go along and how long it would take")
	cmd.Flags().BoolVar(&postCopy, "post-copy", false, "if the guest changes more than can be sent, let it run there before the last of its memory has come")
	cmd.Flags().DurationVar(&downtime, "max-downtime", api.DefaultDowntimeMillis*time.Millisecond, "how long the guest may stand still for the last of its memory")
	cmd.Flags().IntVar(&channels, "channels", api.DefaultMigrationChannels, "how many connections carry the memory at once")
	a.completeFlag(cmd, "to", a.completeNames(api.KindNode))
	return cmd
}

func (a *app) taskCancel() *cobra.Command {
	return &cobra.Command{
		Use: "cancel ID...", Short: "Give tasks up", Args: atLeastOne("ID"),
		Long:              "Asks for the end of tasks that can be given up, such as a migration, and waits for\nit. The VM stays as it was. Past the point of no return the task goes on.",
		Example:           "  muster task cancel 01931e6c-7a52-7c3e-9b1f-2f6f0d6c3a11",
		ValidArgsFunction: a.completeNames(api.KindTask),
		RunE: func(cmd *cobra.Command, ids []string) error {
			return a.each(ids, func(c *client.Client, id string) error {
				r, err := c.Action(cmd.Context(), api.KindTask, a.project, id, "cancel", nil)
				if err != nil {
					return err
				}
				if r.Task == nil || a.flags.noWait {
					a.say("task %s asked to end", id)
					return nil
				}
				last, err := a.follow(cmd.Context(), c, r.Task, a.newProgress("cancel "+r.Task.Spec.Target))
				if last.Status.Phase == api.TaskCancelled {
					a.say("task %s cancelled", id)
					return nil
				}
				if err == nil {
					a.say("task %s was too far to be cancelled: %s", id, last.Status.Phase)
				}
				return err
			})
		},
	}
}
