// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"bytes"
	"context"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/gossip"
	"github.com/muster-vm/muster/internal/pki"
)

// gossipStage is how long every step of a change of keys lasts: every node that is
// in step with the database has seen it by then.
const gossipStage = 10 * time.Second

// keyKeeper changes the keys of gossip on the leader.
type keyKeeper struct {
	m           *member
	look, stage time.Duration

	// The keys that the last look saw, and since when: the wait of a step begins
	// anew with a new leader, which is only longer.
	last  *api.GossipKeys
	since time.Time
}

// keepGossipKeys sees to it, on the leader, that there is a key, and that after
// the removal of a node a new one takes its place, which the removed node never
// gets. A removal costs three small transactions, several at once as well.
func (m *member) keepGossipKeys(ctx context.Context, term uint64) error {
	k := &keyKeeper{m: m, look: gossipLook, stage: gossipStage}
	return k.run(ctx, term)
}

func (k *keyKeeper) run(ctx context.Context, term uint64) error {
	tick := time.NewTicker(k.look)
	defer tick.Stop()
	for {
		if err := k.step(ctx, term); err != nil && ctx.Err() == nil {
			k.m.log.Warn("gossip keys not looked after", "err", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// step takes the next step that is due, if any.
func (k *keyKeeper) step(ctx context.Context, term uint64) error {
	v := k.m.store.Local()
	c, err := configdb.Clusters.Get(v, k.m.info.ClusterID)
	if err != nil {
		return api.IgnoreNotFound(err) // being founded
	}
	if k.last == nil || !sameGossipKeys(k.last, c.Spec.Gossip) {
		k.last, k.since = c.Spec.Gossip, time.Now()
	}
	settled := time.Since(k.since) >= k.stage
	removed, await, err := k.m.removedNodes(v)
	if err != nil {
		return err
	}
	next, err := k.next(&c.Spec, removed, await, settled)
	if err != nil || next == nil {
		return err
	}
	was := c.Spec.Gossip
	_, err = configdb.Transact(ctx, k.m.store, "node "+k.m.info.Node, 4, func(v *configdb.View, tx *configdb.Txn) error {
		c, err := configdb.Clusters.Get(v, k.m.info.ClusterID)
		if err != nil || !sameGossipKeys(was, c.Spec.Gossip) {
			return err // somebody else took the step
		}
		tx.RequireTerm(term)
		c.Spec.Gossip = next
		return configdb.Clusters.UpdateSpec(v, tx, &c)
	})
	if err == nil {
		k.m.log.Info("gossip keys written", "next", len(next.Next) > 0, "previous", len(next.Previous) > 0, "removed", next.Removed)
	}
	return err
}

// removedNodes counts the removed nodes; await is whether one of them is still in
// the group, and would be sent a new key.
func (m *member) removedNodes(v *configdb.View) (n int, await bool, err error) {
	members, err := m.store.Members()
	if err != nil {
		return 0, false, err
	}
	for range v.Scan(removedPrefix, "") {
		n++
	}
	for _, mb := range members {
		if m.trusted(mb.NodeID) != nil {
			await = true
		}
	}
	return n, await, nil
}

// next returns the keys that take the place of those that are there, or nil.
func (k *keyKeeper) next(c *api.ClusterSpec, removed int, await, settled bool) (*api.GossipKeys, error) {
	now := c.Gossip
	if now != nil {
		if _, err := k.m.gossipKeys(c); err != nil {
			k.m.log.Warn("gossip keys cannot be opened with this cluster's key; new ones are made", "err", err)
			now = nil
		}
	}
	switch {
	case now == nil:
		return firstGossipKeys(k.m.info.clusterKey, removed)
	case len(now.Next) > 0 && settled:
		return &api.GossipKeys{Primary: now.Next, Previous: now.Primary, Removed: now.Removed}, nil
	case len(now.Next) > 0:
		return nil, nil
	case len(now.Previous) > 0 && settled:
		return &api.GossipKeys{Primary: now.Primary, Removed: now.Removed}, nil
	case len(now.Previous) > 0:
		return nil, nil
	case now.Removed == removed || await:
		return nil, nil
	}
	fresh, err := newGossipKey(k.m.info.clusterKey)
	if err != nil {
		return nil, err
	}
	return &api.GossipKeys{Primary: now.Primary, Next: fresh, Removed: removed}, nil
}

func firstGossipKeys(clusterKey []byte, removed int) (*api.GossipKeys, error) {
	fresh, err := newGossipKey(clusterKey)
	return &api.GossipKeys{Primary: fresh, Removed: removed}, err
}

// newGossipKey returns a new secret of gossip, sealed.
func newGossipKey(clusterKey []byte) ([]byte, error) {
	return pki.Seal(clusterKey, gossipKeyLabel, pki.NewSecret(gossip.KeyBytes))
}

func sameGossipKeys(a, b *api.GossipKeys) bool {
	if a == nil || b == nil {
		return a == b
	}
	return bytes.Equal(a.Primary, b.Primary) && bytes.Equal(a.Next, b.Next) && bytes.Equal(a.Previous, b.Previous) && a.Removed == b.Removed
}
