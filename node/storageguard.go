// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"slices"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/ha"
)

// poolGuard locks nodes out of pools, and this one in again, as ha needs it.
type poolGuard struct{ m *member }

// LockOut implements ha.StorageFencer.
func (g poolGuard) LockOut(ctx context.Context, f *api.StorageFence, volumes []string, before func(context.Context) error) error {
	pool, err := g.m.storage.Fencer(g.m.store.Local(), f.PoolID)
	if err != nil {
		return err
	}
	done, err := pool.Fence(ctx, f.Addresses, volumes, true, before)
	f.Epoch, f.Owners = done.Epoch, done.Owners
	return err
}

// Admit implements ha.Admitter.
func (g poolGuard) Admit(ctx context.Context, f api.StorageFence) error {
	v := g.m.store.Local()
	pool, err := g.m.storage.Fencer(v, f.PoolID)
	if err != nil {
		return err
	}
	return pool.Unfence(ctx, union(f.Addresses, g.addresses(v, f.PoolID)))
}

// Barred implements ha.Admitter. A pool that is ready is one that this node uses.
func (g poolGuard) Barred(ctx context.Context) (barred []api.StorageFence, err error) {
	v := g.m.store.Local()
	pools, err := configdb.Pools.List(v)
	errs := []error{err}
	for i := range pools {
		id := pools[i].Meta.ID
		st, err := configdb.PoolStates.Get(v, id+"."+g.m.info.NodeID)
		if err != nil || st.Status.Ready || len(st.Status.Addresses) == 0 {
			continue
		}
		f := api.StorageFence{PoolID: id, Pool: pools[i].Meta.Name}
		pool, err := g.m.storage.Fencer(v, id)
		if err != nil {
			continue // another type, which locks out nobody
		}
		for _, a := range st.Status.Addresses {
			out, err := pool.Fenced(ctx, []string{a})
			errs = append(errs, err)
			if out {
				f.Addresses = append(f.Addresses, a)
			}
		}
		if len(f.Addresses) > 0 {
			barred = append(barred, f)
		}
	}
	return barred, errors.Join(errs...)
}

func (g poolGuard) addresses(v *configdb.View, poolID string) []string {
	st, err := configdb.PoolStates.Get(v, poolID+"."+g.m.info.NodeID)
	if err != nil {
		return nil
	}
	return st.Status.Addresses
}

func union(a, b []string) []string {
	out := slices.Concat(a, b)
	slices.Sort(out)
	return slices.Compact(out)
}

func (m *member) newTakeBack() *ha.TakeBack {
	return ha.NewTakeBack(ha.TakeBackConfig{
		DB: m.store, NodeID: m.info.NodeID, Lease: m.keeper, Quiet: m.hyper.Quiet, Pools: poolGuard{m}, Log: m.log.With("module", "ha"),
	})
}
