// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// switchedOffFlag is the word of an administrator, for scripts.
const switchedOffFlag = "yes-i-have-switched-off"

// Waiting for a daemon that carries out a recovery.
const (
	recoveryWait = 2 * time.Minute
	recoveryPoll = 500 * time.Millisecond
)

func (a *app) restoreCmd() *cobra.Command {
	var k keyFlags
	var r api.RestoreRequest
	cmd := &cobra.Command{
		Use: "restore FILE", Short: "Found a new cluster from a backup", Args: args("FILE"),
		Long: `Founds a new cluster from a backup, with the daemon of this host as its first node,
and prints the administrator's token once. Runs on the host itself, through the
socket in the data directory (default ` + defaultDataDir + `); the daemon must belong
to no cluster. Needs the cluster key of the old cluster, or the pass phrase if the
backup was made with one.

The new cluster has its own identity and authority: nothing of the old one can
connect, and other hosts join with new tokens. The old nodes are shown as lost and
their VMs as unknown, because they may still run there. When a host is switched off
for good, say so with muster node remove NODE --force, or here with
--yes-i-have-switched-off. With the word about the last host that could run them, as
the old cluster may have moved them, all VMs are bound to a node of this one, stopped.`,
		Example: `  muster cluster restore prod.backup --cluster-key-file /safe/cluster.key --data-dir /var/lib/muster
  muster cluster restore prod.backup --passphrase-file phrase.txt --yes-i-have-switched-off m1,m2,m3`,
		RunE: func(cmd *cobra.Command, files []string) (err error) {
			if r.ClusterKey, err = a.clusterKeyFile(k.clusterKey); err != nil {
				return err
			}
			if r.Passphrase, err = a.secretFile(k.passphrase); err != nil {
				return err
			}
			if r.ClusterKey != nil && r.Passphrase != "" {
				return usagef("cluster restore: give either --cluster-key-file or --passphrase-file")
			}
			if r.File, err = filepath.Abs(files[0]); err != nil {
				return usagef("FILE: %v", err)
			}
			return a.clusterRestore(cmd.Context(), r)
		},
	}
	k.bind(cmd)
	cmd.Flags().StringVar(&r.Name, "name", "", "name of the new cluster (default: that of the old one)")
	cmd.Flags().StringSliceVar(&r.SwitchedOff, switchedOffFlag, nil, "nodes of the old cluster whose hosts are switched off for good, separated by commas")
	cmd.Flags().BoolVar(&r.KeepTokens, "keep-tokens", false, "keep the API tokens of the backup, also those that were deleted since")
	return cmd
}

func (a *app) clusterRestore(ctx context.Context, r api.RestoreRequest) error {
	if r.Name != "" {
		if err := api.ValidName("name", r.Name); err != nil {
			return err
		}
	}
	c, err := a.local()
	if err != nil {
		return err
	}
	var out api.RestoreResult
	if _, err := c.Call(ctx, http.MethodPost, "/cluster/restore", r, &out); err != nil {
		return err
	}
	switch {
	case a.structured():
		return a.printValue(out)
	case a.flags.output == "name":
		fmt.Fprintln(a.Out, "cluster/"+clean(out.Cluster))
		return nil
	}
	a.say("cluster %s founded from a backup of %s (revision %d), first node %s at %s", out.Cluster, out.From.Time.Format(time.RFC3339), out.From.Revision, out.Node, out.Address)
	fmt.Fprintf(a.Out, "token: %s\n", clean(out.Token)) // also with --quiet: it is shown once
	fmt.Fprintf(a.Out, "ca certificate: %s\n", a.caFile())
	a.notice("the token is shown only once; keep it. The tokens and the CA certificate of the old cluster are not those of this one")
	if out.TakenOver > 0 {
		a.notice("%d VMs of hosts that are switched off are bound to node %s, stopped; start each when its disks are there", out.TakenOver, out.Node)
	}
	for _, node := range slices.Sorted(maps.Keys(out.Waiting)) {
		a.notice("%d VMs may still run on %s; when that host is switched off for good: muster node remove %s --force", out.Waiting[node], node, node)
	}
	return nil
}

func (a *app) recoverCmd() *cobra.Command {
	var off []string
	cmd := &cobra.Command{
		Use: "recover", Short: "Go on with one node after the majority is lost for good", Args: args(),
		Long: `When the majority of the voters is lost for good, makes the node of this host the
only member of its cluster, which then begins a new life. Runs on the host itself,
through the socket in the data directory (default ` + defaultDataDir + `). First it
shows what is left and refuses if there is a quorum, if another member still answers,
or if one of them has a newer log. Then it asks for the cluster's name.

What was acknowledged after this node's log ends is lost. All other nodes must be
switched off: their VMs are bound to this node, stopped. Afterwards, clear each other
host with musterd forget, which keeps the disks, and let it join again.`,
		Example: `  muster cluster recover --data-dir /var/lib/muster
  muster cluster recover --yes-i-have-switched-off m2,m3`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.clusterRecover(cmd.Context(), off, cmd.Flags().Changed(switchedOffFlag))
		},
	}
	cmd.Flags().StringSliceVar(&off, switchedOffFlag, nil, "every other node, separated by commas: says in a script what is asked otherwise")
	return cmd
}

