// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/ha"
	"github.com/muster-vm/muster/storage"
)

// poolGuard locks nodes out of pools, and this one in again, as ha needs it.
type poolGuard struct{ m *member }

// LockOut implements ha.StorageFencer. A leader that cannot use the pool, as a witness,
// asks one who can. That one acts on the mark alone; only the leader, if the mark is
// still its own then, commits that it is in force.
func (g poolGuard) LockOut(ctx context.Context, f *api.StorageFence, volumes []string, before func(context.Context) error) error {
	v := g.m.store.Local()
	others := deputies(v, g.m.info.NodeID, f)
	if canUse(v, g.m.info.NodeID, f.PoolID) || len(others) == 0 {
		done, err := g.fence(ctx, v, f, volumes, before)
		f.Epoch, f.Owners = done.Epoch, done.Owners
		return err
	}
	req, err := json.Marshal(lockOutRequest{Fence: f.ID, PoolID: f.PoolID, Revision: v.Revision(), Volumes: volumes})
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range others[:min(len(others), maxDeputies)] {
		if err := before(ctx); err != nil {
			return err
		}
		b, err := g.ask(ctx, &n, req)
		var done storage.Fenced
		if err == nil {
			err = json.Unmarshal(b, &done)
		}
		if err == nil {
			f.Epoch, f.Owners = done.Epoch, done.Owners
			return nil
		}
		errs = append(errs, fmt.Errorf("node %s: %w", n.Meta.Name, err))
	}
	return errors.Join(errs...)
}

// Limits of a lock-out by another node than the leader.
const (
	methodLockOut = "ha.lockout"
	maxDeputies   = 2
	// deputyLimit bounds one call, so that two fit into an attempt (15 s).
	deputyLimit = 7 * time.Second
)

// lockOutRequest asks a node to carry out a fence that the database has.
type lockOutRequest struct {
	Fence    string   `json:"fence"`
	PoolID   string   `json:"poolID"`
	Revision uint64   `json:"revision"`
	Volumes  []string `json:"volumes,omitempty"`
}

func (g poolGuard) fence(ctx context.Context, v *configdb.View, f *api.StorageFence, volumes []string, before func(context.Context) error) (storage.Fenced, error) {
	pool, err := g.m.storage.Fencer(v, f.PoolID)
	if err != nil {
		return storage.Fenced{}, err
	}
	return pool.Fence(ctx, f.Addresses, volumes, true, before)
}

func (g poolGuard) ask(ctx context.Context, n *api.Node, req []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, deputyLimit)
	defer cancel()
	return g.m.client.Call(ctx, n.Meta.ID, n.Spec.Address, methodLockOut, req)
}

// serve answers a leader that cannot use a pool.
func (g poolGuard) serve(ctx context.Context, request []byte) ([]byte, error) {
	var r lockOutRequest
	if err := json.Unmarshal(request, &r); err != nil {
		return nil, fmt.Errorf("malformed request: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, deputyLimit)
	defer cancel()
	v, err := g.m.store.WaitRevision(ctx, r.Revision)
	if err != nil {
		return nil, err
	}
	f, ok := fenceToCome(v, r.PoolID, r.Fence)
	if !ok {
		return nil, errNoFence
	}
	done, err := g.fence(ctx, v, &f, r.Volumes, func(context.Context) error {
		if _, ok := fenceToCome(g.m.store.Local(), r.PoolID, r.Fence); !ok {
			return errNoFence
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return json.Marshal(done)
}

var errNoFence = errors.New("the database does not say that a node is to be locked out")

// fenceToCome returns the fence with an ID, whichever node it is of.
func fenceToCome(v *configdb.View, poolID, id string) (f api.StorageFence, ok bool) {
	nodes, _ := configdb.Nodes.List(v) // what cannot be read has no fence that counts
	for i := range nodes {
		if f, ok := nodes[i].Status.FenceToCome(poolID, id); ok {
			return f, true
		}
	}
	return f, false
}

// canUse reports whether a pool is ready on a node.
func canUse(v *configdb.View, nodeID, poolID string) bool {
	st, err := configdb.PoolStateOf(v, poolID, nodeID)
	return err == nil && st.Status.Ready
}

// deputies are the nodes that can carry out a fence instead of this one.
func deputies(v *configdb.View, self string, f *api.StorageFence) (out []api.Node) {
	nodes, _ := configdb.Nodes.List(v)
	for i := range nodes {
		n := &nodes[i]
		_, fenced := n.Status.FenceOf(f.PoolID)
		if n.Meta.ID != self && !fenced && n.Status.Phase == api.NodeReady && canUse(v, n.Meta.ID, f.PoolID) {
			out = append(out, *n)
		}
	}
	return out
}

// Admit implements ha.Admitter. A pool that was removed has nothing that waits for it.
func (g poolGuard) Admit(ctx context.Context, f api.StorageFence) error {
	v := g.m.store.Local()
	pool, err := g.m.storage.Fencer(v, f.PoolID)
	if err != nil {
		return api.IgnoreNotFound(err)
	}
	addresses := union(f.Addresses, g.addresses(v, f.PoolID))
	if err := lockOthers(v, g.m.info.NodeID, f.PoolID, addresses); err != nil {
		return err
	}
	return pool.Unfence(ctx, addresses)
}

// lockOthers refuses addresses by which another node is locked out of a pool: one that
// went from host to host locks out the one that had it before.
func lockOthers(v *configdb.View, nodeID, poolID string, addresses []string) error {
	nodes, err := configdb.Nodes.List(v)
	if err != nil {
		return err
	}
	for i := range nodes {
		n := &nodes[i]
		f, fenced := n.Status.FenceOf(poolID)
		for _, a := range addresses {
			if n.Meta.ID != nodeID && fenced && slices.Contains(f.Addresses, a) {
				return api.Errorf(api.CodeRefused, "node %s is locked out of pool %s by the address %s, which is this node's, too; it has to come back first, or be removed", n.Meta.Name, f.Pool, a)
			}
		}
	}
	return nil
}

// Barred implements ha.Admitter. A pool that is ready is one that this node uses.
func (g poolGuard) Barred(ctx context.Context) (barred []api.StorageFence, err error) {
	v := g.m.store.Local()
	pools, err := configdb.Pools.List(v)
	errs := []error{err}
	for i := range pools {
		id := pools[i].Meta.ID
		st, err := configdb.PoolStateOf(v, id, g.m.info.NodeID)
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
	st, err := configdb.PoolStateOf(v, poolID, g.m.info.NodeID)
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
