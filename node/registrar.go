// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/version"
)

// factsEvery is how often the facts are compared with what is stored; they are
// written only when they differ.
const factsEvery = 2 * time.Second

// registrar writes this node's facts into its status.
type registrar struct {
	m      *member
	bootID string
}

func (r *registrar) run(ctx context.Context) error {
	tick := time.NewTicker(factsEvery)
	defer tick.Stop()
	for {
		if err := r.write(ctx); err != nil && ctx.Err() == nil {
			r.m.log.Debug("node facts not written", "err", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (r *registrar) write(ctx context.Context) error {
	facts := r.m.hyper.Facts()
	_, err := configdb.Transact(ctx, r.m.store, "node "+r.m.info.Node, 4, func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Get(v, r.m.info.NodeID)
		if err != nil {
			return err
		}
		s := &n.Status
		s.ObservedGeneration, s.Version, s.BootID = n.Meta.Generation, version.Version, r.bootID
		s.Accelerator, s.AcceleratorReason, s.QEMUVersion = facts.Accelerator, facts.AcceleratorReason, facts.QEMUVersion
		s.CPUs, s.Memory = facts.CPUs, facts.Memory
		if level := r.m.guard.Level(); level != "" {
			s.GuardLevel = level
		}
		for _, c := range facts.Conditions {
			s.Conditions = api.SetCondition(s.Conditions, c, time.Now())
		}
		// Only ha may end the phase lost; see ha/DESIGN.md.
		if s.Phase == "" || s.Phase == api.NodeJoining {
			s.Phase = api.NodeReady
		}
		return configdb.Nodes.UpdateStatus(v, tx, &n)
	})
	return err
}
