// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"fmt"
	"time"

	"github.com/muster-vm/muster/api"
)

// Times of the measurement of how fast a guest changes its memory.
const (
	// DirtyTime is how long QEMU samples.
	DirtyTime = time.Second
	// dirtyDeadline bounds the measurement, dirtyLook is the pause between looks.
	dirtyDeadline = 10 * time.Second
	dirtyLook     = 50 * time.Millisecond
)

// MigrationTransfer says what flows of a VM that leaves this node; nil if nothing
// does.
func (h *Hypervisor) MigrationTransfer(ctx context.Context, id string) (*api.MigrationTransfer, error) {
	h.mu.Lock()
	in := h.instances[id]
	h.mu.Unlock()
	if in == nil || in.openConn() == nil {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, MeasureDeadline)
	defer cancel()
	m, err := in.queryMigrate(ctx)
	if err != nil {
		return nil, err
	}
	jobs, err := in.mirrorJobs(ctx)
	if err != nil {
		return nil, err
	}
	if m.Status == migNone && len(jobs) == 0 {
		return nil, nil
	}
	t := &api.MigrationTransfer{
		State: m.Status, MemoryTotal: api.Size(m.RAM.Total), MemoryLeft: api.Size(m.RAM.Remaining), Sent: api.Size(m.RAM.Transferred),
		Speed: api.Size(m.RAM.Mbps * 1e6 / 8), DirtyRate: api.Size(m.RAM.DirtyRate * m.RAM.PageSize), Passes: m.RAM.DirtySyncs,
		Throttle: m.Throttle, ElapsedMillis: m.TotalTime, ExpectedDowntimeMillis: m.Expected,
	}
	if m.Status == migNone {
		t.State = "disks"
	}
	for _, j := range jobs {
		t.DisksDone, t.DisksTotal = t.DisksDone+api.Size(j.Current), t.DisksTotal+api.Size(j.Total)
	}
	return t, nil
}

// DirtyRate measures how much of its memory a guest changes, in bytes per second
// (QAPI calc-dirty-rate).
func (h *Hypervisor) DirtyRate(ctx context.Context, id string) (api.Size, error) {
	h.mu.Lock()
	in := h.instances[id]
	h.mu.Unlock()
	if in == nil || in.openConn() == nil {
		return 0, api.Errorf(api.CodeRefused, "the vm does not run on node %s", h.cfg.NodeName)
	}
	ctx, cancel := context.WithTimeout(ctx, dirtyDeadline)
	defer cancel()
	var r struct {
		Status string `json:"status"`
		Rate   int64  `json:"dirty-rate"` // MiB/s
	}
	if err := in.execute(ctx, "query-dirty-rate", nil, &r); err != nil {
		return 0, err
	}
	if r.Status != "measuring" { // one of somebody else's is as good
		if err := in.execute(ctx, "calc-dirty-rate", map[string]any{"calc-time": int(DirtyTime / time.Second)}, nil); err != nil {
			return 0, err
		}
	}
	for {
		if err := in.execute(ctx, "query-dirty-rate", nil, &r); err != nil {
			return 0, err
		}
		if r.Status == "measured" {
			return api.Size(r.Rate) * api.MiB, nil
		}
		if err := pause(ctx, dirtyLook); err != nil {
			return 0, fmt.Errorf("measure how fast the guest changes its memory: %w", err)
		}
	}
}
