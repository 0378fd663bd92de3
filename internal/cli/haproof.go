// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
	"github.com/muster-vm/muster/internal/proof"
)

// maxProofFile bounds a file with evidence, in bytes: 5,000 moves are 5 MB.
const maxProofFile = 64 << 20

func (a *app) haProof() *cobra.Command {
	return &cobra.Command{
		Use: "proof [ID]", Short: "Show the evidence of a failover, or list all that is kept", Args: atMostOne(),
		Long: fmt.Sprintf(`Shows why it was certain that the protected VMs of a lost node had ended, which VM went
where under which epoch, how long each part took, and whether all of it holds
(muster ha verify). Without an ID the losses are listed; the newest %d are kept.`, api.KeptFailovers),
		Example:           "  muster ha proof\n  muster ha proof ID\n  muster ha proof ID -o json > proof.json",
		ValidArgsFunction: a.completeNames(api.KindFailover),
		RunE: func(cmd *cobra.Command, ids []string) error {
			if len(ids) == 0 {
				return a.list(cmd.Context(), mustView(api.KindFailover), client.ListOptions{})
			}
			return a.proof(cmd.Context(), ids[0])
		},
	}
}

func (a *app) haVerify() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use: "verify [ID...]", Short: "Check the evidence of failovers", Args: cobra.ArbitraryArgs,
		Long: `Checks that a node was only declared lost when its protected VMs had ended for certain,
that each was moved after that and once, and that the node got no lease before the
last move. The check is made here, by code that has nothing in common with what it
checks; with --file it needs no cluster. Without an ID all failovers that are kept
are checked. The exit code is 1 if a rule is broken.`,
		Example:           "  muster ha verify\n  muster ha verify ID\n  muster ha verify --file proof.json",
		ValidArgsFunction: a.completeNames(api.KindFailover),
		RunE: func(cmd *cobra.Command, ids []string) error {
			if file != "" && len(ids) > 0 {
				return usagef("ha verify: give either IDs or --file")
			}
			verdicts, err := a.verdicts(cmd.Context(), file, ids)
			if err != nil {
				return err
			}
			return a.printVerdicts(verdicts)
		},
	}
	cmd.Flags().StringVarP(&file, "file", "f", "", "a file written by: muster ha proof ID -o json; - for standard input")
	return cmd
}

func (a *app) verdicts(ctx context.Context, file string, ids []string) ([]proof.Verdict, error) {
	if file != "" {
		p, err := a.proofFile(file)
		if err != nil {
			return nil, err
		}
		return []proof.Verdict{proof.Check(p)}, nil
	}
	c, err := a.connect()
	if err != nil {
		return nil, err
	}
	if len(ids) == 0 {
		l, err := c.List(ctx, api.KindFailover, client.ListOptions{})
		if err != nil {
			return nil, err
		}
		for _, raw := range l.Items {
			f, err := client.As[api.FailoverSpec, api.FailoverStatus](raw)
			if err != nil {
				return nil, err
			}
			ids = append(ids, f.Meta.ID)
		}
	}
	var out []proof.Verdict
	for _, id := range ids {
		p, _, err := callProof(ctx, c, id)
		if err != nil {
			return nil, err
		}
		out = append(out, proof.Check(p))
	}
	return out, nil
}

func callProof(ctx context.Context, c *client.Client, id string) (*api.FailoverProof, []byte, error) {
	var p api.FailoverProof
	reply, err := c.Call(ctx, http.MethodGet, "/failovers/"+url.PathEscape(id)+"/proof", nil, &p)
	if err != nil {
		return nil, nil, err
	}
	return &p, reply.Body, nil
}

