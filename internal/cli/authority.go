// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// caPath is the resource of the cluster's authority.
const caPath = "/cluster/ca"

func (a *app) caCmd() *cobra.Command {
	var pem bool
	show := &cobra.Command{
		Use: "show", Short: "Show the authority, the nodes' certificates and a rotation under way", Args: args(),
		Long: "Shows the certificate authority of the cluster, how far each node is with a\nrotation, and what happens next. With --pem prints what clients need as ca.crt:\none certificate, or two during a rotation.",
		Example: `  muster cluster ca show
  muster cluster ca show --pem > ca.crt`,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.caShow(cmd.Context(), pem) },
	}
	show.Flags().BoolVar(&pem, "pem", false, "print the certificates that clients must trust, as PEM")
	var life time.Duration
	set := &cobra.Command{
		Use: "set --certificate-life DURATION", Short: "Choose how long node certificates last", Args: args(),
		Long:    "Chooses how long node certificates last. Nodes renew them by themselves after two\nthirds of that; if it becomes shorter, at once.",
		Example: "  muster cluster ca set --certificate-life 720h",
		RunE: func(cmd *cobra.Command, _ []string) error {
			const shortest, longest = api.MinCertificateSeconds * time.Second, api.MaxCertificateSeconds * time.Second
			if life%time.Second != 0 || life < shortest || life > longest {
				return usagef("--certificate-life: is %s; give whole seconds, %s to %s", life, shortest, longest)
			}
			return a.caChange(cmd.Context(), http.MethodPatch, caPath, api.AuthoritySettings{CertificateSeconds: int(life / time.Second)})
		},
	}
	set.Flags().DurationVar(&life, "certificate-life", 0, "life of new node certificates, 1m to 19800h (default 2160h, 90 days)")
	return group("ca", "The certificate authority of the cluster", show, set, a.caRotate())
}

func (a *app) caRotate() *cobra.Command {
	var finish, abort, force bool
	cmd := &cobra.Command{
		Use: "rotate", Short: "Replace the authority while everything goes on", Args: args(),
		Long: `Makes a new certificate authority. All nodes learn to trust it, then it signs and
all nodes renew their certificates; both steps happen by themselves. Clients with
the old ca.crt keep working. When all nodes have renewed, give clients the new
file (muster cluster ca show --pem) and drop the old authority with --finish.
--abort goes back to the old one at any time before that.`,
		Example: `  muster cluster ca rotate
  muster cluster ca show
  muster cluster ca rotate --finish`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r := api.RotateRequest{Action: api.RotateStart, Force: force}
			switch {
			case finish && abort:
				return usagef("cluster ca rotate: give --finish or --abort, not both")
			case finish:
				r.Action = api.RotateFinish
			case abort:
				r.Action = api.RotateAbort
			}
			return a.caChange(cmd.Context(), http.MethodPost, caPath+"/rotate", r)
		},
	}
	cmd.Flags().BoolVar(&finish, "finish", false, "drop the old authority, when all nodes have renewed")
	cmd.Flags().BoolVar(&abort, "abort", false, "go back to the old authority")
	cmd.Flags().BoolVar(&force, "force", false, "finish although nodes have not renewed, which then need a join token to come back; or begin without a bridge")
	return cmd
}

func (a *app) caChange(ctx context.Context, method, path string, body any) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	var s api.AuthorityStatus
	reply, err := c.Call(ctx, method, path, body, &s)
	if err != nil {
		return err
	}
	return a.caPrint(&s, reply)
}

func (a *app) caShow(ctx context.Context, pem bool) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	var s api.AuthorityStatus
	reply, err := c.Call(ctx, http.MethodGet, caPath, nil, &s)
	if err != nil {
		return err
	}
	if !pem {
		return a.caPrint(&s, reply)
	}
	for _, ca := range s.Authorities {
		fmt.Fprint(a.Out, ca.Cert)
	}
	return nil
}

