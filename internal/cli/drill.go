// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

func (a *app) haDrill() *cobra.Command {
	run := a.vmAction("drill", "drilled", "Fail VMs over on purpose", `Ends each VM as a power cut of its node would (what its guest has not written is lost),
and has it restarted on another node by the same code that recovers lost nodes. The VM
must be meant for it: muster vm set NAME --drill manual, or with a schedule, such as
--drill "daily 03:00" (UTC). It is refused while the cluster is not whole. muster task
cancel gives it up until another node has the VM; muster ha proof shows its evidence.`)
	run.Use, run.Example = "run NAME...", "  muster ha drill run canary1"
	ls := &cobra.Command{
		Use: "ls", Short: "List the last drill of every VM", Args: args(),
		Example: "  muster ha drill ls\n  muster ha drill ls -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.list(cmd.Context(), mustView(api.KindDrill), client.ListOptions{})
		},
	}
	return group("drill", "Fail VMs over on purpose, to see that it works", run, ls)
}

func drillRow(o *api.Drill, now time.Time) []string {
	took := "-"
	if d := o.Status.Took(); d > 0 {
		took = fmt.Sprintf("%.1fs", d.Seconds())
	}
	return []string{o.Spec.VM, string(o.Status.Phase), dash(o.Spec.Schedule), age(o.Spec.BegunAt, now), took, dash(o.Spec.Node), dash(o.Status.Node), dash(o.Status.Message)}
}

func drillShow(s *sections, o *api.Drill, now time.Time) {
	s.field("Status", string(o.Status.Phase))
	s.field("Begun", moment(o.Spec.BegunAt, now))
	if o.Spec.Due != nil {
		s.field("Due", moment(*o.Spec.Due, now))
	}
	s.field("By", o.Spec.Actor)
	s.field("From", o.Spec.Node)
	s.field("To", o.Status.Node)
	if e := o.Status.Ended; e != nil {
		s.field("Ended", fmt.Sprintf("%s, process %d, %s", moment(e.At, now), e.PID, e.Reason))
	}
	if d := o.Status.Took(); d > 0 {
		s.field("Took", millis(d.Milliseconds()))
	}
	s.field("Evidence", o.Status.Failover)
	s.field("Message", o.Status.Message)
	if at := o.Status.SucceededAt; at != nil {
		s.field("Succeeded", moment(*at, now))
	}
}

// drillText says when a VM is drilled.
func drillText(drill string, now time.Time) string {
	s, ok, err := api.ParseDrill(drill)
	if !ok || err != nil {
		return drill
	}
	return fmt.Sprintf("%s UTC, next %s", drill, s.Next(now).Format("2006-01-02 15:04"))
}
