// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"slices"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb/feature"
)

// PoolKeys encrypts the keys of pools of type rbd for the database.
type PoolKeys interface {
	SealPoolKey(poolID, key string) ([]byte, error)
}

// sealPoolKey moves a cephx key that was given into its sealed form.
func (s *Server) sealPoolKey(o *api.Pool) error {
	c := o.Spec.Ceph
	if c == nil {
		return nil
	}
	key := c.Key
	c.Key, c.KeySet = "", false
	switch {
	case key == "" && len(c.SealedKey) > 0:
		return nil
	case key == "":
		return api.Invalid("spec.ceph.key", "is missing; give the key of client.%s, see: ceph auth get-key client.%s", c.User, c.User)
	case s.cfg.PoolKeys == nil:
		return api.Errorf(api.CodeUnsupported, "this node keeps no keys of pools")
	}
	sealed, err := s.cfg.PoolKeys.SealPoolKey(o.Meta.ID, key)
	c.SealedKey = sealed
	return err
}

// hidePoolKey takes the key out of what is shown.
func hidePoolKey(o *api.Pool) {
	if o.Spec.Ceph == nil {
		return
	}
	shown := *o.Spec.Ceph
	shown.KeySet = len(shown.SealedKey) > 0
	shown.Key, shown.SealedKey = "", nil
	o.Spec.Ceph = &shown
}

// mayCeph refuses pools of type rbd as long as a node does not know them.
func mayCeph(c *change, o *api.Pool) error {
	if f := feature.RBD; o.Spec.Type == api.PoolRBD && !f.InForce(c.v) {
		return api.Errorf(api.CodeRefused, "pools of type rbd need feature level %d, and the cluster is at %d, because a node with older software would take one for a directory; see muster cluster status", f.Level(), max(1, feature.Level(c.v)))
	}
	return nil
}

// change is what PUT and PATCH may do to a pool: labels, and how a Ceph cluster is
// reached. Where its volumes are never changes.
func (r *poolResource) change(c *change, old, want *api.Pool) (*effect, error) {
	if want.Spec.Ceph == nil || old.Spec.Ceph == nil || want.Spec.Type != old.Spec.Type {
		return r.updateLabels(c, old, want)
	}
	was, now := old.Spec.Ceph, want.Spec.Ceph
	switch {
	case now.Pool != was.Pool:
		return nil, api.Invalid("spec.ceph.pool", "cannot be changed from %q: the volumes are there; create another pool", was.Pool)
	case now.Namespace != was.Namespace:
		return nil, api.Invalid("spec.ceph.namespace", "cannot be changed from %q: the volumes are there; create another pool", was.Namespace)
	case now.User != was.User && now.Key == "":
		return nil, api.Invalid("spec.ceph.key", "is missing; give that of client.%s, because spec.ceph.user changes", now.User)
	}
	now.SealedKey = slices.Clone(was.SealedKey)
	if err := c.q.s.sealPoolKey(want); err != nil {
		return nil, err
	}
	return r.store(c, want)
}
