// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/muster-vm/muster/internal/contain"
)

// Limits of Measure.
const (
	// MeasureDeadline bounds what one QEMU is asked.
	MeasureDeadline = time.Second
	measurers       = 8 // QEMUs asked at a time
)

// Measured is what QEMU says of a running VM.
type Measured struct {
	// Balloon is the memory that the balloon leaves to the guest, in bytes.
	Balloon int64
	// DiskRead and DiskWritten are the guest's bytes since QEMU began.
	DiskRead, DiskWritten uint64
}

// Measure asks every QEMU on this node, by ID of the VM. One that does not
// answer within MeasureDeadline, or not in the right words, is left out and
// holds up no other.
func (h *Hypervisor) Measure(ctx context.Context) map[string]Measured {
	h.mu.Lock()
	all := slices.Collect(maps.Values(h.instances))
	h.mu.Unlock()
	out := map[string]Measured{}
	var mu sync.Mutex
	places := make(chan struct{}, measurers)
	group, ctx := contain.NewGroup(ctx)
	for _, in := range all {
		if in.openConn() == nil {
			continue
		}
		places <- struct{}{}
		group.Go(func() {
			defer func() { <-places }()
			m, err := in.measure(ctx)
			if err != nil {
				h.log.Debug("vm not measured", "vm", in.id, "err", err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			out[in.id] = m
		})
	}
	if err := group.Wait(); err != nil {
		h.log.Error("vms not measured", "err", err)
	}
	return out
}

// measure asks one QEMU (QAPI query-balloon, query-blockstats).
func (in *instance) measure(ctx context.Context) (Measured, error) {
	ctx, cancel := context.WithTimeout(ctx, MeasureDeadline)
	defer cancel()
	var balloon struct {
		Actual int64 `json:"actual"`
	}
	if err := in.command(ctx, "query-balloon", &balloon); err != nil {
		return Measured{}, err
	}
	var disks []struct {
		Stats struct {
			Read    uint64 `json:"rd_bytes"`
			Written uint64 `json:"wr_bytes"`
		} `json:"stats"`
	}
	if err := in.command(ctx, "query-blockstats", &disks); err != nil {
		return Measured{}, err
	}
	m := Measured{Balloon: balloon.Actual}
	for _, d := range disks {
		m.DiskRead += d.Stats.Read
		m.DiskWritten += d.Stats.Written
	}
	return m, nil
}
