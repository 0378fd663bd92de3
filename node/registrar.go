// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"fmt"
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
	seen   bool // the replica has had this node's object
}

func (r *registrar) run(ctx context.Context) error {
	tick := time.NewTicker(factsEvery)
	defer tick.Stop()
	for {
		if r.m.askWhetherRemoved(ctx) {
			return r.m.removed(ctx)
		}
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
	_, err := configdb.Nodes.Get(r.m.store.Local(), r.m.info.NodeID)
	switch {
	case err == nil:
		r.seen = true
	case r.seen && api.CodeOf(err) == api.CodeNotFound:
		return r.m.removed(ctx)
	default:
		return err // not replicated yet
	}
	facts := r.m.hyper.Facts()
	_, err = configdb.Transact(ctx, r.m.store, "node "+r.m.info.Node, 4, func(v *configdb.View, tx *configdb.Txn) error {
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

// removed ends the daemon of a node that was taken out of its cluster. The
// guard goes too, as it has no VM: a node with VMs is not taken out.
func (m *member) removed(ctx context.Context) error {
	if c, err := m.guard.use(ctx); err == nil {
		if err := c.Stop(ctx); err != nil {
			m.log.Warn("guard not stopped", "err", err)
		}
	}
	err := fmt.Errorf("this node was removed from cluster %s; to join again, start with an empty data directory", m.info.Cluster)
	m.fatal(err)
	return err
}
