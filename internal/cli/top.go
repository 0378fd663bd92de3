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
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
	"github.com/muster-vm/muster/internal/contain"
)

// Limits of top.
const (
	topEvery    = 2 * time.Second
	minTopEvery = 500 * time.Millisecond
	topDeadline = 3 * time.Second // for one node
	maxTopCalls = 8               // at a time
	// clearScreen moves the cursor home and clears what is below it.
	clearScreen = "\x1b[H\x1b[J"
)

func (a *app) topCmd() *cobra.Command {
	var once bool
	var every time.Duration
	cmd := &cobra.Command{
		Use: "top [nodes|vms]", Short: "Show what nodes or VMs use, live", Args: between(0, 1, "nodes|vms"),
		Long: `Shows the use of CPU and memory of all nodes, or of all VMs, and refreshes it until
it is interrupted. Once only with --once, when the output is no terminal, and
with -o json or yaml.`,
		Example:           "  muster top\n  muster top vms --once",
		ValidArgsFunction: cobra.FixedCompletions([]string{"nodes", "vms"}, cobra.ShellCompDirectiveNoFileComp),
		RunE: func(cmd *cobra.Command, words []string) error {
			what := "nodes"
			if len(words) == 1 {
				what = words[0]
			}
			if what != "nodes" && what != "vms" {
				return usagef("top: %q is unknown; give nodes or vms", what)
			}
			if every < minTopEvery {
				return usagef("--every: %s is too often; give at least %s", every, minTopEvery)
			}
			return a.top(cmd.Context(), what, once || !a.OutTTY || a.structured() || a.flags.output == "name", every)
		},
	}
	cmd.Flags().BoolVar(&once, "once", false, "print once and end")
	cmd.Flags().DurationVar(&every, "every", topEvery, "time between two looks")
	return cmd
}

func (a *app) top(ctx context.Context, what string, once bool, every time.Duration) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	for {
		all, failed, err := a.gather(ctx, c, what)
		if err != nil && (once || ctx.Err() == nil && exitCode(err) != ExitUnavailable) {
			return err
		}
		if once {
			return a.printTop(what, all, failed)
		}
		if ctx.Err() != nil {
			return nil
		}
		// Drawn at once, so that the screen does not flicker.
		var b bytes.Buffer
		screen := *a
		screen.Out = &b
		if err == nil {
			err = screen.printTop(what, all, failed)
		}
		if err != nil {
			fmt.Fprintln(&b, clean(err.Error()))
		}
		if _, err := fmt.Fprint(a.Out, clearScreen+b.String()); err != nil {
			return err
		}
		if sleep(ctx, every) != nil {
			return nil
		}
	}
}

// gather asks every node for what it measured. A node that does not answer is
// named in failed.
func (a *app) gather(ctx context.Context, c *client.Client, what string) (all []api.Metrics, failed map[string]string, err error) {
	nodes, err := c.List(ctx, api.KindNode, client.ListOptions{})
	if err != nil {
		return nil, nil, err
	}
	name := "muster_node_*"
	if what == "vms" {
		name = "muster_vm_*"
	}
	failed = map[string]string{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	places := make(chan struct{}, maxTopCalls)
	for _, raw := range nodes.Items {
		n, err := client.As[api.NodeSpec, api.NodeStatus](raw)
		if err != nil {
			return nil, nil, err
		}
		if n.Status.Phase == api.NodeLost {
			failed[n.Meta.Name] = "lost"
			continue
		}
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			cctx, cancel := context.WithTimeout(ctx, topDeadline)
			defer cancel()
			var m api.Metrics
			err := contain.Call(func() error { // this may run inside the daemon
				r, err := c.Do(cctx, client.Request{Method: http.MethodGet, Path: "/metrics", Query: url.Values{"node": {n.Meta.Name}, "name": {name}}})
				if err != nil {
					return err
				}
				return json.Unmarshal(r.Body, &m)
			})
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed[n.Meta.Name] = err.Error()
				return
			}
			all = append(all, m)
		})
	}
	wg.Wait()
	slices.SortFunc(all, func(x, y api.Metrics) int { return cmp.Compare(x.Node, y.Node) })
	return all, failed, ctx.Err()
}

func (a *app) printTop(what string, all []api.Metrics, failed map[string]string) error {
	if a.structured() {
		return a.printValue(map[string]any{"nodes": all, "unreachable": failed})
	}
	if what == "vms" {
		return a.printTable(topVMs(all), "no VM runs")
	}
	t := &table{head: []string{"NODE", "STATUS", "CPU", "LOAD", "MEM-USED", "MEM-TOTAL", "MEM"}}
	for _, m := range all {
		v := newest(m.Series)
		t.add(m.Node, "ready", percent(v, "muster_node_cpu_percent"), plainNumber(v, "muster_node_load1"),
			bytesOf(v, "muster_node_memory_used_bytes"), bytesOf(v, "muster_node_memory_bytes"), percent(v, "muster_node_memory_used_percent"))
	}
	for node, why := range failed {
		t.add(node, "unknown,"+why, "-", "-", "-", "-", "-")
	}
	slices.SortFunc(t.rows, func(x, y []string) int { return cmp.Compare(x[0], y[0]) })
	return a.printTable(t, "no node answers")
}

// topVMs is a row per VM, the busiest first.
func topVMs(all []api.Metrics) *table {
	t := &table{head: []string{"VM", "PROJECT", "NODE", "CPU", "MEM-HELD", "MEM-GUEST", "BALLOON"}}
	type row struct {
		cells []string
		cpu   float64
	}
	var rows []row
	for _, m := range all {
		byVM := map[string][]api.MetricSeries{}
		for _, s := range m.Series {
			key := s.Labels["project"] + "/" + s.Labels["vm"]
			byVM[key] = append(byVM[key], s)
		}
		for key, list := range byVM {
			project, vm, _ := strings.Cut(key, "/")
			v := newest(list)
			rows = append(rows, row{[]string{vm, dash(project), m.Node, percent(v, "muster_vm_cpu_percent"), bytesOf(v, "muster_vm_resident_bytes"),
				bytesOf(v, "muster_vm_memory_bytes"), bytesOf(v, "muster_vm_balloon_bytes")}, v["muster_vm_cpu_percent"]})
		}
	}
	slices.SortFunc(rows, func(x, y row) int {
		return cmp.Or(-cmp.Compare(x.cpu, y.cpu), slices.Compare(x.cells[:2], y.cells[:2]))
	})
	for _, r := range rows {
		t.add(r.cells...)
	}
	return t
}

// newest returns the newest value of each series, by name.
func newest(list []api.MetricSeries) map[string]float64 {
	out := map[string]float64{}
	for _, s := range list {
		if n := len(s.Points); n > 0 {
			out[s.Name] = s.Points[n-1].Value
		}
	}
	return out
}

func percent(v map[string]float64, name string) string {
	if x, ok := v[name]; ok {
		return fmt.Sprintf("%.1f%%", x)
	}
	return "-"
}

func plainNumber(v map[string]float64, name string) string {
	if x, ok := v[name]; ok {
		return fmt.Sprintf("%.2f", x)
	}
	return "-"
}

func bytesOf(v map[string]float64, name string) string {
	x, ok := v[name]
	if !ok {
		return "-"
	}
	if mib := x / (1 << 20); mib < 10240 {
		return fmt.Sprintf("%.0fM", mib)
	}
	return fmt.Sprintf("%.1fG", x/(1<<30))
}
