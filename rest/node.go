// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

type nodeResource struct {
	resource[api.NodeSpec, api.NodeStatus]
}

func newNodes() *nodeResource {
	r := &nodeResource{resource[api.NodeSpec, api.NodeStatus]{table: configdb.Nodes, need: needViewer, global: true}}
	r.update = func(c *change, old, want *api.Node) (*effect, error) {
		switch {
		case want.Spec.Address == "":
			want.Spec.Address = old.Spec.Address // a PUT may leave out what is read-only
		case want.Spec.Address != old.Spec.Address:
			return nil, api.Invalid("spec.address", "cannot be changed; it is given when the node joins")
		}
		if want.Spec.Role != old.Spec.Role && (want.Spec.Role == api.RoleWitness || old.Spec.Role == api.RoleWitness) {
			return nil, api.Invalid("spec.role", "witness is chosen when a node joins, as it runs no VM; remove the node and let it join with the other role")
		}
		return r.store(c, want)
	}
	r.past = r.reverts()
	return r
}

// delete answers DELETE /nodes/{name}: the node leaves the cluster for good.
func (r *nodeResource) delete(q *request) error {
	force, err := q.boolParam("force")
	if err != nil {
		return err
	}
	cond, err := q.match("If-Match")
	if err != nil {
		return err
	}
	v, err := q.freshView(readTimeout)
	if err != nil {
		return err
	}
	n, err := r.find(q, v)
	if err != nil {
		return err
	}
	if err := cond.check(r.label(&n.Meta), n.Meta.Revision); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(q.ctx(), replyTimeout)
	defer cancel()
	if err := q.s.cfg.Cluster.RemoveNode(ctx, q.auditEvent(api.KindNode, n.Meta), n.Meta.Name, force); err != nil {
		return err
	}
	q.noContent(q.db.Local().Revision())
	return nil
}
