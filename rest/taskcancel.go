// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"net/http"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

func (r *taskResource) cancelRoute() route {
	return route{
		method: http.MethodPost, path: base + "tasks/{name}/cancel", need: needOperator, handle: r.cancel,
		summary: "Ask for the end of a task that can be given up, such as a migration", params: longParams,
		out: typeOf[TaskReply](), status: http.StatusAccepted, verb: "cancel",
	}
}

// cancel answers POST /tasks/{id}/cancel. The task ends as cancelled unless its
// work is past the point at which it can be given up.
func (r *taskResource) cancel(q *request) error {
	out, err := q.change(nil, func(c *change) (*effect, error) {
		t, err := r.find(q, c.v)
		if err != nil {
			return nil, err
		}
		if t.Status.Phase.Final() {
			return nil, api.Errorf(api.CodeRefused, "task %s is over: %s", t.Meta.ID, t.Status.Phase)
		}
		if r, err := configdb.RollingReboots.Get(c.v, t.Spec.TargetID); err == nil && r.Spec.TaskID == t.Meta.ID {
			r.Spec.Cancel = true
			return cancelled(&t), configdb.RollingReboots.UpdateSpec(c.v, c.tx, &r)
		}
		if r, err := configdb.Reboots.Get(c.v, t.Spec.TargetID); err == nil && r.Spec.TaskID == t.Meta.ID {
			return c.cancelReboot(&t, &r)
		}
		if d, err := configdb.Drills.Get(c.v, t.Spec.TargetID); err == nil && d.Spec.TaskID == t.Meta.ID {
			return c.cancelDrill(&t, &d)
		}
		if e, err := configdb.Evacuations.Get(c.v, t.Spec.TargetID); err == nil && e.Spec.TaskID == t.Meta.ID {
			e.Spec.Cancel = true
			return cancelled(&t), configdb.Evacuations.UpdateSpec(c.v, c.tx, &e)
		}
		op, err := configdb.Operations.Get(c.v, t.Spec.TargetID)
		if err != nil || op.Spec.TaskID != t.Meta.ID {
			if api.IgnoreNotFound(err) != nil {
				return nil, err
			}
			return nil, api.Errorf(api.CodeRefused, "task %s (%s) cannot be cancelled; state another wish for %s %s instead", t.Meta.ID, t.Spec.Action, t.Spec.TargetKind, t.Spec.Target)
		}
		if op.Spec.Migration == nil && op.Spec.Move == nil {
			return nil, api.Errorf(api.CodeRefused, "task %s (%s) cannot be cancelled, and takes back by itself what it has done if it fails; muster vm stop --force %s ends the VM, and with it work on what runs", t.Meta.ID, t.Spec.Action, t.Spec.Target)
		}
		op.Spec.Cancel = true
		return cancelled(&t), configdb.Operations.UpdateSpec(c.v, c.tx, &op)
	})
	if err != nil {
		return err
	}
	return q.answerTask(out)
}

func cancelled(t *api.Task) *effect {
	return &effect{status: http.StatusAccepted, kind: api.KindTask, id: t.Meta.ID, task: t.Meta.ID, object: t}
}
