// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"net/http"

	"github.com/muster-vm/muster/api"
)

func (r *vmResource) migrationRoutes() []route {
	return append(r.migrationReads(), route{
		method: http.MethodPost, path: base + "vms/{name}/migrate", need: needOperator, handle: r.migrate,
		summary: "Move a running VM to another node without stopping it", params: longParams,
		in: typeOf[api.MigrateRequest](), out: typeOf[TaskReply](), status: http.StatusAccepted,
	})
}

// migrate answers POST /vms/{name}/migrate.
func (r *vmResource) migrate(q *request) error {
	var in api.MigrateRequest
	body, err := q.wish(&in)
	if err != nil {
		return err
	}
	out, err := q.change(body, func(c *change) (*effect, error) {
		vm, err := r.find(c.q, c.v)
		if err != nil {
			return nil, err
		}
		m := Migration{Placer: c.q.s.cfg.Placer, Actor: c.q.who.actor, Now: c.q.s.cfg.Now(), Reserve: c.reserve}
		task, err := m.Begin(c.v, c.tx, vm, &in)
		if err != nil {
			return nil, err
		}
		return &effect{status: http.StatusAccepted, kind: api.KindVM, id: vm.Meta.ID, task: task}, nil
	})
	if err != nil {
		return err
	}
	return q.answerTask(out)
}
