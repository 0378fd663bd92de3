// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"encoding/hex"
	"net/http"
	"net/netip"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

type ippoolResource struct {
	resource[api.IPPoolSpec, api.IPPoolStatus]
}

func newIPPools() *ippoolResource {
	r := &ippoolResource{resource[api.IPPoolSpec, api.IPPoolStatus]{table: configdb.IPPools, need: needViewer, global: true, show: showIPPool}}
	r.update, r.past = r.change, r.reverts()
	return r
}

func (r *ippoolResource) routes() []route {
	post := makes(&r.resource, needAdministrator, r.create)
	post.out, post.status, post.params = typeOf[api.IPPool](), http.StatusCreated, saveParams
	return append(append(reads(&r.resource), writes(&r.resource, needAdministrator)...), post, removes(&r.resource, r.delete))
}

// showIPPool counts the addresses of the range that are reserved.
func showIPPool(v *configdb.View, o *api.IPPool) {
	o.Status = api.IPPoolStatus{Total: o.Spec.Total()}
	n, err := configdb.Networks.Find(v, api.DefaultProject, o.Spec.Network)
	if err != nil {
		return
	}
	first, last := o.Spec.Range()
	for a := range reserved(v, n.Meta.ID) {
		if !a.Less(first) && !last.Less(a) {
			o.Status.Used++
		}
	}
}

// reserved yields the addresses that are claimed in a network, in order.
func reserved(v *configdb.View, networkID string) func(func(netip.Addr) bool) {
	prefix := configdb.AddressPrefix(networkID)
	return func(yield func(netip.Addr) bool) {
		for e := range v.Scan(prefix, "") {
			b, _ := hex.DecodeString(strings.TrimPrefix(e.Key, prefix))
			if a, ok := netip.AddrFromSlice(b); ok && !yield(a) {
				return
			}
		}
	}
}

// create answers POST /ippools.
func (r *ippoolResource) create(q *request) error {
	o, body, err := r.decodeNew(q)
	if err != nil {
		return err
	}
	out, err := q.change(body, func(c *change) (*effect, error) {
		pool := o.Clone()
		return r.make(c, &pool)
	})
	if err != nil {
		return err
	}
	q.w.Header().Set("Location", base+"ippools/"+out.id)
	return q.answerObject(out)
}

func (r *ippoolResource) make(c *change, pool *api.IPPool) (*effect, error) {
	n, err := configdb.Networks.Find(c.v, api.DefaultProject, pool.Spec.Network)
	if err != nil {
		return nil, atField(err, "spec.network")
	}
	if err := r.resource.create(c, pool); err != nil {
		return nil, err
	}
	key := configdb.NetworkPoolKey(n.Meta.ID)
	if _, taken := c.v.Get(key); taken {
		detail := "network " + n.Meta.Name + " has an IP pool already"
		if by, ok := configdb.NetworkPool(c.v, n.Meta.ID); ok {
			detail = "network " + n.Meta.Name + " has the IP pool " + by.Meta.Name + " (" + by.Spec.CIDR + ") already" + overlap(by.Spec.CIDR, pool.Spec.CIDR)
		}
		return nil, &api.Error{Code: api.CodeRefused, Field: "spec.network", Detail: detail + "; a network has one"}
	}
	c.tx.RequireRevision(key, 0)
	c.tx.Put(key, []byte(pool.Meta.ID))
	c.tx.RequireRevision(configdb.Networks.SpecKey(n.Meta.ID), n.Meta.Revision)
	configdb.Networks.Refer(c.tx, n.Meta.ID, api.KindIPPool, pool.Meta.ID)
	return &effect{status: http.StatusCreated, kind: api.KindIPPool, id: pool.Meta.ID, object: pool}, nil
}

func overlap(a, b string) string {
	p, err := netip.ParsePrefix(a)
	o, err2 := netip.ParsePrefix(b)
	if err == nil && err2 == nil && p.Overlaps(o) {
		return ", which " + b + " overlaps"
	}
	return ""
}

// change carries out a PUT or PATCH: what guests are told may change, and the
// range for later reservations.
func (r *ippoolResource) change(c *change, old, want *api.IPPool) (*effect, error) {
	switch {
	case want.Spec.Network != old.Spec.Network:
		return nil, api.Invalid("spec.network", "cannot be changed; create another pool")
	case want.Spec.CIDR != old.Spec.CIDR:
		return nil, api.Invalid("spec.cidr", "cannot be changed; create another pool")
	}
	if want.Spec.Gateway != old.Spec.Gateway && want.Spec.Gateway != "" {
		n, err := configdb.Networks.Find(c.v, api.DefaultProject, want.Spec.Network)
		if err != nil {
			return nil, err
		}
		key := configdb.AddressKey(n.Meta.ID, netip.MustParseAddr(want.Spec.Gateway)) // validated
		if e, taken := c.v.Get(key); taken {
			return nil, &api.Error{Code: api.CodeRefused, Field: "spec.gateway", Detail: "the address belongs to " + c.names([]string{string(api.KindVM) + "/" + string(e.Value)})}
		}
		c.tx.RequireRevision(key, 0)
	}
	return r.store(c, want)
}

// delete answers DELETE /ippools/{name}.
func (r *ippoolResource) delete(q *request) error { return r.drop(q, r.unmake) }

func (r *ippoolResource) unmake(c *change, o *api.IPPool) error {
	n, err := configdb.Networks.Find(c.v, api.DefaultProject, o.Spec.Network)
	if err != nil {
		return err
	}
	var users []string
	for e := range c.v.Scan(configdb.AddressPrefix(n.Meta.ID), "") {
		users = append(users, string(api.KindVM)+"/"+string(e.Value))
	}
	if len(users) > 0 {
		return api.Errorf(api.CodeRefused, "%s is used by %s", r.label(&o.Meta), c.names(users))
	}
	c.tx.RequireEmpty(configdb.AddressPrefix(n.Meta.ID))
	c.tx.Delete(configdb.NetworkPoolKey(n.Meta.ID))
	configdb.Networks.Release(c.tx, n.Meta.ID, api.KindIPPool, o.Meta.ID)
	return nil
}
