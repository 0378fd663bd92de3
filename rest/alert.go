// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"net/http"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

type alertResource struct {
	resource[api.AlertSpec, api.AlertStatus]
}

func newAlerts() *alertResource {
	return &alertResource{resource[api.AlertSpec, api.AlertStatus]{table: configdb.Alerts, need: needViewer, global: true}}
}

func (r *alertResource) routes() []route {
	return append(reads(&r.resource), route{
		method: http.MethodPost, path: base + "alerts/{name}/acknowledge", need: needOperator, handle: r.acknowledge,
		summary: "Say that somebody cares about an alert", params: []string{"minRevision"}, out: typeOf[api.Alert](), status: http.StatusOK,
	})
}

// acknowledge answers POST /alerts/{id}/acknowledge. The first one counts; it
// ends with the occurrence.
func (r *alertResource) acknowledge(q *request) error {
	out, err := q.change(nil, func(c *change) (*effect, error) {
		a, err := r.find(q, c.v)
		if err != nil {
			return nil, err
		}
		if a.Status.Phase == api.AlertResolved {
			return nil, api.Errorf(api.CodeRefused, "alert %s is resolved already", a.Meta.ID)
		}
		if a.Spec.AcknowledgedBy == "" {
			now := q.s.cfg.Now().UTC()
			a.Spec.AcknowledgedBy, a.Spec.AcknowledgedAt = q.who.actor, &now
			// It is of this occurrence, which must not have ended meanwhile.
			c.tx.RequireRevision(configdb.Alerts.StatusKey(a.Meta.ID), a.Meta.StatusRevision)
			return r.store(c, &a)
		}
		return &effect{status: http.StatusOK, kind: api.KindAlert, id: a.Meta.ID, object: &a}, nil
	})
	if err != nil {
		return err
	}
	return q.answerObject(out)
}
