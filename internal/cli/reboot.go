// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// rebootFlags are the options of the reboot of a node, by itself or in turn.
type rebootFlags struct {
	level         string
	parallel      int
	stopped, stay bool
	force, within time.Duration
	dryRun        bool
}

func (o *rebootFlags) add(cmd *cobra.Command, action api.RebootAction) {
	f := cmd.Flags()
	f.StringVar(&o.level, "level", "", "live (default), or stop: shut down what cannot be moved while it runs")
	f.IntVar(&o.parallel, "parallel", api.DefaultEvacuations, "how many VMs move at once, 1 to 16")
	f.BoolVar(&o.stopped, "move-stopped", false, "also move stopped VMs whose disks only the node has, with these")
	f.DurationVar(&o.force, "force-stop-after", 0, "with --level stop: end guests that have not shut down after this time; 0 is never")
	f.BoolVar(&o.stay, "no-evacuate", false, "move nothing; with --level stop what runs is shut down, and started again later")
	f.BoolVar(&o.dryRun, "dry-run", false, "only show what would become of the VMs, who could lead and what is in the way")
	if action == api.RebootHost {
		f.DurationVar(&o.within, "within", 0, "for how long a host may be away, 30s to 24h (default 15m)")
	}
}

func (o *rebootFlags) body(cmd *cobra.Command) map[string]any {
	body, ev := map[string]any{}, map[string]any{}
	set(ev, "level", o.level)
	set(ev, "moveStopped", o.stopped)
	set(ev, "forceStopSeconds", wholeSeconds(o.force))
	if cmd.Flags().Changed("parallel") {
		ev["parallel"] = o.parallel
	}
	if len(ev) > 0 {
		body["evacuate"] = ev
	}
	set(body, "noEvacuate", o.stay)
	set(body, "withinSeconds", wholeSeconds(o.within))
	return body
}

func (a *app) nodeReboot(action api.RebootAction) *cobra.Command {
	var o rebootFlags
	var anyway bool
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
		Example:           "  muster node " + word + " m1\n  muster node " + word + " m1 --dry-run\n  muster node " + word + " m1 --level stop --force-stop-after 2m\n  muster node " + word + " m1 --no-evacuate --level stop --no-wait",
		ValidArgsFunction: a.completeNames(api.KindNode),
		RunE: func(cmd *cobra.Command, names []string) error {
			body := o.body(cmd)
			set(body, "force", anyway)
			return a.each(names, func(c *client.Client, name string) error {
				if o.dryRun {
					return a.planReboot(cmd.Context(), c, "/nodes/"+url.PathEscape(name)+"/"+word+"/plan", body)
				}
				r, err := c.Action(cmd.Context(), api.KindNode, a.project, name, word, body)
				if err != nil {
					return err
				}
				return a.finish(cmd.Context(), c, mustView(api.KindNode), name, done, r)
			})
		},
	}
	o.add(cmd, action)
	cmd.Flags().BoolVar(&anyway, "force", false, "also while another node is being rebooted or shut down")
	return cmd
}

func (a *app) clusterReboot() *cobra.Command {
	var o rebootFlags
	var rolling, goOn bool
	var nodes []string
	cmd := &cobra.Command{
		Use: "reboot --rolling", Short: "Reboot all nodes, one after the other", Args: args(),
		Long: `Reboots all nodes, or some, as muster node reboot does, one after the other, the one
that leads last. Before each, and at the end, all has to be well again within 10
minutes. Before the first it is checked that every node can be emptied. It stops at the
first failure and says what is left; --continue goes on with the nodes that have not run
another boot since it began. muster task cancel ends it after the node under way.`,
		Example: "  muster cluster reboot --rolling\n  muster cluster reboot --rolling --dry-run\n  muster cluster reboot --rolling --nodes m1,m3 --level stop --force-stop-after 2m\n  muster cluster reboot --rolling --continue",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !rolling {
				return usagef("--rolling: is missing; nodes are rebooted one after the other only")
			}
			if cmd.Flags().Changed("nodes") && len(nodes) == 0 {
				return usagef("--nodes: names no node; leave it out for all")
			}
			body := o.body(cmd)
			set(body, "continue", goOn)
			if len(nodes) > 0 {
				body["nodes"] = nodes
			}
			return a.rollingReboot(cmd.Context(), o.dryRun, body)
		},
	}
	o.add(cmd, api.RebootHost)
	f := cmd.Flags()
	f.BoolVar(&rolling, "rolling", false, "one node after the other; has to be given")
	f.BoolVar(&goOn, "continue", false, "go on with what the last rolling reboot has left")
	f.StringSliceVar(&nodes, "nodes", nil, "these nodes only, in the order of their turns")
	_ = cmd.RegisterFlagCompletionFunc("nodes", a.completeNames(api.KindNode)) // it is there
	return cmd
}

func (a *app) rollingReboot(ctx context.Context, dryRun bool, body map[string]any) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	if dryRun {
		return a.planReboot(ctx, c, "/cluster/reboot/plan", body)
	}
	r, err := c.ClusterAction(ctx, "reboot", body)
	if err != nil {
		return err
	}
	name := r.Task.Spec.Target
	if !a.flags.wait {
		return a.accepted(&kindView{kind: api.KindCluster}, name, r)
	}
	task, err := a.follow(ctx, c, r.Task, a.newProgress(fmt.Sprintf("%s %s", r.Task.Spec.Action, name)))
	switch {
	case err != nil:
		return err
	case a.structured():
		return a.printValue(task)
	case a.flags.output == "name":
		fmt.Fprintln(a.Out, "task/"+task.Meta.ID)
		return nil
	}
	a.say("cluster %s: %s", name, clean(task.Status.Message))
	return nil
}

// planReboot shows what a reboot would do.
func (a *app) planReboot(ctx context.Context, c *client.Client, path string, body map[string]any) error {
	var p api.RebootPlan
	reply, err := c.Call(ctx, http.MethodPost, path, body, &p)
	if err != nil {
		return err
	}
	if a.structured() {
		return a.printJSON(reply.Body)
	}
	out := &sections{paint: a.colour()}
	if p.Refusal != "" {
		out.field("Refused", p.Refusal)
	}
	for i := range p.Nodes {
		n := &p.Nodes[i]
		out.title("Node " + n.Node)
		if len(n.Leaders) > 0 {
			out.field("Leads now", "then one of "+strings.Join(n.Leaders, ", "))
		}
		out.field("Voters left", fmt.Sprintf("%d, and %d are needed", n.Voters, n.VotersNeeded))
		if n.Refusal != "" {
			out.field("In the way", n.Refusal)
		}
		if len(n.VMs) == 0 {
			continue
		}
		t := &table{head: []string{"VM", "WOULD", "NODE", "REASON"}}
		for _, vm := range n.VMs {
			t.add(vm.VM, string(vm.Fate), vm.To, dash(vm.Reason))
		}
		out.table(t)
	}
	_, err = fmt.Fprint(a.Out, out.String())
	return err
}
