// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// reassignBatch is how many objects one pass moves; the next pass goes on.
const reassignBatch = 100

// Reassign is one pass of the leader, in its term, over what only an absent
// node would take care of:
//
//   - unfinished or deleting images and volumes of shared pools whose executor
//     is lost, removed or never named get another node that has the pool ready
//     (an import by path stays: the file is on the lost node);
//   - deleting images and volumes in the dir pool of a removed node go, since
//     their files went with the node;
//   - pool states of removed nodes and of deleted pools go.
//
// It writes nothing when there is nothing to do. Call it every few seconds.
func (s *Service) Reassign(ctx context.Context, term uint64) error {
	v := s.cfg.DB.Local()
	p := pass{v: v, term: term}
	if err := p.load(); err != nil {
		return err // a node that cannot be read must not pass for a removed one
	}
	var err error
	images, listErr := configdb.Images.List(v)
	err = errors.Join(err, listErr)
	for _, i := range images {
		work := i.Meta.Deleting() || (i.Status.Phase != api.StorageReady && i.Spec.Path == "" && !p.pinned(&i))
		if to, drop := p.next(i.Meta, i.Spec.Pool, i.Spec.Node, work); to != "" || drop {
			err = errors.Join(err, p.apply(ctx, s.cfg.DB, func(tx *configdb.Txn) error {
				if drop {
					return dropImage(v, tx, i.Meta.ID, p.pools[i.Spec.Pool].Meta.ID)
				}
				o := i.Clone()
				o.Spec.Node = to
				return configdb.Images.UpdateSpec(v, tx, &o)
			}))
		}
	}
	volumes, listErr := configdb.Volumes.List(v)
	err = errors.Join(err, listErr)
	for _, o := range volumes {
		work := o.Meta.Deleting() || o.Status.Phase != api.StorageReady
		if to, drop := p.next(o.Meta, o.Spec.Pool, o.Spec.Node, work); to != "" || drop {
			err = errors.Join(err, p.apply(ctx, s.cfg.DB, func(tx *configdb.Txn) error {
				if drop {
					return dropVolume(v, tx, o.Meta.ID, p.pools[o.Spec.Pool].Meta.ID)
				}
				o := o.Clone()
				o.Spec.Node = to
				return configdb.Volumes.UpdateSpec(v, tx, &o)
			}))
		}
	}
	return errors.Join(err, p.dropStates(ctx, s.cfg.DB))
}

// pass is what one call of Reassign knows.
type pass struct {
	v      *configdb.View
	term   uint64
	moved  int
	nodes  map[string]api.Node // by name
	byID   map[string]api.Node
	pools  map[string]api.Pool // by name
	states []api.PoolState
}

func (p *pass) load() error {
	nodes, err := configdb.Nodes.List(p.v)
	pools, err2 := configdb.Pools.List(p.v)
	states, err3 := configdb.PoolStates.List(p.v)
	p.nodes, p.byID, p.pools, p.states = map[string]api.Node{}, map[string]api.Node{}, map[string]api.Pool{}, states
	for _, n := range nodes {
		p.nodes[n.Meta.Name], p.byID[n.Meta.ID] = n, n
	}
	for _, pool := range pools {
		p.pools[pool.Meta.Name] = pool
	}
	return errors.Join(err, err2, err3)
}

// pinned reports whether what an image is copied from is on one node only.
func (p *pass) pinned(i *api.Image) bool {
	if i.Spec.SourceVolume == "" {
		return false
	}
	vol, err := configdb.Volumes.Find(p.v, i.Meta.Project, i.Spec.SourceVolume)
	return err != nil || !p.shared(vol.Spec.Pool)
}

// next decides about one object: another node, or that it can only be dropped.
func (p *pass) next(m api.Meta, poolName, nodeName string, work bool) (to string, drop bool) {
	pool, ok := p.pools[poolName]
	if !work || !ok {
		return "", false
	}
	node, member := p.nodes[nodeName]
	if member && node.Status.Phase != api.NodeLost {
		return "", false
	}
	if !pool.Spec.Shared() {
		unused := p.v.Empty(configdb.Volumes.RefPrefix(m.ID)) && p.v.Empty(configdb.Images.RefPrefix(m.ID))
		return "", !member && nodeName != "" && m.Deleting() && unused
	}
	var best uint64
	for _, st := range p.states {
		n, ok := p.byID[st.Spec.NodeID]
		if !ok || st.Spec.PoolID != pool.Meta.ID || !st.Status.Ready || n.Status.Phase != api.NodeReady {
			continue
		}
		// Spread by a hash, so that many objects do not all go to one node.
		h := fnv.New64a()
		_, _ = h.Write([]byte(m.ID + "/" + n.Meta.ID))
		if sum := h.Sum64(); to == "" || sum > best {
			to, best = n.Meta.Name, sum
		}
	}
	return to, false
}

// apply commits one decision in the leader's term. A conflict is no error: the
// object changed, and the next pass looks at it again.
func (p *pass) apply(ctx context.Context, db configdb.DB, f func(*configdb.Txn) error) error {
	if p.moved >= reassignBatch {
		return nil
	}
	p.moved++
	tx := &configdb.Txn{Actor: actor}
	tx.RequireTerm(p.term)
	if err := f(tx); err != nil || tx.Empty() {
		return err
	}
	if _, err := db.Txn(ctx, tx); err != nil && !errors.Is(err, configdb.ErrConflict) {
		return fmt.Errorf("reassign storage work: %w", err)
	}
	return nil
}

func (p *pass) dropStates(ctx context.Context, db configdb.DB) error {
	known := map[string]bool{}
	for _, pool := range p.pools {
		known[pool.Meta.ID] = true
	}
	var errs []error
	for _, st := range p.states {
		n, member := p.byID[st.Spec.NodeID]
		// A live node cleans up itself; see forgetPool.
		if member && (known[st.Spec.PoolID] || n.Status.Phase != api.NodeLost) {
			continue
		}
		errs = append(errs, p.apply(ctx, db, func(tx *configdb.Txn) error {
			configdb.PoolStates.DeleteUnnamed(tx, &st)
			return nil
		}))
	}
	return errors.Join(errs...)
}

func (p *pass) shared(pool string) bool {
	o, ok := p.pools[pool]
	return ok && o.Spec.Shared()
}
