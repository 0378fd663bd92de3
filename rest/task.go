// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"net/http"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

type taskResource struct {
	resource[api.TaskSpec, api.TaskStatus]
}

func newTasks() *taskResource {
	return &taskResource{resource[api.TaskSpec, api.TaskStatus]{table: configdb.Tasks, need: needViewer}}
}

// get answers GET /tasks/{id}; with ?wait it answers when the task is final or
// the time is over.
func (r *taskResource) get(q *request) error {
	wait, err := q.wait()
	if err != nil {
		return err
	}
	v, err := q.view(fresh)
	if err != nil {
		return err
	}
	t, err := r.find(q, v)
	if err != nil {
		return err
	}
	if wait > 0 && !t.Status.Phase.Final() {
		if t, v, err = q.awaitTask(t, wait); err != nil {
			return err
		}
	}
	q.w.Header().Set("ETag", etag(t.Meta.Revision))
	q.reply(http.StatusOK, v.Revision(), &t)
	return nil
}