func (a *app) proofFile(name string) (*api.FailoverProof, error) {
	r := a.In
	if name != "-" {
		if err := a.noLocalFile("--file"); err != nil {
			return nil, err
		}
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer func() { _ = f.Close() }()
		r = f
	}
	b, err := io.ReadAll(io.LimitReader(r, maxProofFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxProofFile {
		return nil, fmt.Errorf("%s: larger than %d bytes; give a file written by: muster ha proof ID -o json", name, maxProofFile)
	}
	var p api.FailoverProof
	if err := json.Unmarshal(b, &p); err != nil {
		return nil, fmt.Errorf("%s: not what muster ha proof ID -o json writes: %w", name, err)
	}
	return &p, nil
}

func (a *app) printVerdicts(list []proof.Verdict) error {
	broken := 0
	for i := range list {
		if !list[i].OK {
			broken++
		}
	}
	switch {
	case a.structured():
		if list == nil {
			list = []proof.Verdict{}
		}
		if err := a.printValue(list); err != nil {
			return err
		}
	case len(list) == 0:
		a.say("no failover is kept: no node was declared lost yet")
	default:
		out := &sections{paint: a.colour()}
		for i := range list {
			out.title(fmt.Sprintf("Failover %s of node %s: %s", list[i].Failover, list[i].Node, okText(list[i].OK)))
			out.table(findingTable(list[i].Findings))
		}
		if _, err := fmt.Fprint(a.Out, out.String()); err != nil {
			return err
		}
	}
	if broken > 0 {
		return fmt.Errorf("%d of %d failovers are not proved", broken, len(list))
	}
	return nil
}

func okText(ok bool) string {
	if ok {
		return "holds"
	}
	return "BROKEN"
}

func findingTable(findings []proof.Finding) *table {
	t := &table{head: []string{"RESULT", "RULE", "FOUND"}}
	for _, f := range findings {
		t.add(okText(f.OK), f.Rule, f.Detail)
	}
	return t
}

func (a *app) proof(ctx context.Context, id string) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	p, body, err := callProof(ctx, c, id)
	if err != nil {
		return err
	}
	if a.structured() {
		return a.printJSON(body)
	}
	f := &p.Failover
	if a.flags.output == "name" {
		fmt.Fprintln(a.Out, "failover/"+clean(f.Meta.ID))
		return nil
	}
	out := &sections{paint: a.colour()}
	now := time.Now()
	out.field("ID", f.Meta.ID)
	failoverShow(out, f, now)
	out.title("VMs")
	t := &table{head: []string{"VM", "PROJECT", "OUTCOME", "NODE", "EPOCH", "REVISION", "STATUS", "PLACED", "STARTED", "TOTAL", "MESSAGE"}}
	for i := range p.Moves {
		m := &p.Moves[i]
		ph := api.PhasesOf(f, m)
		t.add(m.Spec.VM, m.Meta.Project, string(m.Spec.Outcome), m.Spec.Node, fmt.Sprintf("%d→%d", m.Spec.FromEpoch, m.Spec.Epoch),
			strconv.FormatUint(m.Meta.Revision, 10), dash(string(m.Status.Phase)), millis(ph.Placement), millis(ph.Start), millis(ph.Total()), m.Status.Message)
	}
	out.table(t)
	v := proof.Check(p)
	out.title("Checked: " + okText(v.OK))
	out.table(findingTable(v.Findings))
	_, err = fmt.Fprint(a.Out, out.String())
	return err
}

// millis shows a time; a negative one is none.
func millis(ms int64) string {
	if ms < 0 {
		return "-"
	}
	return fmt.Sprintf("%d ms", ms)
}

func failoverRow(o *api.Failover, now time.Time) []string {
	back := "-"
	if o.Status.ReadmittedAt != nil {
		back = age(*o.Status.ReadmittedAt, now)
	}
	return []string{o.Meta.ID, age(o.Spec.At, now), o.Spec.Node, string(o.Spec.Cause), millis(o.Spec.SilentMillis), o.Spec.Leader, strconv.FormatUint(o.Spec.Term, 10), back}
}

func failoverShow(s *sections, o *api.Failover, now time.Time) {
	s.field("Node", o.Spec.Node)
	s.field("Guard", o.Spec.GuardLevel)
	s.field("Declared", moment(o.Spec.At, now))
	by := fmt.Sprintf("%s, leader of term %d", o.Spec.Leader, o.Spec.Term)
	if o.Spec.Leader == "" {
		by = o.Spec.Node + " itself"
	}
	s.field("By", fmt.Sprintf("%s, at revision %d", by, o.Meta.Revision))
	r := &o.Spec.Rules
	switch {
	case o.Spec.Cause == api.CausePower && o.Spec.Power != nil:
		s.field("Because", fmt.Sprintf("its host was switched off, and read back as off (muster node power log, action %s)", o.Spec.Power.Action))
		s.field("Fence", millis(o.Spec.Power.EndedAt.Sub(o.Spec.Power.BeganAt).Milliseconds()))
	case o.Spec.Cause == api.CauseDrill && o.Spec.Drill != nil:
		d := o.Spec.Drill
		s.field("Because", fmt.Sprintf("of a drill: the node's guard ended and reaped QEMU of vm %s, process %d, signal %d", d.VM, d.PID, d.Signal))
		return
	default:
		s.field("Because", fmt.Sprintf("it had no lease for %d ms: %d lease, %d per mille drift, %d to kill, %d margin", o.Spec.SilentMillis,
			r.LeaseMillis, r.DriftPerMille, r.KillMillis, r.MarginMillis))
	}
	s.field("Counted from", string(o.Spec.Since))
	if o.Status.ReadmittedAt != nil {
		s.field("Readmitted", fmt.Sprintf("%s, at revision %d", moment(*o.Status.ReadmittedAt, now), o.Meta.StatusRevision))
	} else {
		s.field("Readmitted", "not yet")
	}
	if o.Spec.Power == nil {
		return
	}
	s.title("Answers of the power device")
	s.table(powerSteps(o.Spec.Power.Steps))
}
