// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// Limits of locking nodes out of pools; see DESIGN.md, "The storage guard".
const (
	// lockOutLimit bounds one attempt at one pool.
	lockOutLimit = 15 * time.Second
	// lockOutPause is the least time between two attempts at one node, lockOutRest that
	// between looks at one that has nothing to be locked out of.
	lockOutPause = 3 * time.Second
	lockOutRest  = 30 * time.Second
)

// StorageFencer locks nodes out of pools.
type StorageFencer interface {
	// LockOut locks the addresses of the fence out of its pool, and all who hold
	// locks on the volumes, and returns nil only if the pool enforces it. It calls
	// before right before it commands anything. It adds what it found to the fence.
	LockOut(ctx context.Context, f *api.StorageFence, volumes []string, before func(context.Context) error) error
}

// target is a node to be locked out of pools.
type target struct {
	node    api.Node
	pools   []string // IDs
	volumes map[string][]string
	reason  string
	quiet   time.Duration
}

// lockOutSilent begins to lock nodes out of the pools of their guarded VMs: those
// that are lost, and those that are silent, unless more than half are. run starts
// an attempt, which takes seconds.
func (s *Service) lockOutSilent(term uint64, run func(attempt func(context.Context))) {
	if s.storage == nil {
		return
	}
	v := s.db.Local()
	suspects := s.suspects(v, term)
	if len(suspects) == 0 {
		return
	}
	guarded := guardedVolumes(v)
	for i := range suspects {
		t := &suspects[i]
		t.volumes = guarded[t.node.Meta.ID]
		for pool := range t.volumes {
			if !t.node.Status.LockedOut([]string{pool}) {
				t.pools = append(t.pools, pool)
			}
		}
		if len(t.pools) == 0 {
			s.grant.endLocking(term, t.node.Meta.ID, lockOutRest)
			continue
		}
		slices.Sort(t.pools)
		run(func(ctx context.Context) {
			err := s.lockOut(ctx, term, *t)
			if text := fmt.Sprint(err); ctx.Err() == nil && s.grant.newWord(t.node.Meta.ID, text) && err != nil {
				s.log.Warn("node not locked out of its pools; it is tried again", "node", t.node.Meta.Name, "err", text)
			}
			s.grant.endLocking(term, t.node.Meta.ID, lockOutPause)
		})
	}
}

// suspects are the nodes that are lost or silent and may be locked out, of which
// none has been looked at for a moment. An attempt at each has begun.
func (s *Service) suspects(v *configdb.View, term uint64) (out []target) {
	nodes, _ := configdb.Nodes.List(v) // readyNodes says what cannot be read
	_, silent, tooMany := s.silentAmong(term, nodes)
	if tooMany {
		silent = nil
	}
	for i := range nodes {
		n := &nodes[i]
		id := n.Meta.ID
		lost := n.Status.Phase == api.NodeLost
		if id == s.nodeID || !lost && (!slices.Contains(silent, id) || n.Spec.Maintenance || n.Status.Stopping) {
			continue
		}
		if _, later := v.Get(configdb.LaterLifeKey(id)); later || !s.grant.beginLocking(term, id) {
			continue
		}
		t := target{node: *n, reason: "it is lost", quiet: s.grant.quietFor(id)}
		if !lost {
			t.reason = fmt.Sprintf("nothing was heard of it for %.1f s", t.quiet.Seconds())
		}
		out = append(out, t)
	}
	return out
}

// guardedVolumes are those of VMs with a storage guard, by node and pool.
func guardedVolumes(v *configdb.View) map[string]map[string][]string {
	out := map[string]map[string][]string{}
	bindings, _ := configdb.Bindings.List(v) // what cannot be decoded is logged by its own reconcile
	for i := range bindings {
		b := &bindings[i]
		for _, pool := range b.Spec.Guarding() {
			if out[b.Spec.NodeID] == nil {
				out[b.Spec.NodeID] = map[string][]string{}
			}
			out[b.Spec.NodeID][pool] = append(out[b.Spec.NodeID][pool], volumesIn(v, b.Meta.ID, pool)...)
		}
	}
	return out
}

// volumesIn are the IDs of a VM's volumes in a pool, as far as they are known; its
// host is locked out all the same.
func volumesIn(v *configdb.View, vmID, poolID string) []string {
	vm, err := configdb.VMs.Get(v, vmID)
	if err != nil {
		return nil
	}
	pools, _ := configdb.VolumesByPool(v, &vm)
	return pools[poolID]
}

// lockOut is one attempt at all pools of a node.
func (s *Service) lockOut(ctx context.Context, term uint64, t target) error {
	fences, err := s.markLockOut(ctx, term, t)
	errs := []error{err}
	for i := range fences {
		f := &fences[i]
		errs = append(errs, s.enforce(ctx, term, t, f))
	}
	return errors.Join(errs...)
}

