// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"net/http"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

type uplinkResource struct {
	resource[api.UplinkSpec, api.UplinkStatus]
}

func newUplinks() *uplinkResource {
	r := &uplinkResource{resource[api.UplinkSpec, api.UplinkStatus]{table: configdb.Uplinks, need: needViewer, global: true}}
	r.update = func(c *change, old, want *api.Uplink) (*effect, error) {
		if want.Spec.Node != old.Spec.Node {
			return nil, api.Invalid("spec.node", "cannot be changed; create another uplink")
		}
		return r.store(c, want)
	}
	r.past = r.reverts()
	return r
}

func (r *uplinkResource) routes() []route {
	post := makes(&r.resource, needAdministrator, r.create)
	post.out, post.status, post.params = typeOf[api.Uplink](), http.StatusCreated, saveParams
	return append(append(reads(&r.resource), writes(&r.resource, needAdministrator)...), post, removes(&r.resource, r.delete))
}

// create answers POST /uplinks.
func (r *uplinkResource) create(q *request) error {
	o, body, err := r.decodeNew(q)
	if err != nil {
		return err
	}
	out, err := q.change(body, func(c *change) (*effect, error) {
		up := o.Clone()
		return r.make(c, &up)
	})
	if err != nil {
		return err
	}
	q.w.Header().Set("Location", base+"uplinks/"+out.id)
	return q.answerObject(out)
}

func (r *uplinkResource) make(c *change, up *api.Uplink) (*effect, error) {
	n, err := configdb.Nodes.Find(c.v, api.DefaultProject, up.Spec.Node)
	if err != nil {
		return nil, atField(err, "spec.node")
	}
	up.Spec.Node = n.Meta.Name // it may have been an ID
	if err := r.resource.create(c, up); err != nil {
		return nil, err
	}
	key := configdb.UplinkKey(n.Meta.ID)
	if by, taken := c.v.Get(key); taken {
		return nil, &api.Error{Code: api.CodeRefused, Field: "spec.node", Detail: "node " + n.Meta.Name + " has the " +
			c.names([]string{string(api.KindUplink) + "/" + string(by.Value)}) + " already; a node has one"}
	}
	c.tx.RequireRevision(key, 0)
	c.tx.Put(key, []byte(up.Meta.ID))
	c.tx.RequireExists(configdb.Nodes.SpecKey(n.Meta.ID))
	return &effect{status: http.StatusCreated, kind: api.KindUplink, id: up.Meta.ID, object: up}, nil
}

// delete answers DELETE /uplinks/{name}.
func (r *uplinkResource) delete(q *request) error { return r.drop(q, r.unmake) }

func (r *uplinkResource) unmake(c *change, o *api.Uplink) error {
	// The node may be gone, and another may have its name by now: the claim is
	// found by its value.
	for e := range c.v.Scan(configdb.UplinkKey(""), "") {
		if string(e.Value) == o.Meta.ID {
			c.tx.Delete(e.Key)
		}
	}
	return nil
}
