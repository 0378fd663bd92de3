// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
)

func (a *app) haCmd() *cobra.Command {
	status := &cobra.Command{
		Use: "status", Short: "Show what would happen now if each node died", Args: args(),
		Long: `Shows what would happen now if each node died: which VMs would restart where, which
would not and why; the level of each node's guard; how many voters may be lost; and
whether the loss of as many nodes as promised (muster ha set --failures) is survived.
It is the same plan that the recovery carries out. With -o wide every VM is listed.`,
		Example: "  muster ha status\n  muster ha status -o wide\n  muster ha status -o json",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.haStatus(cmd.Context()) },
	}
	return group("ha", "What happens when nodes die", status, a.haSimulate(), a.haSet(), a.haProof(), a.haVerify(), a.haDrill())
}

func (a *app) haSimulate() *cobra.Command {
	var kill []string
	cmd := &cobra.Command{
		Use: "simulate --kill NODE[,NODE...]", Short: "Show what would happen if nodes died together", Args: args(),
		Long: `Shows, in the order in which VMs get their places, what would happen if the nodes of
--kill died together now. Nothing is changed. The exit code is 1 if a VM that ought to
restart would not.`,
		Example: "  muster ha simulate --kill m2\n  muster ha simulate --kill m2,m3 -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(kill) == 0 {
				return usagef("ha simulate: give --kill NODE[,NODE...], the nodes that die")
			}
			return a.simulate(cmd.Context(), kill)
		},
	}
	cmd.Flags().StringSliceVar(&kill, "kill", nil, "nodes that die, by name or ID")
	_ = cmd.RegisterFlagCompletionFunc("kill", func(cmd *cobra.Command, _ []string, word string) ([]string, cobra.ShellCompDirective) {
		return a.names(cmd.Context(), api.KindNode, nil, word), cobra.ShellCompDirectiveNoFileComp
	})
	return cmd
}

func (a *app) simulate(ctx context.Context, kill []string) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	var l api.HALoss
	reply, err := c.Call(ctx, http.MethodPost, "/ha/simulate", api.HASimulateRequest{Kill: kill}, &l)
	if err != nil {
		return err
	}
	switch {
	case a.structured():
		err = a.printJSON(reply.Body)
	case a.flags.output == "name":
		for _, s := range l.Steps {
			if s.Outcome == api.HARestarts {
				fmt.Fprintln(a.Out, "vm/"+clean(s.VM))
			}
		}
	default:
		out := &sections{paint: a.colour()}
		out.field("If killed", strings.Join(l.Killed, ", "))
		out.field("Quorum", quorumText(&l.Quorum))
		out.field("VMs", first(countsText(l.Counts), "none is concerned"))
		out.field("Revision", strconv.FormatUint(l.Revision, 10))
		if len(l.Steps) > 0 {
			out.title("In this order")
			out.table(stepTable(l.Steps, 0))
		}
		_, err = fmt.Fprint(a.Out, out.String())
	}
	if n := l.Counts[string(api.HARefused)]; err == nil && n > 0 {
		return fmt.Errorf("%d VMs that ought to restart would not", n)
	}
	return err
}

// stepTable lists what becomes of VMs, at most so many; 0 for all.
func stepTable(steps []api.HAStep, most int) *table {
	if slices.ContainsFunc(steps, func(s api.HAStep) bool { return s.StartsAfter != "" }) {
		return waveTable(steps, most)
	}
	t := &table{head: []string{"ORDER", "PRIORITY", "VM", "PROJECT", "FROM", "OUTCOME", "NODE", "WHY"}}
	for i, s := range steps {
		if most > 0 && i == most {
			t.add("…", "", fmt.Sprintf("and %d more", len(steps)-most), "", "", "", "", "")
			break
		}
		t.add(strconv.Itoa(s.Order), dash(string(s.Priority)), s.VM, s.Project, s.From, string(s.Outcome), dash(s.Node), s.Reason)
	}
	return t
}

// waveTable is stepTable with the order of the starts.
func waveTable(steps []api.HAStep, most int) *table {
	t := &table{head: []string{"ORDER", "PRIORITY", "VM", "PROJECT", "FROM", "OUTCOME", "NODE", "WAVE", "AFTER", "WHY"}}
	for i, s := range steps {
		if most > 0 && i == most {
			t.add("…", "", fmt.Sprintf("and %d more", len(steps)-most), "", "", "", "", "", "", "")
			break
		}
		t.add(strconv.Itoa(s.Order), dash(string(s.Priority)), s.VM, s.Project, s.From, string(s.Outcome), dash(s.Node), dash(number(uint64(s.Wave))), dash(s.StartsAfter), s.Reason)
	}
	return t
}

