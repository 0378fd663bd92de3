// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// globals are the flags that every command has.
type globals struct {
	server, token, cacert string
	dataDir               string
	context, project      string
	output                string
	wide                  bool // -o wide, a table with more columns
	wait, noWait          bool
	quiet                 bool
	timeout               time.Duration
}

// outputs are the values of -o.
var outputs = []string{"table", "wide", "json", "yaml", "name"}

func (g *globals) bind(f *pflag.FlagSet) {
	f.StringVar(&g.server, "server", "", "servers, separated by commas: https://HOST:PORT, or unix:///PATH")
	f.StringVar(&g.token, "token", "", "token for the API")
	f.StringVar(&g.cacert, "cacert", "", "file with the CA certificate of the cluster (PEM)")
	f.StringVar(&g.dataDir, "data-dir", "", "talk to the daemon of this host through the socket in its data directory")
	f.StringVar(&g.context, "context", "", "context of the configuration file")
	f.StringVar(&g.project, "project", "", "project; * for all in lists (default \"default\")")
	f.StringVarP(&g.output, "output", "o", "table", "table, wide, json, yaml or name")
	f.BoolVar(&g.wait, "wait", true, "wait until the work is done")
	f.BoolVar(&g.noWait, "no-wait", false, "return when the cluster has taken the call")
	f.BoolVarP(&g.quiet, "quiet", "q", false, "no progress, no notices, no confirmations")
	f.DurationVar(&g.timeout, "timeout", 0, "give up after this time, such as 90s or 5m (default no limit; for the reconnects of vm console 60s)")
	f.SortFlags = false
}

// check finds wrong values before anything is sent.
func (g *globals) check(cmd *cobra.Command) error {
	if !slices.Contains(outputs, g.output) {
		wrong := g.output
		g.output = "table"
		return usagef("--output: %q is unknown; give %s", wrong, strings.Join(outputs, ", "))
	}
	if g.output == "wide" {
		g.output, g.wide = "table", true
	}
	if cmd.Flags().Changed("wait") && cmd.Flags().Changed("no-wait") && g.wait == g.noWait {
		return usagef("--wait and --no-wait contradict each other; give one")
	}
	if g.noWait {
		g.wait = false
	}
	if g.timeout < 0 {
		return usagef("--timeout: %s is negative; give a time such as 90s", g.timeout)
	}
	if g.server != "" && g.dataDir != "" {
		return usagef("--server and --data-dir contradict each other; give one")
	}
	return nil
}

// connection is where to go and with what.
type connection struct {
	servers []string
	token   string
	caCert  []byte
	project string
}

// connect returns the client of the command, made at first use.
func (a *app) connect() (*client.Client, error) {
	if a.client != nil {
		return a.client, nil
	}
	at, err := a.resolve()
	if err != nil {
		return nil, err
	}
	a.project = at.project
	c, err := client.New(client.Config{
		Servers: at.servers, Token: at.token, CACert: at.caCert,
		UserAgent: "muster/" + a.Version, Transport: a.transport(), RaceDelay: a.RaceDelay,
		Notify: func(m string) { a.notice("%s", m) }, NoQuorum: a.noQuorum,
	})
	if err != nil {
		return nil, err
	}
	a.client = c
	return c, nil
}