func (a *app) caPrint(s *api.AuthorityStatus, reply *client.Reply) error {
	switch {
	case a.structured():
		return a.printJSON(reply.Body)
	case a.flags.output == "name":
		fmt.Fprintln(a.Out, "cluster/"+clean(s.Cluster))
		return nil
	}
	now := a.Now()
	out := &sections{paint: a.colour()}
	out.field("Cluster", s.Cluster)
	out.field("Certificates", "last "+lasting(time.Duration(s.CertificateSeconds)*time.Second))
	if s.Phase != "" {
		out.field("Rotation", string(s.Phase)+", begun by "+s.Actor)
		if s.StartedAt != nil {
			out.field("Since", moment(*s.StartedAt, now))
		}
		out.field("Next", s.Next)
	}
	out.title("Authorities")
	t := &table{head: []string{"FINGERPRINT", "SIGNS", "ENDS"}}
	for _, ca := range s.Authorities {
		t.add(short(ca.Fingerprint), yesNo(ca.Signs), until(ca.NotAfter, now))
	}
	out.table(t)
	out.title("Nodes")
	head := []string{"NODE", "STATUS", "ENDS", "RENEWS", "SIGNED-BY", "TRUSTS", "MESSAGE"}
	if s.Phase != "" {
		head = append([]string{"NODE", "DONE"}, head[1:]...)
	}
	t = &table{head: head}
	for _, n := range s.Nodes {
		row := []string{n.Node, dash(string(n.Phase)), "-", "-", "-", "-", ""}
		if cert := n.Certificate; cert != nil {
			trusts := ""
			for i, f := range cert.Trusts {
				if i > 0 {
					trusts += ","
				}
				trusts += short(f)
			}
			row = []string{n.Node, dash(string(n.Phase)), until(cert.NotAfter, now), until(cert.RenewsAt, now), dash(short(cert.Signer)), dash(trusts), cert.Message}
		}
		if s.Phase != "" {
			row = append([]string{n.Node, yesNo(n.Done)}, row[1:]...)
		}
		t.add(row...)
	}
	out.table(t)
	_, err := fmt.Fprint(a.Out, out.String())
	return err
}

// short is the beginning of a fingerprint, enough to tell two apart.
func short(fingerprint string) string { return fingerprint[:min(len(fingerprint), 12)] }

// lasting is a duration in days if it is one.
func lasting(d time.Duration) string {
	const day = 24 * time.Hour
	if d >= 2*day && d%day == 0 {
		return fmt.Sprintf("%d days", d/day)
	}
	return d.String()
}

// How long renew-certificate waits, and how often it looks.
const (
	renewWait  = time.Minute
	renewCheck = 250 * time.Millisecond
)

func (a *app) nodeRenew() *cobra.Command {
	return &cobra.Command{
		Use: "renew-certificate NODE...", Short: "Make nodes renew their certificates now", Args: atLeastOne("NODE"),
		Long:              "Makes nodes renew their certificates now, each with a fresh key. They do so by\nthemselves after two thirds of the life; this is for a key that may be known.",
		Example:           "  muster node renew-certificate m1",
		ValidArgsFunction: a.completeNames(api.KindNode),
		RunE: func(cmd *cobra.Command, names []string) error {
			return a.each(names, func(c *client.Client, name string) error { return a.renewCertificate(cmd.Context(), c, name) })
		},
	}
}

func (a *app) renewCertificate(ctx context.Context, c *client.Client, name string) error {
	var before api.Node
	reply, err := c.Call(ctx, http.MethodPost, "/nodes/"+url.PathEscape(name)+"/renew-certificate", nil, &before)
	if err != nil {
		return err
	}
	k := mustView(api.KindNode)
	if !a.flags.wait {
		return a.finished(k, name, "renews its certificate", reply.Body, "", 0)
	}
	began := a.Now()
	for {
		raw, _, err := c.Get(ctx, api.KindNode, a.project, name)
		if err != nil {
			return err
		}
		n, err := client.As[api.NodeSpec, api.NodeStatus](raw)
		if err != nil {
			return err
		}
		message := "it has not reported anything"
		if cert := n.Status.Certificate; cert != nil {
			if before.Status.Certificate == nil || cert.Serial != before.Status.Certificate.Serial {
				return a.finished(k, name, "has a new certificate, which ends "+until(cert.NotAfter, a.Now()), raw, "", 0)
			}
			message = first(cert.Message, "its status is "+string(n.Status.Phase))
		}
		if a.Now().Sub(began) > renewWait {
			return api.Errorf(api.CodeTimeout, "node %s has not renewed its certificate within %s (%s); it goes on trying", name, renewWait, message)
		}
		select {
		case <-time.After(renewCheck):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// showCertificate is the part of a node that is about its certificate.
func showCertificate(s *sections, cert *api.CertificateStatus, now time.Time) {
	if cert == nil {
		return
	}
	s.title("Certificate")
	s.field("Ends", cert.NotAfter.UTC().Format(time.RFC3339)+" ("+until(cert.NotAfter, now)+")")
	s.field("Renews", until(cert.RenewsAt, now))
	s.field("Serial", cert.Serial)
	s.field("Signed by", short(cert.Signer))
	s.field("Message", cert.Message)
}
