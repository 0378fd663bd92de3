// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

func (a *app) nodeFacts() *cobra.Command {
	return &cobra.Command{
		Use: "facts NODE", Short: "Show what a node can give its VMs", Args: args("NODE"),
		Long: `Shows a node's CPU with the models that QEMU can give a guest there, its NUMA
nodes, memory and hugepages, its PCI devices with their IOMMU groups, its USB
devices, and what VMs cannot have there and why. With -o json also all CPU flags
and machine types.`,
		Example:           "  muster node facts m1\n  muster node facts m1 -o json",
		ValidArgsFunction: a.completeNames(api.KindNode),
		RunE:              func(cmd *cobra.Command, names []string) error { return a.showFacts(cmd.Context(), names[0]) },
	}
}

func (a *app) showFacts(ctx context.Context, node string) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	var f api.NodeFacts
	reply, err := c.Call(ctx, http.MethodGet, "/nodes/"+url.PathEscape(node)+"/facts", nil, &f)
	if err != nil {
		return err
	}
	if a.structured() {
		return a.printJSON(reply.Body)
	}
	s := &sections{paint: a.colour()}
	factsText(s, &f.Status)
	_, err = fmt.Fprint(a.Out, s.String())
	return err
}

func factsText(s *sections, f *api.NodeFactsStatus) {
	s.field("Node", f.Node)
	s.field("QEMU", first(f.QEMUVersion, "cannot be used")+" with "+string(f.Accelerator))
	s.field("CPU", strings.TrimSpace(f.CPU.Vendor+" "+f.CPU.Name))
	s.field("Topology", fmt.Sprintf("%d sockets, %d cores, %d threads", f.CPU.Sockets, f.CPU.Cores, f.CPU.Threads))
	var models []string
	for _, m := range f.CPUModels {
		if len(m.Missing) == 0 {
			models = append(models, m.Name)
		}
	}
	s.field("CPU models", first(strings.Join(models, " "), "none"))
	s.field("Memory", sizeOr(f.Memory))
	s.field("Hugepages", hugepagesText(f.Hugepages))
	for _, feature := range slices.Sorted(maps.Keys(f.Missing)) {
		s.field("No "+string(feature), f.Missing[feature])
	}
	if len(f.NUMA) > 0 {
		s.title("NUMA nodes")
		t := &table{head: []string{"ID", "CPUS", "MEMORY", "HUGEPAGES"}}
		for _, n := range f.NUMA {
			t.add(strconv.Itoa(n.ID), n.CPUs, sizeOr(n.Memory), hugepagesText(n.Hugepages))
		}
		s.table(t)
	}
	if len(f.PCI) > 0 {
		s.title("PCI devices")
		t := &table{head: []string{"ADDRESS", "ID", "CLASS", "IOMMU GROUP", "NUMA", "DRIVER"}}
		for _, d := range f.PCI {
			t.add(d.Address, d.Vendor+":"+d.Device, dash(d.Class), numberOr(d.IOMMUGroup), numberOr(d.NUMANode), dash(d.Driver))
		}
		s.table(t)
	}
	if len(f.USB) > 0 {
		s.title("USB devices")
		t := &table{head: []string{"ID", "PORT", "NAME"}}
		for _, d := range f.USB {
			t.add(d.ID, d.Port, dash(d.Name))
		}
		s.table(t)
	}
}

func hugepagesText(list []api.HostHugepages) string {
	var out []string
	for _, h := range list {
		out = append(out, fmt.Sprintf("%d × %s", h.Total, h.Size))
	}
	return first(strings.Join(out, ", "), "none")
}

func numberOr(n *int) string {
	if n == nil {
		return "-"
	}
	return strconv.Itoa(*n)
}

// baselineText is one line about the cluster's CPU baseline.
func baselineText(b *api.CPUBaselineStatus) string {
	text := fmt.Sprintf("%s and %d features, generation %d, of %s", b.Baseline.Model, len(b.Baseline.Features), b.Generation, strings.Join(b.Baseline.Nodes, ", "))
	if len(b.Baseline.Vendors) > 1 {
		text += "; processors of " + strings.Join(b.Baseline.Vendors, " and ") + ": VMs cannot be moved between them while they run"
	}
	return text
}

func (a *app) vmQEMU() *cobra.Command {
	var log int
	cmd := &cobra.Command{
		Use: "qemu NAME", Short: "Show the arguments and the monitor's messages of a VM's QEMU", Args: args("NAME"),
		Long: `Shows what the QEMU of a running VM was started with, and with --log the last
messages on its monitor (QMP). Secrets are hidden.`,
		Example:           "  muster vm qemu web1\n  muster vm qemu web1 --log 50",
		ValidArgsFunction: a.completeNames(api.KindVM),
		RunE:              func(cmd *cobra.Command, names []string) error { return a.showQEMU(cmd.Context(), names[0], log) },
	}
	cmd.Flags().IntVar(&log, "log", 0, "also this many of the last messages, at most 256")
	return cmd
}

func (a *app) showQEMU(ctx context.Context, name string, log int) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	q := url.Values{"log": {strconv.Itoa(log)}}
	if a.project != "" {
		q.Set("project", a.project)
	}
	reply, err := c.Do(ctx, client.Request{Method: http.MethodGet, Path: "/vms/" + url.PathEscape(name) + "/qemu", Query: q})
	if err != nil {
		return err
	}
	if a.structured() {
		return a.printJSON(reply.Body)
	}
	var out api.VMQEMU
	if err := json.Unmarshal(reply.Body, &out); err != nil {
		return fmt.Errorf("read the answer: %w", err)
	}
	fmt.Fprintf(a.Out, "# pid %d on node %s\n", out.PID, clean(out.Node))
	for i, arg := range out.Argv {
		sep := " "
		if i > 0 && strings.HasPrefix(arg, "-") {
			sep = " \\\n  "
		}
		if i == 0 {
			sep = ""
		}
		fmt.Fprint(a.Out, sep+shellWord(clean(arg)))
	}
	fmt.Fprintln(a.Out)
	for _, e := range out.Log {
		fmt.Fprintf(a.Out, "%s %-7s %s %s\n", e.Time.Format("15:04:05.000"), clean(e.Kind), clean(e.Name), clean(e.Text))
	}
	return nil
}

// shellWord quotes an argument if a shell needs that.
func shellWord(s string) string {
	if s != "" && !strings.ContainsAny(s, " \t\n'\"\\$`!*?[](){}<>|&;#~") {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
