// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"net/http"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// Limits of receivers.
const (
	maxReceivers = 32
	maxSecret    = 1024
	// minSNMPSecret is the shortest pass phrase (RFC 3414 section 11.2).
	minSNMPSecret = 8
	testTimeout   = 30 * time.Second
)

type receiverResource struct {
	resource[api.ReceiverSpec, api.ReceiverStatus]
}

// newReceivers: where alerts go, and by whose account, is for administrators.
func (s *Server) newReceivers() *receiverResource {
	r := &receiverResource{resource[api.ReceiverSpec, api.ReceiverStatus]{
		table: configdb.Receivers, need: needAdministrator, global: true,
		show: func(_ *configdb.View, o *api.Receiver) { o.Spec.Secret, o.Spec.SealedSecret = "", nil },
	}}
	r.update = func(c *change, old, want *api.Receiver) (*effect, error) {
		// What is not given stays: nobody can read it to give it again.
		want.Spec.SealedSecret = old.Spec.SealedSecret
		if err := s.seal(want); err != nil {
			return nil, err
		}
		return r.store(c, want)
	}
	r.past = r.reverts()
	return r
}

func (s *Server) receiverRoutes(r *receiverResource) []route {
	create := makes(&r.resource, needAdministrator, func(q *request) error {
		return createPlain(q, &r.resource, maxReceivers, func(o *api.Receiver) error {
			o.Spec.SealedSecret = nil
			return s.seal(o)
		})
	})
	create.out, create.status, create.params = typeOf[api.Receiver](), http.StatusCreated, saveParams
	return append(append(reads(&r.resource), writes(&r.resource, needAdministrator)...), create,
		removes(&r.resource, func(q *request) error { return r.drop(q, nil) }),
		route{
			method: http.MethodPost, path: base + "receivers/{name}/test", need: needAdministrator, handle: r.test,
			summary: "Send a test message to a receiver", params: []string{"minRevision"}, status: http.StatusNoContent,
		})
}

// seal moves a secret that was given into its sealed form.
func (s *Server) seal(o *api.Receiver) error {
	secret := o.Spec.Secret
	o.Spec.Secret = ""
	snmp := o.Spec.Type == api.ReceiverSNMP
	switch {
	case secret == "" && snmp && len(o.Spec.SealedSecret) == 0:
		return api.Invalid("spec.secret", "is missing; an snmp receiver needs its community or pass phrase")
	case secret == "":
		return nil
	case len(secret) > maxSecret:
		return api.Invalid("spec.secret", "is longer than %d characters", maxSecret)
	case snmp && o.Spec.Version == "3" && len(secret) < minSNMPSecret:
		return api.Invalid("spec.secret", "has fewer than %d characters, which SNMP v3 does not allow", minSNMPSecret)
	}
	m, err := s.monitor()
	if err != nil {
		return err
	}
	o.Spec.SealedSecret, err = m.SealSecret(o.Meta.ID, secret)
	return err
}

// test answers POST /receivers/{name}/test on the leader.
func (r *receiverResource) test(q *request) error {
	v, err := q.freshView(readTimeout)
	if err != nil {
		return err
	}
	o, err := r.find(q, v)
	if err != nil {
		return err
	}
	st, err := q.s.cfg.Cluster.Status(q.ctx())
	if err != nil {
		return err
	}
	switch {
	case st.Leader == "":
		return api.Errorf(api.CodeNoQuorum, "node %s knows no leader, which sends to receivers", q.s.cfg.Node())
	case st.Leader != q.s.cfg.Node():
		return q.proxy(st.Leader)
	}
	m, err := q.s.monitor()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(q.ctx(), testTimeout)
	defer cancel()
	if err := m.TestReceiver(ctx, o.Meta.ID, q.who.actor); err != nil {
		return err
	}
	q.noContent(v.Revision())
	return nil
}
