// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/hostboot"
	"github.com/muster-vm/muster/reconcile"
)

// Intervals and steps of the check of a pool.
const (
	checkInterval  = 10 * time.Second
	verifyInterval = 500 * time.Millisecond
	// confirmGrace is how long a node that wants to be ready waits for another
	// one's confirmation before it calls the directory a different one.
	confirmGrace = 15 * time.Second
	// staleGrace is how long a ready pool tolerates that another node's stamp
	// is not what it published: NFS clients cache attributes up to a minute.
	staleGrace = 90 * time.Second
	// spaceStep: free and total space are written when they changed by more
	// than 1/spaceStep of the total (5 %).
	spaceStep = 20
)

// localPool is what this process knows of a pool.
type localPool struct {
	id, name, what, path string
	check, work          *lane
	notes                *noteBox // nil for types that have none

	// Under the lock of the service: made anew when the pool's definition changes.
	driver   driver
	revision uint64

	mu      sync.Mutex
	checked bool // a check of this process succeeded and found it ready
	cleaned bool // leftovers in tmp/ were removed

	// Of the pool loop only, which handles one pool once at a time.
	stamp    string    // written by this process
	root     rootID    // of the directory when the stamp was written
	since    time.Time // when the wait for confirmation began
	badSince time.Time // when a ready pool first missed another's stamp

	// Of pools of type rbd: the space as it was asked for last (since), and whether
	// unfinished images were removed.
	space space
	swept bool
}

func (lp *localPool) usable() bool {
	lp.mu.Lock()
	defer lp.mu.Unlock()
	return lp.checked
}

func (lp *localPool) setUsable(ok bool) (changed bool) {
	lp.mu.Lock()
	defer lp.mu.Unlock()
	changed = lp.checked != ok
	lp.checked = ok
	return changed
}

// verdict is what a check of a pool says, to be written if it is new.
type verdict struct {
	ready  bool
	reason string
	stamp  string
	space  space
	// root is that of the directory, if it answers, of a pool of type shared. One of
	// type rbd has no other than itself: its name never changes, and a Ceph cluster that
	// is another one does not know its key.
	root *rootID
	// addresses under which the pool sees this node, if they were looked for.
	addresses []string
	// again is when to look again.
	again time.Duration
	// notes says which notes fail, of a pool that is ready.
	notes string
}

// reconcilePool checks one pool on this node and writes its PoolState.
func (s *Service) reconcilePool(ctx context.Context, id string) (reconcile.Result, error) {
	v := s.cfg.DB.Local()
	pool, err := configdb.Pools.Get(v, id)
	if api.CodeOf(err) == api.CodeNotFound && err != nil {
		return reconcile.Result{}, s.forgetPool(ctx, v, id)
	}
	if err != nil {
		return reconcile.Result{}, err
	}
	if _, err := configdb.Nodes.Get(v, s.cfg.NodeID); err != nil {
		return reconcile.Result{After: checkInterval}, nil // not a member yet, or not any more
	}
	lp := s.local(pool)
	got, err := s.checkPool(ctx, v, pool, lp)
	if err != nil {
		return reconcile.Result{}, err
	}
	lp.notes.saw(got.ready, got.root) // whether that can be written or not
	if got.ready {
		got.notes = s.nodeNames(lp.notes.trouble(s.cfg.Now()))
	}
	// Before the write, so that who sees the pool ready finds it usable.
	changed := lp.setUsable(got.ready)
	if err := s.writePoolState(ctx, v, pool, got); err != nil {
		lp.setUsable(false)
		return reconcile.Result{}, err
	}
	if changed && got.ready {
		s.wake(v, pool) // the stored state may be the same as in our last life
	}
	return reconcile.Result{After: got.again}, nil
}

// wake makes the objects of a pool look again.
func (s *Service) wake(v *configdb.View, pool api.Pool) {
	for _, id := range s.unfinishedImages(v, pool.Meta.Name) {
		s.images.Enqueue(id)
	}
	for _, id := range s.unfinishedVolumes(v, pool.Meta.Name) {
		s.volumes.Enqueue(id)
	}
}

// stateOf returns this node's stored state of a pool, or a new one.
func (s *Service) stateOf(v *configdb.View, poolID string) (st api.PoolState, known bool, err error) {
	id := configdb.PoolStateID(poolID, s.cfg.NodeID)
	st, err = configdb.PoolStates.Get(v, id)
	if err == nil {
		return st, true, nil
	}
	if api.CodeOf(err) != api.CodeNotFound {
		return st, false, err
	}
	m := api.NewMeta(api.KindPoolState, api.DefaultProject, id)
	m.ID = id
	spec := api.PoolStateSpec{PoolID: poolID, NodeID: s.cfg.NodeID}
	return api.PoolState{Meta: m, Spec: spec}, false, nil
}

