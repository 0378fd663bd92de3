// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"fmt"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// defaultDataDir is where the daemon keeps its data when told nothing else.
const defaultDataDir = "/var/lib/muster"

func (a *app) clusterCmd() *cobra.Command {
	status := &cobra.Command{
		Use: "status", Short: "Show the members, the leader and whether there is a quorum", Args: args(),
		Long:    "Shows the members, the leader and whether there is a quorum. GOSSIP is what the\nnode that answers heard of the others: alive, suspect, dead, left or unknown. It\nis a hint, which decides nothing. With -o wide their load too, the version of their\nsoftware and the feature levels that it supports.",
		Example: "  muster cluster status\n  muster cluster status -o wide",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.clusterStatus(cmd.Context()) },
	}
	var name string
	initialise := &cobra.Command{
		Use: "init", Short: "Found a cluster with the daemon of this host", Args: args(),
		Long: "Founds a cluster with the daemon of this host as its first node, and prints the\nadministrator's token once. Runs on the host itself, through the socket in the\ndata directory (default " + defaultDataDir + ").",
		Example: `  muster cluster init --name prod --data-dir /var/lib/muster
  muster cluster init --name prod -o json`,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.clusterInit(cmd.Context(), name) },
	}
	initialise.Flags().StringVar(&name, "name", "", "name of the cluster (default \"muster\")")
	join := &cobra.Command{
		Use: "join TOKEN", Short: "Let the daemon of this host join a cluster", Args: args("TOKEN"),
		Long:              "Joins the cluster that made TOKEN (muster cluster token create). Runs on the\nhost itself, through the socket in the data directory (default " + defaultDataDir + ").\nA node that was off while the cluster replaced its certificate authority comes\nback with it, and keeps all it has.",
		Example:           "  muster cluster join TOKEN --data-dir /var/lib/muster",
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(cmd *cobra.Command, tokens []string) error { return a.clusterJoin(cmd.Context(), tokens[0]) },
	}
	transfer := &cobra.Command{
		Use: "transfer [NODE]", Short: "Let another node lead the configuration database", Args: between(0, 1, "NODE"),
		Long:              "Hands the leadership of the configuration database to NODE, which must have a\nvote, or to the voter that suits best. Guests do not notice.",
		Example:           "  muster cluster transfer m2\n  muster cluster transfer",
		ValidArgsFunction: a.completeNames(api.KindNode),
		RunE: func(cmd *cobra.Command, names []string) error {
			return a.clusterTransfer(cmd.Context(), append(names, "")[0])
		},
	}
	return group("cluster", "The cluster as a whole", initialise, join, status, transfer, a.caCmd(), a.clusterSet(), a.backupCmd(), a.restoreCmd(), a.recoverCmd(), a.clusterReboot(),
		group("token", "Tokens that let nodes join", a.joinTokenCmd()))
}

// local connects to the daemon of this host.
func (a *app) local() (*client.Client, error) {
	if a.flags.server != "" && !strings.HasPrefix(a.flags.server, "unix://") {
		u := usagef("--server: a host is added to a cluster on the host itself")
		u.hint = "run this on the host with --data-dir DIR"
		return nil, u
	}
	if a.flags.server == "" && a.flags.dataDir == "" {
		a.flags.dataDir = defaultDataDir
	}
	return a.connect()
}

// caFile is where the daemon puts the CA certificate.
func (a *app) caFile() string { return filepath.Join(first(a.flags.dataDir, defaultDataDir), "ca.crt") }

func (a *app) clusterInit(ctx context.Context, name string) error {
	if name != "" {
		if err := api.ValidName("name", name); err != nil {
			return err
		}
	}
	c, err := a.local()
	if err != nil {
		return err
	}
	var r api.InitResult
	if _, err := c.Call(ctx, http.MethodPost, "/cluster/init", api.InitRequest{Name: name}, &r); err != nil {
		return err
	}
	switch {
	case a.structured():
		return a.printValue(r)
	case a.flags.output == "name":
		fmt.Fprintln(a.Out, "cluster/"+clean(r.Cluster))
		return nil
	}
	a.say("cluster %s founded, first node %s at %s", r.Cluster, r.Node, r.Address)
	fmt.Fprintf(a.Out, "token: %s\n", clean(r.Token)) // also with --quiet: it is shown once
	fmt.Fprintf(a.Out, "ca certificate: %s\n", a.caFile())
	a.notice("the token is shown only once; keep it. To use it:")
	a.notice("  export MUSTER_SERVER=https://%s MUSTER_TOKEN=... MUSTER_CACERT=%s", r.Address, a.caFile())
	a.notice("one node survives no failure; let others join (muster cluster token create): three of them, or two and a witness,")
	a.notice("since two have no majority without each other (muster cluster token create --role witness)")
	return nil
}

func (a *app) clusterTransfer(ctx context.Context, node string) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	var r api.TransferResult
	if _, err := c.Call(ctx, http.MethodPost, "/cluster/transfer", api.TransferRequest{Node: node}, &r); err != nil {
		return err
	}
	if a.structured() {
		return a.printValue(r)
	}
	if a.flags.output == "name" {
		fmt.Fprintln(a.Out, "node/"+clean(r.Leader))
		return nil
	}
	a.say("node %s leads, in term %d", r.Leader, r.Term)
	return nil
}

func (a *app) clusterJoin(ctx context.Context, token string) error {
	c, err := a.local()
	if err != nil {
		return err
	}
	var r api.JoinResult
	if _, err := c.Call(ctx, http.MethodPost, "/cluster/join", api.JoinRequest{Token: token}, &r); err != nil {
		return err
	}
	switch {
	case a.structured():
		return a.printValue(r)
	case a.flags.output == "name":
		fmt.Fprintln(a.Out, "node/"+clean(r.Node))
		return nil
	}
	a.say("node %s at %s joined cluster %s", r.Node, r.Address, r.Cluster)
	a.say("ca certificate: %s", a.caFile())
	a.twoAlone(ctx, c)
	return nil
}

