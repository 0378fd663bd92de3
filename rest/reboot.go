// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"net/http"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

func (r *nodeResource) rebootRoute(action api.RebootAction) route {
	summary := map[api.RebootAction]string{
		api.RebootHost:   "Empty a node, reboot its host and let it take VMs again",
		api.ShutdownHost: "Empty a node and shut its host down",
	}
	return route{
		method: http.MethodPost, path: base + "nodes/{name}/" + string(action), need: needAdministrator,
		handle:  func(q *request) error { return r.reboot(q, action) },
		summary: summary[action], params: longParams,
		in: typeOf[api.RebootRequest](), out: typeOf[TaskReply](), status: http.StatusAccepted,
	}
}

// reboot answers POST /nodes/{name}/reboot and shutdown. The leader does the work.
func (r *nodeResource) reboot(q *request, action api.RebootAction) error {
	var in api.RebootRequest
	body, err := q.optional(&in)
	if err != nil {
		return err
	}
	if err := in.Validate(); err != nil {
		return err
	}
	st, err := q.s.cfg.Cluster.Status(q.ctx())
	if err != nil {
		return err
	}
	var voters []string
	for _, m := range st.Members {
		if m.Voter {
			voters = append(voters, m.NodeID)
		}
	}
	out, err := q.change(body, func(c *change) (*effect, error) {
		n, err := r.find(q, c.v)
		if err != nil {
			return nil, err
		}
		return c.rebootNode(n, action, voters, &in)
	})
	if err != nil {
		return err
	}
	return q.answerTask(out)
}

func (c *change) rebootNode(n api.Node, action api.RebootAction, voters []string, in *api.RebootRequest) (*effect, error) {
	name := n.Meta.Name
	switch {
	case n.Meta.Deleting():
		return nil, api.Errorf(api.CodeRefused, "node %s leaves the cluster", name)
	case n.Status.Phase != api.NodeReady || n.Status.Fencing != "":
		return nil, api.Errorf(api.CodeRefused, "node %s is %s, and carries out no command", name, n.Status.Phase)
	case n.Status.CutOff != nil:
		return nil, api.Errorf(api.CodeRefused, "node %s is cut off from the network, and hears no command", name)
	case n.Status.HostBoot == "":
		return nil, api.Errorf(api.CodeUnsupported, "the software of node %s (version %s) cannot be asked to %s its host, or cannot read which boot it runs; upgrade it", name, n.Status.Version, action)
	}
	if e, err := configdb.Evacuations.Get(c.v, n.Meta.ID); err == nil {
		return nil, api.Errorf(api.CodeRefused, "node %s is being evacuated; wait for task %s", name, e.Spec.TaskID)
	}
	all, err := configdb.Reboots.List(c.v)
	if err != nil {
		return nil, err
	}
	for i := range all {
		r := &all[i]
		switch {
		case r.Meta.ID == n.Meta.ID:
			return nil, api.Errorf(api.CodeRefused, "node %s has a planned %s already; wait for task %s", name, r.Spec.Action, r.Spec.TaskID)
		case !in.Force:
			return nil, api.Errorf(api.CodeRefused, "node %s has a planned %s (task %s), and nodes go one at a time; wait for it, or use force", r.Spec.Node, r.Spec.Action, r.Spec.TaskID)
		}
	}
	if err := MajorityWithout(c.v, voters, n.Meta.ID, name); err != nil {
		return nil, err
	}
	// Of two requests at once one is computed anew.
	was, _ := c.v.Get(rebootTurn)
	c.tx.RequireRevision(rebootTurn, was.Revision)
	c.tx.Put(rebootTurn, []byte(n.Meta.ID))
	keep := n.Spec.Maintenance
	n.Spec.Maintenance = true
	if err := configdb.Nodes.UpdateSpec(c.v, c.tx, &n); err != nil {
		return nil, err
	}
	verb := map[api.RebootAction]api.Action{api.RebootHost: api.ActionNodeReboot, api.ShutdownHost: api.ActionNodeShutdown}[action]
	task, err := c.newTask("", api.TaskSpec{
		Action: verb, TargetKind: api.KindNode, TargetID: n.Meta.ID, Target: name, TargetGeneration: n.Meta.Generation,
	}, vmOperationDeadline+time.Duration(in.WithinSeconds)*time.Second)
	if err != nil {
		return nil, err
	}
	r := api.Reboot{
		Meta:   api.NewMeta(api.KindReboot, "", name),
		Spec:   api.RebootSpec{TaskID: task, Node: name, Action: action, Evacuate: in.Evacuate, NoEvacuate: in.NoEvacuate, KeepMaintenance: keep, Actor: c.q.who.actor},
		Status: api.RebootStatus{Phase: api.TaskPending},
	}
	if r.Meta.ID = n.Meta.ID; action == api.RebootHost {
		r.Spec.WithinSeconds = in.WithinSeconds
	}
	return &effect{status: http.StatusAccepted, kind: api.KindNode, id: n.Meta.ID, task: task, object: &n}, configdb.Reboots.CreateUnnamed(c.tx, &r)
}

// rebootTurn makes two reboots that begin at once conflict.
const rebootTurn = configdb.Root + "rebootturn"

// MajorityWithout says why a node may not go away: of the voters, by ID, too few
// would be left.
func MajorityWithout(v *configdb.View, voters []string, nodeID, name string) error {
	left, votes := 0, false
	for _, id := range voters {
		if id == nodeID {
			votes = true
			continue
		}
		n, err := configdb.Nodes.Get(v, id)
		s := &n.Status
		if err == nil && s.Phase == api.NodeReady && s.CutOff == nil && s.Absence == nil && !s.Stopping && s.Fencing == "" {
			left++
		}
	}
	if need := len(voters)/2 + 1; votes && left < need {
		return api.Errorf(api.CodeRefused, "without node %s only %d of %d voters would be left, and %d are needed; bring the others back first (muster cluster status), or let a node or a witness join", name, left, len(voters), need)
	}
	return nil
}

// cancelReboot gives up a reboot whose node has no command yet.
func (c *change) cancelReboot(t *api.Task, r *api.Reboot) (*effect, error) {
	switch r.Status.Step {
	case "", api.RebootEmptying:
	default:
		return nil, api.Errorf(api.CodeRefused, "node %s has its command already, and a %s cannot be taken back", r.Spec.Node, r.Spec.Action)
	}
	c.tx.RequireRevision(configdb.Reboots.StatusKey(r.Meta.ID), r.Meta.StatusRevision)
	r.Spec.Cancel = true
	return cancelled(t), configdb.Reboots.UpdateSpec(c.v, c.tx, r)
}
