// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

func (a *app) nodeCmd() *cobra.Command {
	maintenance := func(word, short string, on bool) *cobra.Command {
		return &cobra.Command{
			Use: word + " NODE...", Short: short, Args: atLeastOne("NODE"),
			Example:           "  muster node maintenance " + word + " m1",
			ValidArgsFunction: a.completeNames(api.KindNode),
			RunE: func(cmd *cobra.Command, names []string) error {
				return a.each(names, func(_ *client.Client, name string) error {
					return a.patch(cmd.Context(), api.KindNode, name, patchOf(map[string]any{"maintenance": on}, nil))
				})
			},
		}
	}
	ls := a.lsCmd(api.KindNode)
	ls.Long = "Lists nodes. With -o wide also what the node that answers heard of them by gossip:\nwhether they seem to live, and how loaded they are, and the feature levels that\ntheir software supports."
	ls.Example += "\n  muster node ls -o wide"
	return group("node", "Hosts of the cluster", ls, a.showCmd(api.KindNode), a.nodeFacts(), a.nodeSet(),
		group("maintenance", "Keep new VMs away from a node, or let them in again",
			maintenance("on", "The node takes no new VMs", true),
			maintenance("off", "The node takes VMs again", false)),
		a.nodeEvacuate(), a.nodeReboot(api.RebootHost), a.nodeReboot(api.ShutdownHost), a.nodePower(), a.nodeMemory(), a.nodeRenew(), a.nodeRemove())
}

func (a *app) nodeSet() *cobra.Command {
	var accel, role string
	var reserved, bandwidth api.Size
	cmd := &cobra.Command{
		Use: "set NODE", Short: "Change the accelerator, the memory kept for the host, or the role", Args: args("NODE"),
		Example:           "  muster node set m1 --accelerator tcg\n  muster node set m1 --reserved-memory 2G\n  muster node set m4 --role replica",
		ValidArgsFunction: a.completeNames(api.KindNode),
		RunE: func(cmd *cobra.Command, names []string) error {
			spec := map[string]any{}
			set(spec, "accelerator", accel)
			set(spec, "reservedMemory", reserved)
			set(spec, "role", role)
			if cmd.Flags().Changed("migration-bandwidth") {
				spec["migrationBandwidth"] = bandwidth
			}
			if len(spec) == 0 {
				return usagef("node set: nothing to change; give --accelerator, --reserved-memory, --migration-bandwidth or --role")
			}
			return a.patch(cmd.Context(), api.KindNode, names[0], patchOf(spec, nil))
		},
	}
	cmd.Flags().StringVar(&accel, "accelerator", "", "auto, kvm or tcg")
	cmd.Flags().Var(sizeFlag{&bandwidth}, "migration-bandwidth", "most bytes per second that leaving VMs take together, 0 for no bound")
	cmd.Flags().StringVar(&role, "role", "", "voter (votes when needed) or replica (never votes)")
	cmd.Flags().Var(sizeFlag{&reserved}, "reserved-memory", "memory kept for the host, such as 1G")
	return cmd
}

func (a *app) nodeRemove() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "remove NODE", Aliases: []string{"rm"}, Short: "Take a node out of the cluster", Args: args("NODE"),
		Long: "Takes a node out of the cluster. With --force also one that is dead and will not\ncome back: make sure that it is switched off, it may otherwise still run its VMs.",
		Example: `  muster node remove m3
  muster node remove m3 --force`,
		ValidArgsFunction: a.completeNames(api.KindNode),
		RunE: func(cmd *cobra.Command, names []string) error {
			return a.removeNode(cmd.Context(), names[0], force)
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "also a dead node that will not come back")
	return cmd
}

func (a *app) removeNode(ctx context.Context, name string, force bool) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	r, err := c.Delete(ctx, api.KindNode, a.project, name, force)
	if err != nil {
		return err
	}
	return a.finish(ctx, c, mustView(api.KindNode), name, "removed", r)
}

func (a *app) taskCmd() *cobra.Command {
	wait := &cobra.Command{
		Use: "wait ID...", Short: "Wait until tasks are done", Args: atLeastOne("ID"),
		Long:              "Waits until the tasks are done and shows their progress. A failed task makes the\nexit code 1.",
		Example:           "  muster task wait 01931e6c-7a52-7c3e-9b1f-2f6f0d6c3a11\n  muster task wait ID --timeout 5m",
		ValidArgsFunction: a.completeNames(api.KindTask),
		RunE: func(cmd *cobra.Command, ids []string) error {
			return a.each(ids, func(c *client.Client, id string) error { return a.waitTask(cmd.Context(), c, id) })
		},
	}
	show := a.showCmd(api.KindTask)
	show.Use, show.Args = "show ID", args("ID")
	show.Example = "  muster task show ID"
	return group("task", "Long operations and their progress", a.lsCmd(api.KindTask), show, wait, a.taskCancel())
}

func (a *app) waitTask(ctx context.Context, c *client.Client, id string) error {
	raw, _, err := c.Get(ctx, api.KindTask, a.project, id)
	if err != nil {
		return err
	}
	task, err := client.As[api.TaskSpec, api.TaskStatus](raw)
	if err != nil {
		return err
	}
	last, err := a.follow(ctx, c, &task, a.newProgress(string(task.Spec.Action)+" "+task.Spec.Target))
	if err != nil {
		return err
	}
	switch {
	case a.structured():
		return a.printValue(last)
	case a.flags.output == "name":
		a.say("task/%s", last.Meta.ID)
	default:
		a.say("task %s %s: %s %s", last.Meta.ID, last.Status.Phase, last.Spec.Action, last.Spec.Target)
	}
	return nil
}
