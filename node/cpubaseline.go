// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/placement"
)

// baselineRetry is the pause after a baseline that could not be written.
const baselineRetry = 5 * time.Second

// keepCPUBaseline keeps, on the leader, the CPU that every node can give a guest:
// anew whenever a node tells something else of its CPU, comes or is removed. VMs
// that run keep what they were started with.
func (m *member) keepCPUBaseline(ctx context.Context, term uint64) error {
	prefix := configdb.NodeFacts.StatusPrefix()
	w := m.store.Watch(prefix, 0)
	for {
		_, err := w.Next(ctx)
		switch {
		case errors.Is(err, configdb.ErrCompacted):
			w = m.store.Watch(prefix, 0)
			continue
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return err
		}
		for m.writeCPUBaseline(ctx, term) != nil && ctx.Err() == nil {
			select {
			case <-time.After(baselineRetry):
			case <-ctx.Done():
			}
		}
	}
}

func (m *member) writeCPUBaseline(ctx context.Context, term uint64) error {
	ctx, cancel := context.WithTimeout(ctx, writeDeadline)
	defer cancel()
	_, err := configdb.Transact(ctx, m.store, "node "+m.info.Node, 4, func(v *configdb.View, tx *configdb.Txn) error {
		facts, err := configdb.NodeFacts.List(v)
		if err != nil {
			return err
		}
		spec, ok := placement.Baseline(facts)
		if !ok {
			return nil // nobody has told yet, or nothing runs on all: what there is stays
		}
		tx.RequireTerm(term)
		return storeBaseline(v, tx, m.info.ClusterID, spec)
	})
	if err != nil && ctx.Err() == nil {
		m.log.Warn("the CPU baseline of the cluster is not written", "err", err)
	}
	return err
}

// storeBaseline writes the baseline if it differs.
func storeBaseline(v *configdb.View, tx *configdb.Txn, clusterID string, spec api.CPUBaselineSpec) error {
	b, err := configdb.CPUBaselines.Get(v, clusterID)
	switch {
	case err == nil:
		if b.Spec.Model == spec.Model && slices.Equal(b.Spec.Features, spec.Features) && slices.Equal(b.Spec.Nodes, spec.Nodes) && slices.Equal(b.Spec.Vendors, spec.Vendors) {
			return nil
		}
		b.Spec = spec
		return configdb.CPUBaselines.UpdateSpec(v, tx, &b)
	case api.CodeOf(err) != api.CodeNotFound:
		return err
	}
	b = api.CPUBaseline{Meta: api.NewMeta(api.KindCPUBaseline, "", "cluster"), Spec: spec}
	b.Meta.ID, b.Meta.Generation = clusterID, 1
	return configdb.CPUBaselines.CreateUnnamed(tx, &b)
}
