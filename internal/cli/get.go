// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

func (a *app) getCmd() *cobra.Command {
	var o client.ListOptions
	cmd := &cobra.Command{
		Use: "get KIND [NAME]", Short: "List objects of a kind, or show one", Args: between(1, 2, "KIND", "NAME"),
		Example: `  muster get vms
  muster get vm web1 -o yaml
  muster get cluster`,
		ValidArgsFunction: a.completeKindName,
		RunE: func(cmd *cobra.Command, words []string) error {
			if words[0] == string(api.KindCluster) && len(words) == 1 {
				return a.clusterStatus(cmd.Context())
			}
			k, err := viewOf(words[0])
			if err != nil {
				return err
			}
			if len(words) == 2 {
				return a.show(cmd.Context(), k, words[1])
			}
			return a.list(cmd.Context(), k, o)
		},
	}
	listFlags(cmd, &o)
	return cmd
}

// versionDeadline is how long "version" waits for a server, and completion for
// names.
const versionDeadline = 2 * time.Second

// soon is versionDeadline, unless a test has more time.
func (a *app) soon() time.Duration { return cmp.Or(a.Soon, versionDeadline) }

func (a *app) versionCmd() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version of this program and of the node that answers", Args: args(),
		Example: "  muster version\n  muster version -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := map[string]string{"client": a.Version, "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH}
			node, server, err := a.serverVersion(cmd.Context())
			if err != nil {
				v["serverError"] = err.Error()
			} else {
				v["server"], v["node"] = server, node
			}
			if a.structured() {
				return a.printValue(v)
			}
			fmt.Fprintf(a.Out, "client: muster %s (%s, %s)\n", v["client"], v["go"], v["platform"])
			if err != nil {
				fmt.Fprintf(a.Out, "server: not known: %s\n", clean(err.Error()))
				return nil
			}
			fmt.Fprintf(a.Out, "server: muster %s (node %s)\n", clean(dash(server)), clean(node))
			return nil
		},
	}
}

// serverVersion asks the node that answers for its own version.
func (a *app) serverVersion(ctx context.Context) (node, version string, err error) {
	ctx, cancel := context.WithTimeout(ctx, a.soon())
	defer cancel()
	c, err := a.connect()
	if err != nil {
		return "", "", err
	}
	var s api.ClusterStatus
	if _, err := c.Call(ctx, http.MethodGet, "/cluster", nil, &s); err != nil {
		return "", "", err
	}
	raw, _, err := c.Get(ctx, api.KindNode, "", s.Node)
	if err != nil {
		return "", "", err
	}
	n, err := client.As[api.NodeSpec, api.NodeStatus](raw)
	return s.Node, n.Status.Version, err
}

func (a *app) watchCmd() *cobra.Command {
	var since uint64
	cmd := &cobra.Command{
		Use: "watch [KIND...]", Short: "Print a line for every change", Args: cobra.ArbitraryArgs,
		Long: `Prints the objects that are there and then a line for every change, until it is
interrupted. With -o json each line is one event. When the node that serves it
fails, it goes on at another without losing a change.`,
		Example:           "  muster watch vm\n  muster watch vm node -o json",
		ValidArgsFunction: a.completeKinds,
		RunE: func(cmd *cobra.Command, words []string) error {
			o := client.WatchOptions{Since: since, MaxOutage: maxOutage}
			for _, w := range words {
				k, err := viewOf(w)
				if err != nil {
					return err
				}
				o.Kinds = append(o.Kinds, k.kind)
			}
			return a.watch(cmd.Context(), o)
		},
	}
	cmd.Flags().Uint64Var(&since, "since", 0, "begin after this revision instead of with all objects")
	return cmd
}

func (a *app) watch(ctx context.Context, o client.WatchOptions) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	names := map[string]string{} // delete events carry only the ID
	err = c.Watch(ctx, o, func(e client.Event) error { return a.printEvent(e, names) })
	if ctx.Err() != nil {
		return nil // a watch has no other end than being told to stop
	}
	return err
}

func (a *app) printEvent(e client.Event, names map[string]string) error {
	if !a.wantsEvent(e, names) {
		return nil
	}
	if e.Type == client.EventDelete {
		defer delete(names, e.ID)
	}
	switch a.flags.output {
	case "json":
		var line bytes.Buffer
		if err := json.Compact(&line, e.Raw); err != nil {
			return fmt.Errorf("print event: %w", err)
		}
		line.WriteByte('\n')
		_, err := a.Out.Write(line.Bytes())
		return err
	case "yaml":
		fmt.Fprintln(a.Out, "---")
		return a.printJSON(e.Raw)
	}
	if e.Type == client.EventRelist {
		clear(names)
		a.notice("changes were missed; all objects follow anew")
		return nil
	}
	if e.Type != client.EventPut && e.Type != client.EventDelete {
		return nil
	}
	name, detail := first(names[e.ID], e.ID), ""
	if e.Type == client.EventPut {
		m := client.MetaOf(e.Object)
		name, detail = first(m.Name, m.ID), a.eventDetail(e)
	}
	if a.flags.output == "name" {
		fmt.Fprintf(a.Out, "%s/%s\n", e.Kind, clean(name))
		return nil
	}
	event := e.Type
	if a.colour() {
		event = painted("EVENT", event)
	}
	_, err := fmt.Fprintln(a.Out, strings.TrimRight(fmt.Sprintf("%-8d %-6s %-6s %-20s %s", e.Revision, event, e.Kind, clean(name), clean(detail)), " "))
	return err
}

// wantsEvent notes the names of objects and applies --project, which the
// stream itself does not know: an object of which nothing was shown is not
// reported as deleted.
func (a *app) wantsEvent(e client.Event, names map[string]string) bool {
	all := a.project == "" || a.project == "*" || !client.Scoped(e.Kind)
	switch e.Type {
	case client.EventPut:
		m := client.MetaOf(e.Object)
		if !all && m.Project != a.project {
			return false
		}
		names[m.ID] = first(m.Name, m.ID)
	case client.EventDelete:
		_, known := names[e.ID]
		return all || known
	}
	return true
}

// eventDetail is the state of the object in short.
func (a *app) eventDetail(e client.Event) string {
	var o struct {
		Meta   api.Meta `json:"meta"`
		Status struct {
			Phase    string `json:"phase"`
			Node     string `json:"node"`
			Progress int    `json:"progress"`
			Message  string `json:"message"`
		} `json:"status"`
	}
	if err := json.Unmarshal(e.Object, &o); err != nil {
		return ""
	}
	parts := []string{status(&o.Meta, o.Status.Phase)}
	if e.Kind == api.KindTask {
		if t, err := client.As[api.TaskSpec, api.TaskStatus](e.Object); err == nil {
			parts = append(parts, string(t.Spec.Action), taskTarget(&t), fmt.Sprintf("%d%%", o.Status.Progress))
		}
	}
	if o.Status.Node != "" {
		parts = append(parts, "on "+o.Status.Node)
	}
	if o.Status.Message != "" {
		parts = append(parts, "("+o.Status.Message+")")
	}
	return strings.Join(parts, " ")
}
