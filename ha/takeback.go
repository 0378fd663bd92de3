// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

const (
	// takeBackEvery is the pause between looks at this node's fences.
	takeBackEvery = time.Second
	// findEvery is the pause between looks for fences that nobody marked.
	findEvery = 30 * time.Second
	// admitLimit bounds one call of a pool.
	admitLimit = 20 * time.Second
)

// Lease is this node's, as Keeper has it.
type Lease interface {
	Current() (session, revision uint64, ok bool)
}

// Admitter opens pools to this node again.
type Admitter interface {
	// Admit takes the addresses of a fence, and those that this node has now, off
	// the pool's list, and returns when that is in force.
	Admit(ctx context.Context, f api.StorageFence) error
	// Barred returns the fences of this node that pools have, whether they are marked
	// or not.
	Barred(ctx context.Context) ([]api.StorageFence, error)
}

// TakeBack ends the fences of this node when nothing of what they are about is left;
// see DESIGN.md, "The storage guard".
type TakeBack struct {
	c     TakeBackConfig
	found time.Time
	said  map[string]string // what each fence waits for
	doubt string            // why it is not known whether there are others
}

// TakeBackConfig describes it.
type TakeBackConfig struct {
	DB     configdb.DB
	NodeID string
	Lease  Lease
	// Quiet reports that no process that may use the pool is left or about to be
	// started, and that none will be while the database has a fence; or what is left.
	Quiet func(ctx context.Context, poolID string) (left string, err error)
	Pools Admitter
	Log   *slog.Logger
}

// NewTakeBack returns one that has not looked yet.
func NewTakeBack(c TakeBackConfig) *TakeBack {
	return &TakeBack{c: c, said: map[string]string{}}
}

// Run looks until the context ends.
func (t *TakeBack) Run(ctx context.Context) error {
	tick := time.NewTicker(takeBackEvery)
	defer tick.Stop()
	for {
		if err := t.find(ctx); err != nil && ctx.Err() == nil && t.doubt != err.Error() {
			t.doubt = err.Error()
			t.c.Log.Warn("it is not known whether this node is locked out of pools", "err", err)
		}
		t.look(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// current returns this node as a view has it that is no older than its lease.
func (t *TakeBack) current() (n api.Node, ok bool) {
	_, rev, ok := t.c.Lease.Current()
	v := t.c.DB.Local()
	if !ok || v.Revision() < rev {
		return n, false
	}
	n, err := configdb.Nodes.Get(v, t.c.NodeID)
	return n, err == nil && n.Status.Phase == api.NodeReady
}

// look tries to end each fence that is marked.
func (t *TakeBack) look(ctx context.Context) {
	n, ok := t.current()
	if !ok {
		return
	}
	for _, f := range n.Status.StorageFences {
		left, err := t.end(ctx, f)
		if err != nil {
			left = err.Error()
		}
		if ctx.Err() == nil && left != t.said[f.ID] {
			if left != "" {
				t.c.Log.Warn("this node stays locked out of a pool", "pool", f.Pool, "why", left)
			}
			t.said[f.ID] = left
		}
	}
}

// end ends one fence. left says what stands in its way.
func (t *TakeBack) end(ctx context.Context, f api.StorageFence) (left string, err error) {
	ctx, cancel := context.WithTimeout(ctx, admitLimit)
	defer cancel()
	if left, err = t.c.Quiet(ctx, f.PoolID); left != "" || err != nil {
		return left, err
	}
	if err := t.c.Pools.Admit(ctx, f); err != nil {
		return "", err
	}
	_, err = configdb.Transact(ctx, t.c.DB, Actor, 4, func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Get(v, t.c.NodeID)
		if err != nil {
			return err
		}
		if now, ok := n.Status.FenceOf(f.PoolID); ok && now.ID == f.ID {
			if err := noteReturn(v, tx, 0, now.Failover); err != nil {
				return err
			}
		}
		n.Status.StorageFences = slices.DeleteFunc(slices.Clone(n.Status.StorageFences), func(o api.StorageFence) bool { return o.ID == f.ID })
		return configdb.Nodes.UpdateStatus(v, tx, &n)
	})
	if err == nil {
		t.c.Log.Info("this node is not locked out of a pool any more", "pool", f.Pool)
		delete(t.said, f.ID)
	}
	return "", err
}

// find marks what locks this node out without a mark, as what a leader commanded
// late, so that it is ended as any other.
func (t *TakeBack) find(ctx context.Context) error {
	if time.Since(t.found) < findEvery {
		return nil
	}
	if _, ok := t.current(); !ok {
		return nil
	}
	t.found = time.Now()
	fctx, cancel := context.WithTimeout(ctx, admitLimit)
	defer cancel()
	barred, err := t.c.Pools.Barred(fctx)
	if len(barred) == 0 {
		return err
	}
	_, merr := configdb.Transact(ctx, t.c.DB, Actor, 4, func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Get(v, t.c.NodeID)
		if err != nil {
			return err
		}
		fences := slices.Clone(n.Status.StorageFences)
		for _, f := range barred {
			if _, marked := n.Status.FenceOf(f.PoolID); !marked {
				f.ID, f.BeganAt, f.Reason = api.NewID(), time.Now().UTC(), "found on the pool's list"
				fences = append(fences, f)
			}
		}
		n.Status.StorageFences = fences
		return configdb.Nodes.UpdateStatus(v, tx, &n)
	})
	return errors.Join(err, merr)
}