// outcomes in the order in which they are counted for people.
var outcomes = []api.HAOutcome{api.HARestarts, api.HARefused, api.HAWaits, api.HAEnds, api.HAMoves, api.HAStays}

func countsText(counts map[string]int) string {
	words := map[api.HAOutcome]string{
		api.HARestarts: "restart elsewhere", api.HARefused: "would not restart", api.HAWaits: "wait for the node",
		api.HAEnds: "on other nodes end", api.HAMoves: "stopped ones move", api.HAStays: "stopped ones stay",
	}
	var out []string
	for _, o := range outcomes {
		if n := counts[string(o)]; n > 0 {
			out = append(out, fmt.Sprintf("%d %s", n, words[o]))
		}
	}
	return strings.Join(out, ", ")
}

func quorumText(q *api.HAQuorum) string {
	text := fmt.Sprintf("%d of %d voters are left, %d are needed", q.Left, q.Voters, q.Needed)
	switch {
	case !q.Kept:
		return text + ": nothing restarts, and protected VMs end with their leases, but for those with a storage guard, which run on"
	case q.Spare == 0:
		return text + ": one more lost voter stops everything"
	case q.Spare == 1:
		return text + ": one more may be lost"
	}
	return fmt.Sprintf("%s: %d more may be lost", text, q.Spare)
}

// quorumLostText says what the loss of the quorum would do to the running VMs.
func quorumLostText(l *api.HAQuorumLost) string {
	if l.Ends+l.RunsOn == 0 {
		return "no VM is concerned"
	}
	return fmt.Sprintf("if the quorum were lost now, %d VMs would end with the leases of their nodes, %d would run on, none would restart", l.Ends, l.RunsOn)
}

// votersText says what the number of voters means.
func votersText(s *api.HAStatus) string {
	switch {
	case s.Quorum.Voters == 1:
		return "one: without it nothing goes on; let nodes join"
	case s.Quorum.Voters == 2 && s.Witness == "":
		return "two and no witness: if either dies nothing restarts; let a witness join (muster cluster token create --role witness)"
	case s.Witness != "":
		return fmt.Sprintf("%d, %s of them a witness", s.Quorum.Voters, s.Witness)
	}
	return strconv.Itoa(s.Quorum.Voters)
}

func promiseText(p *api.HAAdmission) string {
	what := "the loss of any node"
	if p.Failures > 1 {
		what = fmt.Sprintf("the loss of any %d nodes together", p.Failures)
	}
	looked := fmt.Sprintf(" (%d of %d cases looked at)", p.Sets, p.OfAll)
	switch p.Admission {
	case api.AdmissionOff:
		what += ", not enforced"
	case api.AdmissionRefuse:
		what += ", starts that break it are refused"
	default:
		what += ", starts that break it are warned of"
	}
	if p.Kept {
		return "yes: " + what + looked
	}
	return "no: " + what + looked + ": " + p.Message
}

// vmsShown is how many VMs of each node the status lists unless asked for all.
const vmsShown = 8