// writePoolState writes a verdict if it says something new. The step to ready
// of a shared pool is decided under a key of its own, so that of two nodes
// with different directories only one can ever take it.
func (s *Service) writePoolState(ctx context.Context, v *configdb.View, pool api.Pool, got verdict) error {
	st, known, err := s.stateOf(v, pool.Meta.ID)
	if err != nil {
		return err
	}
	was := st.Status.Ready
	st.Status.Node, st.Status.Ready, st.Status.Reason = s.cfg.NodeName, got.ready, got.reason
	st.Status.Notes = got.notes
	if got.stamp != "" {
		st.Status.Stamp = got.stamp
	}
	if got.ready {
		st.Status.Total = got.space.step(st.Status.Total, got.space.total)
		st.Status.Free = got.space.step(st.Status.Free, got.space.free)
	}
	addAddresses(&st.Status, got.addresses, hostboot.ID())
	tx := &configdb.Txn{Actor: "storage"}
	if known {
		err = configdb.PoolStates.UpdateStatus(v, tx, &st)
	} else {
		err = configdb.PoolStates.CreateUnnamed(tx, &st)
	}
	if err != nil || tx.Empty() {
		return err
	}
	tx.RequireExists(configdb.Pools.SpecKey(pool.Meta.ID))
	if pool.Spec.Type == api.PoolShared && got.ready && !was {
		guard := configdb.Root + "storage/ready/" + pool.Meta.ID
		e, _ := v.Get(guard)
		tx.RequireRevision(guard, e.Revision)
		tx.Put(guard, []byte(s.cfg.NodeID))
	}
	if _, err := s.cfg.DB.Txn(ctx, tx); err != nil {
		return fmt.Errorf("write state of pool %q: %w", pool.Meta.Name, err)
	}
	if was != got.ready {
		s.log.Info("pool changed", "pool", pool.Meta.Name, "ready", got.ready, "reason", got.reason)
	}
	return nil
}

// forgetPool cleans up after a pool that was deleted: this node's state, stamp
// and the marker. What users put there stays.
func (s *Service) forgetPool(ctx context.Context, v *configdb.View, id string) error {
	s.mu.Lock()
	lp := s.pools[id]
	delete(s.pools, id)
	s.mu.Unlock()
	if lp != nil {
		lp.notes.close()
		if err := s.driverIn(lp).leave(ctx); err != nil {
			s.log.Warn("pool was deleted but its marker stays", "pool", lp.name, "path", lp.path, "err", err)
		}
	}
	st, known, err := s.stateOf(v, id)
	if err != nil || !known {
		return err
	}
	tx := &configdb.Txn{Actor: "storage"}
	configdb.PoolStates.DeleteUnnamed(tx, &st)
	tx.Delete(configdb.Root + "storage/ready/" + id)
	_, err = s.cfg.DB.Txn(ctx, tx)
	return err
}

// checkPool looks at the pool and decides. Whatever is wrong with it is a verdict,
// not an error.
func (s *Service) checkPool(ctx context.Context, v *configdb.View, pool api.Pool, lp *localPool) (verdict, error) {
	st, _, err := s.stateOf(v, pool.Meta.ID)
	if err != nil {
		return verdict{}, err
	}
	if lp.check.hangs(checkDeadline) {
		return verdict{reason: lp.check.hung(checkDeadline).Error(), again: checkInterval}, nil
	}
	return s.driver(pool).check(ctx, v, &pool, st)
}

// other is the state of the same pool on another member.
type other struct {
	nodeID, node, stamp string
	ready               bool // PoolState ready
	alive               bool // node in phase ready
}

func (s *Service) otherStates(v *configdb.View, poolID string) ([]other, error) {
	var out []other
	var errs []error
	for e := range v.Scan(configdb.PoolStates.SpecKey(poolID+"."), "") {
		id, _ := configdb.PoolStates.IDOf(e.Key)
		st, err := configdb.PoolStates.Get(v, id)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if st.Spec.NodeID == s.cfg.NodeID || !api.IsID(st.Spec.NodeID) {
			continue
		}
		node, err := configdb.Nodes.Get(v, st.Spec.NodeID)
		if err != nil {
			continue // removed from the cluster
		}
		out = append(out, other{
			nodeID: st.Spec.NodeID, node: node.Meta.Name, stamp: st.Status.Stamp,
			ready: st.Status.Ready, alive: node.Status.Phase == api.NodeReady,
		})
	}
	return out, errors.Join(errs...)
}