// resolve applies the order: flag, context named by flag, environment, context
// named by environment or chosen with "context use".
func (a *app) resolve() (connection, error) {
	g := &a.flags
	at := connection{project: g.project}
	if a.Shell != nil {
		at.servers = []string{a.Shell.Node}
		return at, nil
	}
	if g.dataDir != "" {
		at.servers = []string{client.SocketURL(g.dataDir)}
		return at, nil
	}
	ctx, named, err := a.chosenContext()
	if err != nil {
		return at, err
	}
	env := a.Getenv
	if named {
		// A context that was asked for by flag is taken as a whole: mixing its
		// servers with a token of the environment would send the token astray.
		env = func(string) string { return "" }
	}
	if at.project == "" {
		at.project = ctx.Project
	}
	at.token = first(g.token, env("MUSTER_TOKEN"), ctx.Token)
	if list := first(g.server, env("MUSTER_SERVER"), strings.Join(ctx.Servers, ",")); list != "" {
		if at.servers, err = client.ParseServers(list); err != nil {
			return at, err
		}
	} else {
		u := usagef("no server is known")
		u.hint = "give --server https://HOST:" + client.DefaultPort + ", set MUSTER_SERVER, or store one with: muster context set NAME --server ..."
		return at, u
	}
	if file := first(g.cacert, env("MUSTER_CACERT")); file != "" {
		if at.caCert, err = os.ReadFile(file); err != nil {
			return at, usagef("--cacert: %v", err)
		}
		return at, nil
	}
	at.caCert = []byte(ctx.CACert)
	return at, nil
}

// chosenContext returns the context in force; named says that the flag chose it.
func (a *app) chosenContext() (c contextEntry, named bool, err error) {
	name := first(a.flags.context, a.Getenv("MUSTER_CONTEXT"))
	named = a.flags.context != ""
	if name == "" && first(a.flags.server, a.Getenv("MUSTER_SERVER")) != "" && first(a.flags.token, a.Getenv("MUSTER_TOKEN")) != "" {
		return c, false, nil // nothing is asked of the file: it need not be readable
	}
	file, err := a.loadContexts()
	if err != nil {
		return c, named, err
	}
	if name == "" {
		name = file.Current
	}
	if name == "" {
		return c, named, nil
	}
	c, ok := file.find(name)
	if !ok {
		return c, named, usagef("context %q does not exist in %s; see muster context ls", name, a.contextPath())
	}
	return c, named, nil
}

func first(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}

// metaFor returns the metadata of a new object that the user named.
func (a *app) metaFor(kind api.Kind, name string, labels map[string]any) (map[string]any, error) {
	if err := api.ValidName("meta.name", name); err != nil {
		return nil, err
	}
	m := map[string]any{"name": name}
	if a.project == "*" {
		return nil, usagef("--project: * is for lists; name one project")
	}
	if a.project != "" && client.Scoped(kind) {
		m["project"] = a.project
	}
	if len(labels) > 0 {
		m["labels"] = labels
	}
	return m, nil
}

// parseLabels reads k=v; "k-" removes a label where that is allowed.
func parseLabels(list []string, removable bool) (map[string]any, error) {
	out := map[string]any{}
	for _, l := range list {
		k, v, ok := strings.Cut(l, "=")
		if !ok {
			if name, cut := strings.CutSuffix(l, "-"); cut && removable && name != "" {
				out[name] = nil
				continue
			}
			return nil, usagef("--label: %q is not KEY=VALUE", l)
		}
		if k == "" {
			return nil, usagef("--label: %q has no key", l)
		}
		out[k] = v
	}
	return out, nil
}

// sizeFlag reads a size such as 512M from the command line.
type sizeFlag struct{ n *api.Size }

func (s sizeFlag) String() string {
	if s.n == nil || *s.n == 0 {
		return ""
	}
	return fmt.Sprint(*s.n)
}

func (s sizeFlag) Set(v string) error {
	n, err := api.ParseSize(v)
	if err == nil && n <= 0 {
		err = fmt.Errorf("%q is not above zero", v)
	}
	*s.n = n
	return err
}

func (sizeFlag) Type() string { return "size" }

// sizesFlag is a size that may be given several times.
type sizesFlag struct{ list *[]api.Size }

func (s sizesFlag) String() string { return "" }

func (s sizesFlag) Set(v string) error {
	var n api.Size
	if err := (sizeFlag{&n}).Set(v); err != nil {
		return err
	}
	*s.list = append(*s.list, n)
	return nil
}

func (sizesFlag) Type() string { return "size" }
