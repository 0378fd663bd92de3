// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"net/http"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// poolPathPrefix holds one claim for each directory that is a pool.
const poolPathPrefix = configdb.Root + "claim/poolpath/"

func poolPathKey(path string) string { return poolPathPrefix + digest(path) }

type poolResource struct {
	resource[api.PoolSpec, api.PoolStatus]
}

func newPools() *poolResource {
	r := &poolResource{resource[api.PoolSpec, api.PoolStatus]{
		table: configdb.Pools, need: needViewer, global: true,
		show: func(v *configdb.View, o *api.Pool) {
			hidePoolKey(o)
			o.Status.Capabilities = o.Spec.Capabilities()
			o.Status.Nodes = nil
			for _, st := range poolStates(v, o.Meta.ID) {
				o.Status.Nodes = append(o.Status.Nodes, st.Status)
			}
		},
		also: configdb.PoolStates.StatusPrefix(),
		alsoID: func(key string) string {
			id, _, _ := strings.Cut(strings.TrimPrefix(key, configdb.PoolStates.StatusPrefix()), ".")
			return id
		},
	}}
	r.update, r.past = r.change, r.reverts()
	return r
}

// poolStates returns what each node says about a pool.
func poolStates(v *configdb.View, poolID string) []api.PoolState {
	var out []api.PoolState
	for e := range v.Scan(configdb.PoolStates.SpecPrefix()+poolID+".", "") {
		id, _ := configdb.PoolStates.IDOf(e.Key)
		if st, err := configdb.PoolStates.Get(v, id); err == nil {
			out = append(out, st)
		}
	}
	return out
}

// create answers POST /pools.
func (r *poolResource) create(q *request) error {
	o, body, err := r.decodeNew(q)
	if err != nil {
		return err
	}
	if o.Spec.Ceph != nil {
		o.Spec.Ceph.SealedKey = nil
	}
	if err := q.s.sealPoolKey(&o); err != nil {
		return err
	}
	if o.Spec.Path == "" && o.Spec.Type != api.PoolRBD && o.Meta.Name != api.LocalPool {
		return api.Invalid("spec.path", "is missing; give the absolute path of a directory (only the pool %s has one of its own)", api.LocalPool)
	}
	out, err := q.change(body, func(c *change) (*effect, error) {
		pool := o.Clone()
		return r.make(c, &pool)
	})
	if err != nil {
		return err
	}
	q.w.Header().Set("Location", base+"pools/"+out.id)
	return q.answerObject(out)
}

func (r *poolResource) make(c *change, pool *api.Pool) (*effect, error) {
	if err := mayCeph(c, pool); err != nil {
		return nil, err
	}
	if err := r.claimPath(c, pool.Spec.Path); err != nil {
		return nil, err
	}
	if err := r.resource.create(c, pool); err != nil {
		return nil, err
	}
	return &effect{status: http.StatusCreated, kind: api.KindPool, id: pool.Meta.ID, object: pool}, nil
}

// claimPath makes sure that no directory is two pools: each would delete the
// other's files as left over.
func (r *poolResource) claimPath(c *change, path string) error {
	if path == "" {
		return nil
	}
	pools, err := r.table.List(c.v)
	if err != nil {
		return err
	}
	for _, p := range pools {
		if p.Spec.Path == path {
			return api.Errorf(api.CodeRefused, "pool %s has the path %s already", p.Meta.Name, path)
		}
	}
	c.tx.RequireRevision(poolPathKey(path), 0)
	c.tx.Put(poolPathKey(path), nil)
	return nil
}

// delete answers DELETE /pools/{name}. Files that are none of ours stay.
func (r *poolResource) delete(q *request) error { return r.drop(q, r.unmake) }

func (r *poolResource) unmake(c *change, o *api.Pool) error {
	if o.Meta.Name == api.LocalPool {
		return api.Errorf(api.CodeRefused, "the pool %s is part of every node and cannot be deleted", api.LocalPool)
	}
	if err := r.unreferred(c, &o.Meta); err != nil {
		return err
	}
	for _, st := range poolStates(c.v, o.Meta.ID) {
		configdb.PoolStates.DeleteUnnamed(c.tx, &st)
	}
	if o.Spec.Path != "" {
		c.tx.Delete(poolPathKey(o.Spec.Path))
	}
	return nil
}