func (a *app) haStatus(ctx context.Context) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	var s api.HAStatus
	reply, err := c.Call(ctx, http.MethodGet, "/ha/status", nil, &s)
	if err != nil {
		return err
	}
	if a.structured() {
		return a.printJSON(reply.Body)
	}
	if a.flags.output == "name" {
		for _, n := range s.Nodes {
			fmt.Fprintln(a.Out, "node/"+clean(n.Node))
		}
		return nil
	}
	out := &sections{paint: a.colour()}
	out.field("Quorum", quorumText(&s.Quorum))
	out.field("Without it", quorumLostText(&s.IfQuorumLost))
	out.field("Voters", votersText(&s))
	out.field("Survives", promiseText(&s.Admission))
	out.field("Answered by", fmt.Sprintf("%s, for revision %d, computed in %.0f ms", s.Node, s.Revision, s.Seconds*1000))
	if c.QuorumLost() {
		var now api.ClusterStatus
		if _, err := c.Call(ctx, http.MethodGet, "/cluster", nil, &now); err != nil {
			return err
		}
		lossSections(out, now.NoQuorum, a.Now())
	}
	out.title("Nodes")
	t := &table{head: []string{"NODE", "STATUS", "ROLE", "VOTES", "LEADER", "GUARD", "PROTECTED", "OTHERS", "IF IT DIES NOW"}}
	for _, n := range s.Nodes {
		t.add(n.Node, dash(string(n.Phase)), dash(string(n.Role)), yesNo(n.Voter), yesNo(n.Leader), dash(n.GuardLevel),
			strconv.Itoa(n.Protected), strconv.Itoa(n.Unprotected), lossText(n.Loss))
	}
	out.table(t)
	most := vmsShown
	if a.flags.wide {
		most = 0
	}
	if s.Lost != nil && len(s.Lost.Steps) > 0 {
		out.title("VMs of nodes that are lost")
		out.table(stepTable(s.Lost.Steps, most))
	}
	for _, n := range s.Nodes {
		if n.Loss == nil || len(n.Loss.Steps) == 0 {
			continue
		}
		out.title("If " + n.Node + " dies")
		out.table(stepTable(worstFirst(n.Loss.Steps, most), most))
	}
	if len(s.Admission.Refused) > 0 {
		out.title(fmt.Sprintf("Would not restart if %s died", strings.Join(s.Admission.Worst, " and ")))
		out.table(stepTable(s.Admission.Refused, most))
	}
	_, err = fmt.Fprint(a.Out, out.String())
	return err
}

// worstFirst puts the VMs that would not restart before the others where not all
// are listed.
func worstFirst(steps []api.HAStep, most int) []api.HAStep {
	if most == 0 || len(steps) <= most {
		return steps
	}
	out := slices.Clone(steps)
	slices.SortStableFunc(out, func(a, b api.HAStep) int {
		return boolRank(a.Outcome != api.HARefused) - boolRank(b.Outcome != api.HARefused)
	})
	return out
}

func boolRank(b bool) int {
	if b {
		return 1
	}
	return 0
}

func lossText(l *api.HALoss) string {
	if l == nil {
		return "-"
	}
	text := first(countsText(l.Counts), "no VM is concerned")
	if !l.Quorum.Kept {
		return "no quorum is left; " + text
	}
	return text
}

func (a *app) haSet() *cobra.Command {
	var failures int
	var admission, heartbeat string
	cmd := &cobra.Command{
		Use: "set", Short: "Say how many failures of nodes must be survived", Args: args(),
		Long: `Sets how many nodes may die together so that every protected VM still restarts, and
what becomes of a start that would break that: it is let through (off), let through
with a warning (warn), or refused (refuse). The storage heartbeat (on or off) keeps the
leases of nodes through pools that all nodes see while the network fails.`,
		Example: "  muster ha set --failures 2 --admission refuse\n  muster ha set --admission off",
		RunE: func(cmd *cobra.Command, _ []string) error {
			p := map[string]any{}
			if cmd.Flags().Changed("failures") {
				p["failures"] = failures
			}
			set(p, "admission", admission)
			set(p, "storageHeartbeat", heartbeat)
			if len(p) == 0 {
				return usagef("ha set: nothing to change; give --failures, --admission or --storage-heartbeat")
			}
			c, err := a.connect()
			if err != nil {
				return err
			}
			var s api.ClusterSettings
			if _, err := c.Call(cmd.Context(), http.MethodPatch, "/cluster/settings", map[string]any{"ha": p}, &s); err != nil {
				return err
			}
			if a.structured() {
				return a.printValue(s.HA)
			}
			a.say("failures to survive: %d; admission: %s; storage heartbeat: %s", s.HA.Failures, s.HA.Admission, s.HA.StorageHeartbeat)
			return nil
		},
	}
	cmd.Flags().IntVar(&failures, "failures", 0, fmt.Sprintf("nodes that may die together, 1 to %d (1 in a new cluster)", api.MaxHAFailures))
	cmd.Flags().StringVar(&admission, "admission", "", "a start that would break it: off, warn or refuse (warn in a new cluster)")
	cmd.Flags().StringVar(&heartbeat, "storage-heartbeat", "", "keep leases by notes in pools when the network fails: on or off (on by default, also after an upgrade)")
	return cmd
}
