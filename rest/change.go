// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// change is one attempt to carry out a request: a view, and the transaction
// that is decided on it.
type change struct {
	q  *request
	v  *configdb.View
	tx *configdb.Txn
	// inLane is true when this request holds the lane, see reserve.
	inLane bool
	// after is the revision of the newest record of an object that is brought
	// back by a revert, else 0.
	after uint64
}

// effect is what a change did, for the answer and for a repeated request.
type effect struct {
	status  int
	kind    api.Kind
	id      string
	task    string // ID, if there is one
	changed string // fields, for the audit trail
	warning string // for the caller, if the change was made all the same
	// object as it was written, for an answer after the object is gone.
	object any
}

// outcome is a committed change.
type outcome struct {
	effect
	revision uint64
	// replayed is true when an earlier request with the same key did it.
	replayed bool
}

var errNeedLane = errors.New("rest: a change that reserves memory began outside the lane")

// change decides and commits. The first view is linearizable, so that a client
// may create an object through one node and use it through another at once.
func (q *request) change(body []byte, f func(*change) (*effect, error)) (outcome, error) {
	ctx, cancel := context.WithTimeout(q.ctx(), writeTimeout)
	defer cancel()
	idem, err := q.idempotency(body)
	if err != nil {
		return outcome{}, err
	}
	if _, err := q.freshView(readTimeout); err != nil {
		return outcome{}, err
	}
	out, err := q.attempt(ctx, idem, false, f)
	if !errors.Is(err, errNeedLane) {
		return out, err
	}
	if err := q.s.lane.acquire(ctx); err != nil {
		return outcome{}, fmt.Errorf("wait for other reservations of memory: %w", err)
	}
	defer q.s.lane.release()
	return q.attempt(ctx, idem, true, f)
}

func (q *request) attempt(ctx context.Context, idem *idemRecord, inLane bool, f func(*change) (*effect, error)) (outcome, error) {
	var out outcome
	attempts := maxAttempts
	if inLane {
		attempts = laneAttempts
	}
	rev, err := configdb.Transact(ctx, q.db, q.who.actor, attempts, func(v *configdb.View, tx *configdb.Txn) error {
		out = outcome{}
		if done, err := idem.find(v); err != nil || done != nil {
			if done != nil {
				out = *done
			}
			return err
		}
		e, err := f(&change{q: q, v: v, tx: tx, inLane: inLane})
		if err != nil {
			return err
		}
		out.effect = *e
		if !tx.Empty() {
			if err := q.audit(tx, e); err != nil {
				return err
			}
		}
		return idem.record(v, tx, e)
	})
	if errors.Is(err, configdb.ErrConflict) {
		return out, api.Errorf(api.CodeConflict, "others kept changing the same objects through %d attempts; try again: %w", attempts, err)
	}
	if !out.replayed {
		out.revision = rev
	}
	return out, err
}

// reserve takes memory on a node. Such transactions conflict with each other
// by design; on one node they queue up (the lane), so that only the nodes
// compete and the attempts suffice however many clients ask at once.
func (c *change) reserve(nodeID string) error {
	if !c.inLane {
		return errNeedLane
	}
	c.q.s.cfg.Placer.Reserve(c.v, c.tx, nodeID)
	return nil
}

// newTask adds a task to the transaction and returns its ID.
func (c *change) newTask(project string, spec api.TaskSpec, within time.Duration) (string, error) {
	t := api.Task{Meta: api.NewMeta(api.KindTask, project, ""), Spec: spec}
	t.Meta.Name = t.Meta.ID
	t.Spec.Actor = c.q.who.actor
	t.Spec.Deadline = t.Meta.CreatedAt.Add(within)
	t.Status.Phase = api.TaskPending
	if err := configdb.Tasks.CreateUnnamed(c.tx, &t); err != nil {
		return "", err
	}
	return t.Meta.ID, nil
}

// TaskReply answers what takes a while.
type TaskReply struct {
	Task *api.Task `json:"task"`
	// Object that the task is about; the last known state if it is gone.
	Object   any    `json:"object,omitempty"`
	Revision uint64 `json:"revision"`
}

// answerTask answers 202 with the task, or 200 when ?wait saw its end.
func (q *request) answerTask(out outcome) error {
	wait, err := q.wait()
	if err != nil {
		return err
	}
	rev := out.revision
	v := q.db.Local()
	if v.Revision() < rev {
		return fmt.Errorf("committed revision %d is not applied here", rev)
	}
	task, err := configdb.Tasks.Get(v, out.task)
	if err != nil {
		if out.replayed {
			return api.Errorf(api.CodeRefused, "the request with this %s was carried out before and its task %s is no longer kept", headerIdemKey, out.task)
		}
		return err
	}
	if wait > 0 && !task.Status.Phase.Final() {
		if task, v, err = q.awaitTask(task, wait); err != nil {
			return err
		}
		rev = max(rev, v.Revision())
	}
	object, err := q.s.kinds[out.kind].object(v, out.id)
	if err != nil {
		object = out.object
	}
	status := http.StatusAccepted
	if wait > 0 && task.Status.Phase.Final() {
		status = http.StatusOK
	}
	q.w.Header().Set("Location", base+"tasks/"+out.task)
	q.markReplay(out)
	q.warn(out)
	q.reply(status, rev, TaskReply{Task: &task, Object: object, Revision: rev})
	return nil
}

// awaitTask follows a task until it is final, the time is over or this node shuts
// down, and returns it as it then is.
func (q *request) awaitTask(task api.Task, wait time.Duration) (api.Task, *configdb.View, error) {
	_ = q.ctl.SetWriteDeadline(time.Now().Add(wait + replyTimeout))
	ctx, cancel := context.WithTimeout(q.ctx(), wait)
	defer cancel()
	if stop, ok := q.stop(); ok {
		defer context.AfterFunc(stop, cancel)()
	}
	w := q.db.Watch(configdb.Tasks.StatusKey(task.Meta.ID), 0)
	for {
		_, err := w.Next(ctx)
		v := q.db.Local()
		now, getErr := configdb.Tasks.Get(v, task.Meta.ID)
		switch {
		case getErr != nil: // cleaned up: what was seen last is all there is
			return task, v, nil
		case now.Status.Phase.Final():
			return now, v, nil
		case errors.Is(err, configdb.ErrCompacted):
			w = q.db.Watch(configdb.Tasks.StatusKey(task.Meta.ID), 0)
		case q.ctx().Err() != nil:
			return now, v, context.Cause(q.ctx())
		case ctx.Err() != nil:
			return now, v, nil
		case err != nil:
			return now, v, err
		}
		task = now
	}
}

// answerObject answers with the object that was created or changed.
func (q *request) answerObject(out outcome) error {
	v := q.db.Local()
	object, err := q.s.kinds[out.kind].object(v, out.id)
	if err != nil {
		if out.object == nil {
			return api.Errorf(api.CodeRefused, "the request with this %s was carried out before and its object is gone", headerIdemKey)
		}
		object = out.object
	}
	if rev := objectRevision(object); rev > 0 {
		q.w.Header().Set("ETag", etag(rev))
	}
	if out.task != "" {
		q.w.Header().Set(headerTask, out.task)
	}
	q.markReplay(out)
	q.warn(out)
	q.reply(out.status, out.revision, object)
	return nil
}

func (q *request) markReplay(out outcome) {
	if out.replayed {
		q.w.Header().Set(headerReplayed, "true")
	}
}
