// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"net/http"
	"slices"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// Limits of power devices.
const (
	maxPowerDevices = 1024
	maxPowerReason  = 200
	// powerTimeout bounds a call that speaks to the devices of a node.
	powerTimeout = 3 * time.Minute
)

// Power is what speaks to the power devices of nodes.
type Power interface {
	// SealPassword encrypts the password of a device for the database.
	SealPassword(deviceID, password string) ([]byte, error)
	// Check asks all devices of a node, from here, and switches nothing.
	Check(ctx context.Context, n api.Node) (api.PowerReport, error)
	// Do carries out an action from here, whose record it keeps.
	Do(ctx context.Context, n api.Node, a api.PowerAction) (api.PowerAction, error)
}

func (s *Server) power() (Power, error) {
	if s.cfg.Power == nil {
		return nil, api.Errorf(api.CodeUnsupported, "this node speaks to no power devices")
	}
	return s.cfg.Power, nil
}

type powerDeviceResource struct {
	resource[api.PowerDeviceSpec, struct{}]
}

// newPowerDevices: what can switch hosts off, and by whose account, is for
// administrators.
func (s *Server) newPowerDevices() *powerDeviceResource {
	r := &powerDeviceResource{resource[api.PowerDeviceSpec, struct{}]{
		table: configdb.PowerDevices, need: needAdministrator, global: true,
		show: func(_ *configdb.View, o *api.PowerDevice) {
			o.Spec.PasswordSet = len(o.Spec.SealedPassword) > 0
			o.Spec.Password, o.Spec.SealedPassword = "", nil
		},
	}}
	r.update = func(c *change, old, want *api.PowerDevice) (*effect, error) {
		if want.Spec.Node != old.Spec.Node {
			return nil, api.Invalid("spec.node", "cannot be changed from %q; remove the device and add it to the other node", old.Spec.Node)
		}
		want.Spec.NodeID, want.Spec.SealedPassword = old.Spec.NodeID, old.Spec.SealedPassword
		if field := leadsElsewhere(&old.Spec, &want.Spec); field != "" && want.Spec.Password == "" {
			return nil, api.Invalid("spec.password", "is missing; give it again, because spec.%s changes and the stored one would be sent to what that leads to", field)
		}
		if err := s.sealPassword(want); err != nil {
			return nil, err
		}
		return r.store(c, want)
	}
	r.past = r.reverts()
	return r
}

// leadsElsewhere names a field whose change decides who gets to see the
// password.
func leadsElsewhere(old, want *api.PowerDeviceSpec) string {
	switch {
	case old.Driver != want.Driver:
		return "driver"
	case old.Address != want.Address:
		return "address"
	case old.PortOrDefault() != want.PortOrDefault():
		return "port"
	case old.User != want.User:
		return "user"
	case old.CACert != want.CACert:
		return "caCert"
	case old.Fingerprint != want.Fingerprint:
		return "fingerprint"
	}
	return ""
}

// sealPassword moves a password that was given into its sealed form.
func (s *Server) sealPassword(o *api.PowerDevice) error {
	password := o.Spec.Password
	o.Spec.Password, o.Spec.PasswordSet = "", false
	if password == "" {
		if len(o.Spec.SealedPassword) == 0 {
			return api.Invalid("spec.password", "is missing; a power device needs one")
		}
		return nil
	}
	p, err := s.power()
	if err != nil {
		return err
	}
	o.Spec.SealedPassword, err = p.SealPassword(o.Meta.ID, password)
	return err
}

func (s *Server) powerRoutes(nodes *nodeResource) []route {
	devices := s.newPowerDevices()
	actions := &resource[api.PowerActionSpec, api.PowerActionStatus]{table: configdb.PowerActions, need: needViewer, global: true}
	s.kinds[api.KindPowerDevice], s.kinds[api.KindPowerAction] = devices, actions
	create := makes(&devices.resource, needAdministrator, func(q *request) error {
		return createPlain(q, &devices.resource, maxPowerDevices, func(o *api.PowerDevice) error {
			v, err := q.freshView(readTimeout)
			if err != nil {
				return err
			}
			n, err := configdb.Nodes.Find(v, "", o.Spec.Node)
			if err != nil {
				return api.Invalid("spec.node", "names the node %q, which does not exist", clip(o.Spec.Node))
			}
			o.Spec.Node, o.Spec.NodeID, o.Spec.SealedPassword = n.Meta.Name, n.Meta.ID, nil
			return s.sealPassword(o)
		})
	})
	create.out, create.status, create.params = typeOf[api.PowerDevice](), http.StatusCreated, saveParams
	path := base + "nodes/{name}/power"
	out := append(reads(&devices.resource), writes(&devices.resource, needAdministrator)...)
	out = append(out, create, removes(&devices.resource, func(q *request) error { return devices.drop(q, nil) }))
	out = append(out, reads(actions)...)
	return append(out,
		route{method: http.MethodGet, path: path, need: needAdministrator, handle: nodes.powerReport,
			summary: "Test the power devices of a node: login, state, whose host; switches nothing", params: []string{"via", "minRevision"},
			out: typeOf[api.PowerReport](), status: http.StatusOK, stream: true},
		route{method: http.MethodPost, path: path, need: needAdministrator, handle: nodes.powerDo,
			summary: "Switch a node off, on, or off and on", params: []string{"via", "minRevision"}, in: typeOf[api.PowerRequest](),
			out: typeOf[api.PowerAction](), status: http.StatusOK, stream: true})
}