func (a *app) clusterRecover(ctx context.Context, off []string, said bool) error {
	c, err := a.local()
	if err != nil {
		return err
	}
	var p api.RecoveryPlan
	reply, err := c.Call(ctx, http.MethodGet, "/cluster/recover", nil, &p)
	if err != nil {
		return err
	}
	if a.structured() {
		err = a.printJSON(reply.Body)
	} else {
		err = a.printPlan(&p)
	}
	if err != nil {
		return err
	}
	if p.Refused != "" {
		return api.Errorf(api.CodeRefused, "cluster %s is not recovered from node %s: %s", p.Cluster, p.Node, p.Refused)
	}
	if !said {
		if off, err = a.askForWord(&p); err != nil {
			return err
		}
	}
	var r api.RecoveryResult
	if _, err := c.Call(ctx, http.MethodPost, "/cluster/recover", api.RecoveryRequest{Cluster: p.Cluster, SwitchedOff: off}, &r); err != nil {
		return err
	}
	if a.flags.wait {
		if err := a.awaitLife(ctx, c, r.Life); err != nil {
			return err
		}
	}
	a.reportRecovery(&r)
	return nil
}

// printPlan shows what is left of a cluster.
func (a *app) printPlan(p *api.RecoveryPlan) error {
	now := a.Now()
	out := &sections{paint: a.colour()}
	out.field("Cluster", fmt.Sprintf("%s, life %d", p.Cluster, p.Life))
	out.field("This node", p.Node)
	out.field("Log ends at", fmt.Sprintf("index %d in term %d; applied up to revision %d", p.LastIndex, p.LastTerm, p.Revision))
	out.field("Newest change", first(moment(p.WrittenAt, now), "not known"))
	heard := "not since its daemon was started, " + moment(p.StartedAt, now)
	if p.LeaderHeardAt != nil {
		heard = moment(*p.LeaderHeardAt, now)
	}
	out.field("Leader heard", heard)
	out.title("Other members")
	t := &table{head: []string{"NAME", "ROLE", "VOTES", "STATUS", "ANSWERS", "LAST SEEN", "LOG ENDS AT", "VMS"}}
	for _, o := range p.Others {
		seen, log := "not in "+age(p.StartedAt, now), "-"
		if o.LastSeen != nil {
			seen = moment(*o.LastSeen, now)
		}
		if o.Answers {
			log = fmt.Sprintf("%d in term %d", o.LastIndex, o.LastTerm)
		}
		t.add(o.Node, dash(string(o.Role)), yesNo(o.Voter), dash(string(o.Phase)), yesNo(o.Answers), seen, log, strconv.Itoa(o.VMs))
	}
	out.table(t)
	_, err := fmt.Fprint(a.Out, out.String())
	return err
}

// askForWord warns, and takes the name of the cluster for the administrator's
// word about every other node.
func (a *app) askForWord(p *api.RecoveryPlan) ([]string, error) {
	var names []string
	vms := 0
	for _, o := range p.Others {
		names = append(names, o.Node)
		vms += o.VMs
	}
	if !a.InTTY {
		return nil, &hintedError{
			api.Errorf(api.CodeRefused, "a recovery needs a person's word"),
			fmt.Sprintf("run it at a terminal; or, when all other hosts are switched off, say so: --%s %s", switchedOffFlag, strings.Join(names, ",")),
		}
	}
	w := bufio.NewWriter(a.Err)
	fmt.Fprintf(w, "\nThe cluster goes on with node %s alone, in its life %d.\n", clean(p.Node), p.Life+1)
	fmt.Fprintf(w, "- What was acknowledged after this node's log ends is lost for good. If another survivor may have a newer log, recover from that one.\n")
	fmt.Fprintf(w, "- %s must be switched off, all of them, and stay off until they are cleared with musterd forget.\n", clean(strings.Join(names, ", ")))
	fmt.Fprintf(w, "- %d VMs of those nodes are bound to this node, stopped. If one still runs there and is started here, its data is destroyed.\n\n", vms)
	fmt.Fprintf(w, "Are all these hosts switched off? Type the name of the cluster, %s, to go on: ", clean(p.Cluster))
	if err := w.Flush(); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(io.LimitReader(a.In, maxSecretFile)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if strings.TrimSpace(line) != p.Cluster {
		return nil, api.Errorf(api.CodeRefused, "not confirmed; nothing was changed")
	}
	return names, nil
}

// awaitLife waits until the daemon, which begins anew, leads the next life.
func (a *app) awaitLife(ctx context.Context, c *client.Client, life uint64) error {
	ctx, cancel := context.WithTimeout(ctx, recoveryWait)
	defer cancel()
	tick := time.NewTicker(recoveryPoll)
	defer tick.Stop()
	for {
		var s api.ClusterStatus
		_, err := c.Call(ctx, http.MethodGet, "/cluster", nil, &s)
		if err == nil && s.Life >= life && s.Leader == s.Node {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return errors.Join(api.Errorf(client.CodeUnavailable, "the recovery was begun, but the daemon did not come back within %s; its log says why, and starting it again goes on with the recovery", recoveryWait), err)
		}
	}
}

func (a *app) reportRecovery(r *api.RecoveryResult) {
	if a.structured() {
		return // the plan is the document
	}
	a.say("cluster %s goes on in its life %d with node %s alone", r.Cluster, r.Life, r.Node)
	if len(r.TakenOver) > 0 {
		a.say("taken over, stopped: %s", strings.Join(r.TakenOver, ", "))
	}
	a.notice("removed: %s; to take such a host in again, on it: musterd forget --cluster %s, start musterd, muster cluster join TOKEN", strings.Join(r.Removed, ", "), r.Cluster)
}