// twoAlone says after a join what two nodes without a witness lack. It is advice: if
// the new node cannot tell yet, nothing is said, and muster ha status has it.
func (a *app) twoAlone(ctx context.Context, c *client.Client) {
	var s api.ClusterStatus
	if _, err := c.Call(ctx, http.MethodGet, "/cluster", nil, &s); err != nil || len(s.Members) != 2 {
		return
	}
	for _, m := range s.Members {
		if m.Role == api.RoleWitness {
			return
		}
	}
	a.notice("two nodes have no majority without each other: if either dies, nothing restarts. Add a third, or a witness, which votes and runs no VM:")
	a.notice("  muster cluster token create --role witness    # then, on a small third host: muster cluster join TOKEN")
	a.notice("muster ha status shows what the loss of each node would mean")
}

// The shortest and the longest life of a join token.
const minJoinTTL, maxJoinTTL = time.Minute, 168 * time.Hour

func (a *app) joinTokenCmd() *cobra.Command {
	var role string
	var ttl time.Duration
	cmd := &cobra.Command{
		Use: "create", Short: "Make a token that lets one node join", Args: args(),
		Long:    "Makes a token that lets one node join, and prints it. It works once and expires.",
		Example: "  muster cluster token create\n  muster cluster token create --role witness --ttl 15m",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if ttl%time.Second != 0 || ttl < minJoinTTL || ttl > maxJoinTTL {
				return usagef("--ttl: is %s; give whole seconds, 1m to 168h", ttl)
			}
			c, err := a.connect()
			if err != nil {
				return err
			}
			var t api.JoinToken
			body := api.JoinTokenRequest{Role: api.NodeRole(role), TTLSeconds: int(ttl / time.Second)}
			if _, err := c.Call(cmd.Context(), http.MethodPost, "/cluster/tokens", body, &t); err != nil {
				return err
			}
			if a.structured() {
				return a.printValue(t)
			}
			fmt.Fprintln(a.Out, clean(t.Token))
			a.notice("works once, expires %s; on the new host: muster cluster join TOKEN", until(t.ExpiresAt, a.Now()))
			return nil
		},
	}
	cmd.Flags().StringVar(&role, "role", string(api.RoleVoter), "voter (votes when needed), witness (votes but runs no VM) or replica (never votes)")
	cmd.Flags().DurationVar(&ttl, "ttl", time.Hour, "time until it expires, 1m to 168h")
	return cmd
}

// levelText says what the feature level is and why it is not higher.
func levelText(l *api.FeatureLevelStatus) string {
	if l == nil {
		return ""
	}
	text := strconv.Itoa(l.Level)
	if l.Hold && l.Highest == l.Level {
		return text + ", held"
	}
	if len(l.Waits) > 0 {
		text += fmt.Sprintf("; %d waits for %s", l.Level+1, strings.Join(l.Waits, ", "))
	}
	return text
}

func levelsText(l *api.FeatureLevels) string {
	if l == nil {
		return "-"
	}
	return l.String()
}

func (a *app) clusterStatus(ctx context.Context) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	var s api.ClusterStatus
	reply, err := c.Call(ctx, http.MethodGet, "/cluster", nil, &s)
	if err != nil {
		return err
	}
	switch {
	case a.structured():
		return a.printJSON(reply.Body)
	case a.flags.output == "name":
		fmt.Fprintln(a.Out, "cluster/"+clean(s.Cluster))
		return nil
	}
	out := &sections{paint: a.colour()}
	out.field("Cluster", s.Cluster)
	out.field("ID", s.ClusterID)
	if s.Life > 1 {
		out.field("Life", fmt.Sprintf("%d: recovered from lost quorum", s.Life))
	}
	quorum := "yes"
	if !s.Quorum {
		quorum = fmt.Sprintf("no: no writes; this copy is %s old", took(time.Duration(s.StaleSeconds*float64(time.Second))))
	}
	out.field("Quorum", quorum)
	out.field("Leader", first(s.Leader, "none known"))
	out.field("Term", strconv.FormatUint(s.Term, 10))
	out.field("Revision", strconv.FormatUint(s.Revision, 10))
	out.field("Feature level", levelText(s.FeatureLevel))
	if b := s.CPUBaseline; b != nil {
		out.field("CPU baseline", baselineText(b))
	}
	out.field("Answered by", s.Node)
	if s.CARotation != "" {
		out.field("CA rotation", string(s.CARotation)+"; see: muster cluster ca show")
	}
	lossSections(out, s.NoQuorum, a.Now())
	out.title("Members")
	t := &table{head: []string{"NAME", "STATUS", "ROLE", "VOTES", "LEADER", "GOSSIP", "CERTIFICATE", "ADDRESS"}}
	if a.flags.wide {
		t.head = append(append(t.head, loadColumns[1:]...), "VERSION", "LEVELS")
	}
	for _, m := range s.Members {
		ends := "-"
		if m.CertificateEnds != nil {
			ends = until(*m.CertificateEnds, a.Now())
		}
		row := []string{first(m.Node, m.NodeID), dash(string(m.Phase)), dash(string(m.Role)), yesNo(m.Voter), yesNo(m.Leader), heard(m.Gossip), ends, m.Address}
		if a.flags.wide {
			row = append(append(row, loadRow(m.Gossip)[1:]...), dash(m.Version), levelsText(m.FeatureLevels))
		}
		t.add(row...)
	}
	out.table(t)
	_, err = fmt.Fprint(a.Out, out.String())
	return err
}
