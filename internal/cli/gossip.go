// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// loadColumns are what -o wide adds to a table of nodes.
var loadColumns = []string{"GOSSIP", "CPU", "MEM-FREE", "DISK-FREE", "VMS", "HEARD"}

// withHints returns a view of nodes that also shows what the node that answers
// heard of them by gossip. Without an answer it is the view as it was.
func (a *app) withHints(ctx context.Context, c *client.Client, k *kindView) *kindView {
	var s api.ClusterStatus
	if _, err := c.Call(ctx, http.MethodGet, "/cluster", nil, &s); err != nil {
		a.notice("warning: what gossip knows is left out: %v", err)
		return k
	}
	hints := map[string]*api.GossipHint{}
	for _, m := range s.Members {
		hints[m.NodeID], hints[m.Node] = m.Gossip, m.Gossip
	}
	levels := func(raw json.RawMessage) string {
		var n api.Node
		if err := json.Unmarshal(raw, &n); err != nil {
			return "-"
		}
		return n.Status.Supports().String()
	}
	hint := func(raw json.RawMessage) *api.GossipHint {
		m := client.MetaOf(raw)
		if h := hints[m.ID]; h != nil {
			return h
		}
		return hints[m.Name]
	}
	out := *k
	if a.flags.wide {
		out.columns = append(append(slices.Clone(k.columns), "LEVELS"), loadColumns...)
		out.row = func(raw json.RawMessage, now time.Time) ([]string, error) {
			row, err := k.row(raw, now)
			return append(append(row, levels(raw)), loadRow(hint(raw))...), err
		}
	}
	out.show = func(p *sections, raw json.RawMessage, now time.Time) error {
		if err := k.show(p, raw, now); err != nil {
			return err
		}
		p.title("Feature levels")
		p.field("Supported", levels(raw))
		p.field("Cluster", levelText(s.FeatureLevel))
		showHint(p, s.Node, hint(raw))
		return nil
	}
	return &out
}

// heard is the state of a hint, with the time if it is a bad one.
func heard(h *api.GossipHint) string {
	switch {
	case h == nil:
		return "-"
	case h.State == api.GossipAlive || h.ForSeconds == 0:
		return string(h.State)
	}
	return string(h.State) + " " + took(seconds(h.ForSeconds))
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

func loadRow(h *api.GossipHint) []string {
	row := []string{heard(h), "-", "-", "-", "-", "-"}
	if h == nil || h.Load == nil {
		return row
	}
	l := h.Load
	if l.CPUPercent != nil {
		row[1] = fmt.Sprintf("%.0f%%", *l.CPUPercent)
	}
	row[2] = freeOf(l.MemoryFree, l.MemoryTotal)
	row[3] = freeOf(l.DiskFree, l.DiskTotal)
	if l.DiskFull {
		row[3] = "full"
	}
	row[4] = strconv.Itoa(l.VMs)
	row[5] = took(seconds(h.AgeSeconds)) + " ago"
	return row
}

func freeOf(free, total api.Size) string {
	if total == 0 {
		return "-"
	}
	return free.String()
}

// showHint adds what a node heard of another.
func showHint(p *sections, at string, h *api.GossipHint) {
	if h == nil {
		return
	}
	p.title("Gossip, as node " + clean(at) + " has it (a hint)")
	p.field("State", heard(h))
	l := h.Load
	if l == nil {
		return
	}
	p.field("Heard", took(seconds(h.AgeSeconds))+" ago")
	if l.CPUPercent != nil {
		p.field("CPU", fmt.Sprintf("%.1f%% busy", *l.CPUPercent))
	}
	if l.MemoryTotal > 0 {
		p.field("Memory", fmt.Sprintf("%s free of %s", l.MemoryFree, l.MemoryTotal))
	}
	disk := ""
	if l.DiskTotal > 0 {
		disk = fmt.Sprintf("%s free of %s", l.DiskFree, l.DiskTotal)
	}
	if l.DiskFull {
		disk = "full: the configuration database takes no changes there; " + disk
	}
	p.field("Data disk", disk)
	p.field("VMs", strconv.Itoa(l.VMs))
	p.field("Revision", strconv.FormatUint(l.Revision, 10))
	p.field("Version", l.Version)
}
