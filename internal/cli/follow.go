// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

const (
	// pollFirst and pollMost are how long one look at a task may wait for its end,
	// which is told at once; progress is shown after each look, and long work
	// costs the cluster one read a second.
	pollFirst = 50 * time.Millisecond
	pollMost  = time.Second
	// maxOutage is how long no server may answer while a task is followed; a
	// new leader is elected long before.
	maxOutage = 60 * time.Second
)

// follow waits until a task is final and returns it. A failed task is an
// error.
func (a *app) follow(ctx context.Context, c *client.Client, task *api.Task, p *progress) (*api.Task, error) {
	defer p.clear()
	wait, lost := pollFirst, time.Time{}
	for !task.Status.Phase.Final() {
		p.update(task.Status.Progress, task.Status.Message)
		asked := time.Now()
		raw, err := c.AwaitTask(ctx, a.project, task.Meta.ID, wait)
		wait = min(2*wait, pollMost)
		switch {
		case ctx.Err() != nil:
			return task, stillRunning(ctx.Err(), task)
		case err != nil && exitCode(err) == ExitUnavailable:
			if lost.IsZero() {
				lost = time.Now()
			}
			if time.Since(lost) > maxOutage {
				return task, err
			}
			if err := sleep(ctx, wait); err != nil {
				return task, stillRunning(err, task)
			}
			continue
		case err != nil:
			return task, fmt.Errorf("follow task %s: %w", task.Meta.ID, err)
		}
		lost = time.Time{}
		pause := wait/2 - time.Since(asked) // for a server that did not wait
		now, err := client.As[api.TaskSpec, api.TaskStatus](raw)
		if err != nil {
			return task, err
		}
		task = &now
		if !task.Status.Phase.Final() && pause > 0 {
			if err := sleep(ctx, pause); err != nil {
				return task, stillRunning(err, task)
			}
		}
	}
	if task.Status.Phase != api.TaskSucceeded {
		return task, failedTask(task)
	}
	return task, nil
}

func failedTask(t *api.Task) error {
	why := first(t.Status.Message, "no reason was given")
	if t.Status.Phase == api.TaskCancelled {
		why = "cancelled: " + why
	}
	return &taskError{message: fmt.Sprintf("%s %s: %s", t.Spec.Action, first(t.Spec.Target, t.Spec.TargetID), why), code: t.Status.Code, hint: failedHint(t)}
}

// failedHint tells what a creation that failed leaves: the wish is stored, so
// the cluster goes on trying.
func failedHint(t *api.Task) string {
	if t.Status.Phase != api.TaskFailed || t.Spec.Target == "" {
		return ""
	}
	switch t.Spec.Action {
	case api.ActionVMCreate, api.ActionVMClone, api.ActionVolumeCreate:
	default:
		return ""
	}
	kind, project := t.Spec.TargetKind, ""
	if p := t.Meta.Project; p != "" && p != api.DefaultProject {
		project = " --project " + p
	}
	return fmt.Sprintf("the %s stays and is tried again; to remove it: muster %s rm %s%s", kind, kind, t.Spec.Target, project)
}

// stillRunning explains that the end of waiting is not the end of the work.
func stillRunning(err error, t *api.Task) error {
	why := "stopped waiting"
	if errors.Is(err, context.DeadlineExceeded) {
		why = "gave up waiting after --timeout"
	}
	return api.Errorf(api.CodeTimeout, "%s; the work goes on (%d%%): muster task wait %s", why, t.Status.Progress, t.Meta.ID)
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// finish follows the task of a change, if there is one and the user waits, and
// prints the result. done is the past participle: "created", "started".
func (a *app) finish(ctx context.Context, c *client.Client, k *kindView, name, done string, r *client.Result) error {
	a.warnOf(r)
	if r.Task == nil {
		return a.finished(k, name, done, r.Object, "", 0)
	}
	if !a.flags.wait {
		return a.accepted(k, name, r)
	}
	began := time.Now()
	task, err := a.follow(ctx, c, r.Task, a.newProgress(fmt.Sprintf("%s %s", r.Task.Spec.Action, name)))
	if err != nil {
		return err
	}
	spent := time.Since(began)
	if task.Status.FinishedAt != nil && !task.Meta.CreatedAt.IsZero() {
		spent = task.Status.FinishedAt.Sub(task.Meta.CreatedAt)
	}
	if done == "removed" {
		return a.finished(k, name, done, nil, nodeOf(r.Object), spent)
	}
	object := r.Object
	if raw, _, err := c.Get(ctx, k.kind, a.project, first(client.MetaOf(object).ID, name)); err == nil {
		object = raw
	} else if a.structured() {
		return err // the document must not be of before the work
	}
	return a.finished(k, name, done, object, nodeOf(object), spent)
}

// warnOf says what the server thinks of a change that it made all the same.
func (a *app) warnOf(r *client.Result) {
	if r.Warning != "" {
		a.notice("warning: %s", r.Warning)
	}
}

// finished prints a change that is complete.
func (a *app) finished(k *kindView, name, done string, object json.RawMessage, node string, d time.Duration) error {
	switch {
	case a.structured() && len(object) > 0:
		return a.printJSON(object)
	case a.structured():
		return nil
	case a.flags.output == "name":
		fmt.Fprintf(a.Out, "%s/%s\n", k.kind, name)
		return nil
	}
	text := fmt.Sprintf("%s %s %s", k.kind, name, done)
	if node != "" {
		text += map[bool]string{true: " to ", false: " on "}[done == "moved" || done == "migrated"] + node
	}
	if d > 0 {
		text += " in " + took(d)
	}
	a.say("%s", text)
	return nil
}

// accepted prints a change that goes on without us.
func (a *app) accepted(k *kindView, name string, r *client.Result) error {
	switch {
	case a.structured():
		return a.printJSON(r.Body)
	case a.flags.output == "name":
		fmt.Fprintf(a.Out, "task/%s\n", r.Task.Meta.ID)
		return nil
	}
	a.say("%s %s: %s asked for, task %s", k.kind, name, r.Task.Spec.Action, r.Task.Meta.ID)
	return nil
}

// nodeOf returns the node that an object is on: where its VM runs, or where
// its file lies.
func nodeOf(raw json.RawMessage) string {
	var o struct {
		Spec struct {
			Node string `json:"node"`
		} `json:"spec"`
		Status struct {
			Node string `json:"node"`
		} `json:"status"`
	}
	_ = json.Unmarshal(raw, &o) // without a node there is none to tell
	return first(o.Status.Node, o.Spec.Node)
}
