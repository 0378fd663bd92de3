// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"net/http"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

func (r *nodeResource) evacuateRoute() route {
	return route{
		method: http.MethodPost, path: base + "nodes/{name}/evacuate", need: needAdministrator, handle: r.evacuate,
		summary: "Keep new VMs away from a node and move those that are there", params: longParams,
		in: typeOf[api.EvacuateRequest](), out: typeOf[TaskReply](), status: http.StatusAccepted,
	}
}

// evacuate answers POST /nodes/{name}/evacuate. The leader does the work.
func (r *nodeResource) evacuate(q *request) error {
	var in api.EvacuateRequest
	body, err := q.wish(&in)
	if err != nil {
		return err
	}
	out, err := q.change(body, func(c *change) (*effect, error) {
		n, err := r.find(q, c.v)
		if err != nil {
			return nil, err
		}
		return c.evacuateNode(n, &in)
	})
	if err != nil {
		return err
	}
	return q.answerTask(out)
}

func (c *change) evacuateNode(n api.Node, in *api.EvacuateRequest) (*effect, error) {
	name := n.Meta.Name
	switch {
	case n.Spec.Role == api.RoleWitness:
		return nil, api.Errorf(api.CodeRefused, "node %s is a witness and runs no VMs", name)
	case n.Meta.Deleting():
		return nil, api.Errorf(api.CodeRefused, "node %s leaves the cluster", name)
	case n.Status.Phase == api.NodeLost:
		return nil, api.Errorf(api.CodeRefused, "node %s is lost: ha restarts its protected VMs elsewhere, the others wait for it", name)
	}
	if r, err := configdb.Reboots.Get(c.v, n.Meta.ID); err == nil {
		return nil, api.Errorf(api.CodeRefused, "node %s has a planned %s; wait for task %s", name, r.Spec.Action, r.Spec.TaskID)
	}
	if e, err := configdb.Evacuations.Get(c.v, n.Meta.ID); err == nil {
		return nil, api.Errorf(api.CodeRefused, "node %s is being evacuated; wait for task %s", name, e.Spec.TaskID)
	}
	n.Spec.Maintenance = true
	if err := configdb.Nodes.UpdateSpec(c.v, c.tx, &n); err != nil {
		return nil, err
	}
	task, err := c.newTask("", api.TaskSpec{
		Action: api.ActionNodeEvacuate, TargetKind: api.KindNode, TargetID: n.Meta.ID, Target: name, TargetGeneration: n.Meta.Generation,
	}, vmOperationDeadline)
	if err != nil {
		return nil, err
	}
	e := api.Evacuation{
		Meta:   api.NewMeta(api.KindEvacuation, "", name),
		Spec:   api.EvacuationSpec{TaskID: task, Node: name, Level: in.Level, Parallel: in.Parallel, MoveStopped: in.MoveStopped, Actor: c.q.who.actor},
		Status: api.EvacuationStatus{Phase: api.TaskPending},
	}
	e.Meta.ID = n.Meta.ID
	e.Spec.ForceStopSeconds = in.ForceStopSeconds
	return &effect{status: http.StatusAccepted, kind: api.KindNode, id: n.Meta.ID, task: task, object: &n}, configdb.Evacuations.CreateUnnamed(c.tx, &e)
}