// powerVia finds the node of a call and who is to ask its devices: the one that
// is named, else the leader, unless that is the node itself.
func (r *nodeResource) powerVia(q *request) (n api.Node, via string, err error) {
	v, err := q.freshView(readTimeout)
	if err != nil {
		return n, "", err
	}
	if n, err = r.find(q, v); err != nil {
		return n, "", err
	}
	if via = q.param("via"); via != "" {
		by, err := configdb.Nodes.Find(v, "", via)
		if err != nil {
			return n, "", api.Invalid("via", "names the node %q, which does not exist", clip(via))
		}
		return n, by.Meta.Name, nil
	}
	if q.who.forwarded {
		return n, q.s.cfg.Node(), nil
	}
	st, err := q.s.cfg.Cluster.Status(q.ctx())
	if err != nil {
		return n, "", err
	}
	if st.Leader != "" && st.Leader != n.Meta.Name {
		return n, st.Leader, nil
	}
	all, err := configdb.Nodes.List(v)
	i := slices.IndexFunc(all, func(o api.Node) bool { return o.Meta.ID != n.Meta.ID && o.Status.Phase == api.NodeReady })
	if i < 0 {
		return n, q.s.cfg.Node(), err
	}
	return n, all[i].Meta.Name, nil
}

// powerReport answers GET /nodes/{name}/power.
func (r *nodeResource) powerReport(q *request) error {
	n, via, err := r.powerVia(q)
	if err != nil {
		return err
	}
	if via != q.s.cfg.Node() {
		return q.proxy(via)
	}
	p, err := q.s.power()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(q.ctx(), powerTimeout)
	defer cancel()
	report, err := p.Check(ctx, n)
	if err != nil {
		return err
	}
	report.Node, report.Via = n.Meta.Name, via
	q.reply(http.StatusOK, q.db.Local().Revision(), report)
	return nil
}

// powerDo answers POST /nodes/{name}/power.
func (r *nodeResource) powerDo(q *request) error {
	n, via, err := r.powerVia(q)
	if err != nil {
		return err
	}
	if via != q.s.cfg.Node() {
		return q.proxy(via)
	}
	body, err := q.body()
	if err != nil {
		return err
	}
	var in api.PowerRequest
	if err := decode(body, &in); err != nil {
		return err
	}
	switch {
	case in.Action != api.PowerOff && in.Action != api.PowerOn && in.Action != api.PowerCycle:
		return api.Invalid("action", "is %q; give off, on or cycle", clip(string(in.Action)))
	case in.Confirm != n.Meta.Name:
		return api.Invalid("confirm", "is %q; repeat the name of the node, %s, to confirm that it is the one", clip(in.Confirm), n.Meta.Name)
	case len(in.Reason) > maxPowerReason:
		return api.Invalid("reason", "is longer than %d characters", maxPowerReason)
	case via == n.Meta.Name && in.Action != api.PowerOn:
		return api.Errorf(api.CodeRefused, "node %s would switch itself off and could not see to the end of it; name another node in ?via=", via)
	}
	p, err := q.s.power()
	if err != nil {
		return err
	}
	a := api.NewPowerAction(&n, in.Action, api.TriggerRequest, q.s.cfg.Now())
	a.Spec.Actor, a.Spec.Via, a.Spec.Reason = q.who.actor, via, in.Reason
	q.auditAlone(api.KindNode, n.Meta)
	// It goes on to its end, whoever asked is still there or not.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(q.ctx()), powerTimeout)
	defer cancel()
	done, err := p.Do(ctx, n, a)
	if err != nil {
		return err
	}
	q.reply(http.StatusOK, q.db.Local().Revision(), done)
	return nil
}
