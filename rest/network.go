// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// networkWait is how long the answer to the creation of a network waits for the
// nodes to have it, so that a VM can be created on it at once.
const networkWait = 3 * time.Second

type networkResource struct {
	resource[api.NetworkSpec, api.NetworkStatus]
}

func newNetworks() *networkResource {
	r := &networkResource{resource[api.NetworkSpec, api.NetworkStatus]{
		table: configdb.Networks, need: needViewer, global: true,
		show: func(v *configdb.View, o *api.Network) { o.Status.Nodes = networkNodes(v, o.Meta.Name) },
	}}
	r.update, r.past = r.updateLabels, r.reverts()
	return r
}

func (r *networkResource) routes() []route {
	post := makes(&r.resource, needAdministrator, r.create)
	post.out, post.status, post.params = typeOf[api.Network](), http.StatusCreated, saveParams
	return append(append(reads(&r.resource), writes(&r.resource, needAdministrator)...), post, removes(&r.resource, r.delete))
}

// networkNodes returns what each node that runs VMs says about a network, in
// order of names.
func networkNodes(v *configdb.View, network string) []api.NetworkNode {
	nodes, _ := configdb.Nodes.List(v) // what cannot be read is left out
	var out []api.NetworkNode
	for _, n := range nodes {
		if n.Spec.Role == api.RoleWitness {
			continue
		}
		at := api.NetworkNode{Node: n.Meta.Name}
		st, err := configdb.SwitchStates.Get(v, n.Meta.ID)
		switch {
		case n.Status.Phase == api.NodeLost:
			at.Reason = "the node is lost"
		case err != nil:
			at.Reason = "the node has not reported on its virtual switch"
		default:
			at.Ready, at.Reason = st.Status.Realised(network)
		}
		out = append(out, at)
	}
	slices.SortFunc(out, func(a, b api.NetworkNode) int { return strings.Compare(a.Node, b.Node) })
	return out
}

// create answers POST /networks.
func (r *networkResource) create(q *request) error {
	o, body, err := r.decodeNew(q)
	if err != nil {
		return err
	}
	out, err := q.change(body, func(c *change) (*effect, error) {
		n := o.Clone()
		return r.make(c, &n)
	})
	if err != nil {
		return err
	}
	if err := q.awaitNetwork(o.Meta.Name); err != nil {
		return err
	}
	q.w.Header().Set("Location", base+"networks/"+out.id)
	return q.answerObject(out)
}

func (r *networkResource) make(c *change, n *api.Network) (*effect, error) {
	if err := r.resource.create(c, n); err != nil {
		return nil, err
	}
	if key, field := networkTag(n); key != "" {
		if by, taken := c.v.Get(key); taken {
			return nil, &api.Error{Code: api.CodeRefused, Field: field, Detail: c.names([]string{string(api.KindNetwork) + "/" + string(by.Value)}) + " has this one already; choose another"}
		}
		c.tx.RequireRevision(key, 0)
		c.tx.Put(key, []byte(n.Meta.ID))
	}
	return &effect{status: http.StatusCreated, kind: api.KindNetwork, id: n.Meta.ID, object: n}, nil
}

// networkTag returns the claim of what no other network may have, and the field
// that says it.
func networkTag(n *api.Network) (key, field string) {
	switch n.Spec.Type {
	case api.NetworkVLAN:
		return configdb.VLANKey(n.Spec.VLAN), "spec.vlan"
	case api.NetworkVXLAN:
		return configdb.VNIKey(n.Spec.VNI), "spec.vni"
	}
	return "", ""
}

// awaitNetwork waits, for a while, until every node whose switch works has
// said how it stands with a network.
func (q *request) awaitNetwork(network string) error {
	ctx, cancel := context.WithTimeout(q.ctx(), networkWait)
	defer cancel()
	w := q.db.Watch(configdb.SwitchStates.StatusPrefix(), 0)
	for {
		_, err := w.Next(ctx)
		if networkSettled(q.db.Local(), network) || ctx.Err() != nil && q.ctx().Err() == nil {
			return nil
		}
		if err != nil && !errors.Is(err, configdb.ErrCompacted) {
			return err
		}
		if err != nil {
			w = q.db.Watch(configdb.SwitchStates.StatusPrefix(), 0)
		}
	}
}

func networkSettled(v *configdb.View, network string) bool {
	nodes, _ := configdb.Nodes.List(v)
	for _, n := range nodes {
		st, err := configdb.SwitchStates.Get(v, n.Meta.ID)
		if err != nil || !st.Status.Ready || n.Status.Phase != api.NodeReady {
			continue
		}
		if ok, _ := st.Status.Realised(network); !ok && st.Status.Problems[network] == "" {
			return false
		}
	}
	return true
}

// delete answers DELETE /networks/{name}.
func (r *networkResource) delete(q *request) error { return r.drop(q, r.unmake) }

func (r *networkResource) unmake(c *change, o *api.Network) error {
	if err := r.unreferred(c, &o.Meta); err != nil {
		return err
	}
	if key, _ := networkTag(o); key != "" {
		c.tx.Delete(key)
	}
	return nil
}