// markLockOut commits the marks of the pools that have none of this term, and
// returns all that are not in force. A pool that cannot be marked keeps no other from
// it; the error says why.
func (s *Service) markLockOut(ctx context.Context, term uint64, t target) (fences []api.StorageFence, err error) {
	id := t.node.Meta.ID
	var skipped []error
	_, err = configdb.Transact(ctx, s.db, Actor, 4, func(v *configdb.View, tx *configdb.Txn) error {
		fences, skipped = nil, nil
		n, err := configdb.Nodes.Get(v, id)
		if err != nil {
			return err
		}
		if n.Status.Phase != api.NodeLost && s.grant.quietFor(id) <= FenceAfter {
			return nil // it has asked since
		}
		tx.RequireTerm(term)
		for _, poolID := range t.pools {
			if n.Status.LockedOut([]string{poolID}) {
				continue
			}
			pool, err := configdb.Pools.Get(v, poolID)
			if err != nil {
				skipped = append(skipped, err)
				continue
			}
			addresses, err := configdb.FenceAddresses(v, id, poolID)
			if err != nil {
				skipped = append(skipped, fmt.Errorf("pool %s: %w", pool.Meta.Name, err))
				continue
			}
			f := api.StorageFence{ID: api.NewID(), PoolID: poolID, Pool: pool.Meta.Name, Reason: t.reason, Term: term, BeganAt: time.Now().UTC(), Addresses: addresses}
			if own, ok := n.Status.FenceOf(poolID); ok && own.Term == term && slices.Equal(own.Addresses, addresses) {
				fences = append(fences, own) // of an attempt before: nothing is written again and again
				continue
			}
			n.Status.StorageFences = slices.DeleteFunc(slices.Clone(n.Status.StorageFences), func(o api.StorageFence) bool { return o.PoolID == poolID })
			n.Status.StorageFences = append(n.Status.StorageFences, f)
			fences = append(fences, f)
		}
		return configdb.Nodes.UpdateStatus(v, tx, &n)
	})
	if err != nil {
		return nil, err
	}
	return fences, errors.Join(skipped...)
}

// enforce locks a node out of one pool, and commits that it is.
func (s *Service) enforce(ctx context.Context, term uint64, t target, f *api.StorageFence) error {
	id := t.node.Meta.ID
	if s.grant.newWord(f.ID, "being locked out") {
		s.log.Warn("node is being locked out of a pool", "node", t.node.Meta.Name, "pool", f.Pool, "why", t.reason, "addresses", f.Addresses, "term", term)
	}
	lctx, cancel := context.WithTimeout(ctx, lockOutLimit)
	defer cancel()
	err := s.storage.LockOut(lctx, f, t.volumes[f.PoolID], func(ctx context.Context) error {
		if err := s.grant.leader.Confirm(ctx, term); err != nil {
			return fmt.Errorf("leadership is not confirmed: %w", err)
		}
		n, err := configdb.Nodes.Get(s.db.Local(), id)
		if err != nil {
			return err
		}
		if _, ok := n.Status.FenceToCome(f.PoolID, f.ID); !ok {
			return errNotMarked
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("pool %s: %w", f.Pool, err)
	}
	_, err = configdb.Transact(ctx, s.db, Actor, 4, func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Get(v, id)
		if err != nil {
			return err
		}
		tx.RequireTerm(term)
		for i, own := range n.Status.StorageFences {
			if own.ID != f.ID {
				continue
			}
			now := time.Now().UTC()
			f.InForceAt = &now
			if err := s.noteFence(tx, term, &n, f, t.quiet); err != nil {
				return err
			}
			n.Status.StorageFences = slices.Clone(n.Status.StorageFences)
			n.Status.StorageFences[i] = *f
			return configdb.Nodes.UpdateStatus(v, tx, &n)
		}
		return errNotMarked
	})
	if err == nil {
		s.log.Warn("node locked out of a pool; its VMs there are restarted elsewhere", "node", t.node.Meta.Name, "pool", f.Pool, "epoch", f.Epoch, "owners", f.Owners, "term", term)
	}
	return err
}

// beginLocking notes the beginning of an attempt, if there is none and the last one
// has ended for a while.
func (g *grantor) beginLocking(term uint64, nodeID string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.enter(term) {
		return false
	}
	if next, ok := g.locking[nodeID]; ok && (next == 0 || g.now() < next) {
		return false
	}
	g.locking[nodeID] = 0
	return true
}

// endLocking notes the end of an attempt, and when the next may begin.
func (g *grantor) endLocking(term uint64, nodeID string, pause time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.term == term {
		g.locking[nodeID] = g.now() + pause
	}
}

// newWord reports whether something is to be said of an attempt that was not said
// last in this term.
func (g *grantor) newWord(of, text string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	was := g.words[of]
	g.words[of] = text
	return was != text
}

// quietFor is how long nothing was heard of a node.
func (g *grantor) quietFor(nodeID string) time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.quiet(nodeID)
}
