// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// planMigration shows what a migration of a VM would do.
func (a *app) planMigration(ctx context.Context, c *client.Client, name string, body map[string]any) error {
	q := url.Values{}
	if a.project != "" {
		q.Set("project", a.project)
	}
	for k, v := range body {
		if k == "to" {
			k = "target"
		}
		q.Set(k, fmt.Sprint(v))
	}
	if size, ok := body["bandwidth"].(api.Size); ok {
		q.Set("bandwidth", fmt.Sprint(int64(size)))
	}
	reply, err := c.Do(ctx, client.Request{Method: http.MethodGet, Path: "/vms/" + url.PathEscape(name) + "/migration/plan", Query: q})
	if err != nil {
		return err
	}
	if a.structured() {
		return a.printJSON(reply.Body)
	}
	var p api.MigrationPlan
	if err := json.Unmarshal(reply.Body, &p); err != nil {
		return fmt.Errorf("read the answer: %w", err)
	}
	out := &sections{paint: a.colour()}
	out.field("Would move", p.From+" to "+p.To)
	out.field("Memory", fmt.Sprintf("%s, of which the guest changes %s/s", p.Memory, p.DirtyRate))
	for _, v := range p.Volumes {
		out.field("Disk that goes along", fmt.Sprintf("%s (%s)", v.Name, v.Size))
	}
	line := fmt.Sprintf("%s/s", p.Bandwidth)
	if p.Assumed {
		line += " (assumed; --bandwidth or muster node set --migration-bandwidth says otherwise)"
	}
	out.field("Line", line)
	out.field("Expected time", (time.Duration(p.TotalMillis) * time.Millisecond).Round(100*time.Millisecond).String())
	out.field("Expected standstill", (time.Duration(p.DowntimeMillis) * time.Millisecond).String())
	if p.Halted {
		out.field("Note", "the guest stands still while its memory is sent: its processors are emulated by a QEMU before 9.0")
	}
	if !p.Converges {
		out.field("Note", "the guest changes its memory faster than it can be sent; it will be slowed down")
	}
	_, err = fmt.Fprint(a.Out, out.String())
	return err
}
