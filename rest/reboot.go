// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"errors"
	"net/http"
	"slices"
	"strings"
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
	body, err := q.wish(&in)
	if err != nil {
		return err
	}
	votes, err := q.voting()
	if err != nil {
		return err
	}
	out, err := q.change(body, func(c *change) (*effect, error) {
		n, err := r.find(q, c.v)
		if err != nil {
			return nil, err
		}
		return c.rebootNode(n, action, votes, &in)
	})
	if err != nil {
		return err
	}
	return q.answerTask(out)
}

func (r *nodeResource) rebootPlanRoute(action api.RebootAction) route {
	return route{
		method: http.MethodPost, path: base + "nodes/{name}/" + string(action) + "/plan", need: needAdministrator,
		handle: func(q *request) error { return r.rebootPlan(q, action) }, verb: "plan",
		summary: "What the " + string(action) + " of a node would do; changes nothing", params: oneParams[:1],
		in: typeOf[api.RebootRequest](), out: typeOf[api.RebootPlan](), status: http.StatusOK,
	}
}

// rebootPlan answers POST /nodes/{name}/reboot/plan and shutdown/plan.
func (r *nodeResource) rebootPlan(q *request, action api.RebootAction) error {
	var in api.RebootRequest
	if _, err := q.wish(&in); err != nil {
		return err
	}
	v, err := q.freshView(readTimeout)
	if err != nil {
		return err
	}
	n, err := r.find(q, v)
	if err != nil {
		return err
	}
	votes, err := q.voting()
	if err != nil {
		return err
	}
	plan, err := q.forecast(v, []api.Node{n}, votes, in.Evacuate, in.NoEvacuate)
	if err != nil {
		return err
	}
	rolling, err := rollingUnderWay(v)
	if err == nil && !in.Force {
		err = underWay(rolling)
	}
	if err == nil {
		err = MayReboot(v, &n, action, votes, in.Force)
	}
	if err != nil {
		plan.Refusal = err.Error()
	}
	q.reply(http.StatusOK, v.Revision(), plan)
	return nil
}

// Votes are the IDs of the node that leads, empty if none does, and of the members that
// vote.
type Votes struct {
	Leader string
	Voters []string
}

func (q *request) voting() (out Votes, err error) {
	st, err := q.s.cfg.Cluster.Status(q.ctx())
	for _, m := range st.Members {
		if m.Leader {
			out.Leader = m.NodeID
		}
		if m.Voter {
			out.Voters = append(out.Voters, m.NodeID)
		}
	}
	return out, err
}

func (c *change) rebootNode(n api.Node, action api.RebootAction, votes Votes, in *api.RebootRequest) (*effect, error) {
	name := n.Meta.Name
	if r, err := rollingUnderWay(c.v); err != nil || r != nil && !in.Force {
		return nil, errors.Join(err, underWay(r))
	}
	verb := map[api.RebootAction]api.Action{api.RebootHost: api.ActionNodeReboot, api.ShutdownHost: api.ActionNodeShutdown}[action]
	task, err := c.newTask("", api.TaskSpec{
		Action: verb, TargetKind: api.KindNode, TargetID: n.Meta.ID, Target: name, TargetGeneration: n.Meta.Generation,
	}, vmOperationDeadline+time.Duration(in.WithinSeconds)*time.Second)
	if err != nil {
		return nil, err
	}
	spec := api.RebootSpec{TaskID: task, Action: action, Evacuate: in.Evacuate, NoEvacuate: in.NoEvacuate, Actor: c.q.who.actor}
	if action == api.RebootHost {
		spec.WithinSeconds = in.WithinSeconds
	}
	err = BeginReboot(c.v, c.tx, &n, spec, votes, in.Force)
	return &effect{status: http.StatusAccepted, kind: api.KindNode, id: n.Meta.ID, task: task, object: &n}, err
}

// BeginReboot adds to a transaction what begins the planned reboot or shutdown of a
// node, for requests and for rolling reboots. It fails, with the reason, if that cannot
// be; force is for beside that of another node.
func BeginReboot(v *configdb.View, tx *configdb.Txn, n *api.Node, spec api.RebootSpec, votes Votes, force bool) error {
	if err := MayReboot(v, n, spec.Action, votes, force); err != nil {
		return err
	}
	TakeTurn(v, tx)
	spec.Node, spec.KeepMaintenance = n.Meta.Name, n.Spec.Maintenance
	n.Spec.Maintenance = true
	if err := configdb.Nodes.UpdateSpec(v, tx, n); err != nil {
		return err
	}
	r := api.Reboot{Meta: api.NewMeta(api.KindReboot, "", n.Meta.Name), Spec: spec, Status: api.RebootStatus{Phase: api.TaskPending}}
	r.Meta.ID = n.Meta.ID
	return configdb.Reboots.CreateUnnamed(tx, &r)
}

// MayReboot says why a node cannot be rebooted or shut down now.
func MayReboot(v *configdb.View, n *api.Node, action api.RebootAction, votes Votes, force bool) error {
	name := n.Meta.Name
	switch {
	case n.Meta.Deleting():
		return api.Errorf(api.CodeRefused, "node %s leaves the cluster", name)
	case n.Status.Phase != api.NodeReady || n.Status.Fencing != "":
		return api.Errorf(api.CodeRefused, "node %s is %s, and carries out no command", name, n.Status.Phase)
	case n.Status.CutOff != nil:
		return api.Errorf(api.CodeRefused, "node %s is cut off from the network, and hears no command", name)
	case n.Status.HostBoot == "":
		return api.Errorf(api.CodeUnsupported, "the software of node %s (version %s) cannot be asked to %s its host, or cannot read which boot it runs; upgrade it", name, n.Status.Version, action)
	}
	if e, err := configdb.Evacuations.Get(v, n.Meta.ID); err == nil {
		return api.Errorf(api.CodeRefused, "node %s is being evacuated; wait for task %s", name, e.Spec.TaskID)
	}
	all, err := configdb.Reboots.List(v)
	if err != nil {
		return err
	}
	for i := range all {
		r := &all[i]
		switch {
		case r.Meta.ID == n.Meta.ID:
			return api.Errorf(api.CodeRefused, "node %s has a planned %s already; wait for task %s", name, r.Spec.Action, r.Spec.TaskID)
		case !force:
			return api.Errorf(api.CodeRefused, "node %s has a planned %s (task %s), and nodes go one at a time; wait for it, or use force", r.Spec.Node, r.Spec.Action, r.Spec.TaskID)
		}
	}
	if err := MajorityWithout(v, votes.Voters, n.Meta.ID, name); err != nil || n.Meta.ID != votes.Leader {
		return err
	}
	return AnotherLeads(v, votes.Voters, n.Meta.ID, name)
}

// TakeTurn makes reboots that begin at once conflict: one is computed anew.
func TakeTurn(v *configdb.View, tx *configdb.Txn) {
	was, _ := v.Get(rebootTurn)
	tx.RequireRevision(rebootTurn, was.Revision)
	tx.Put(rebootTurn, nil)
}

const rebootTurn = configdb.Root + "rebootturn"

// MajorityWithout says why a node may not go away: of the voters, by ID, too few
// would be left.
func MajorityWithout(v *configdb.View, voters []string, nodeID, name string) error {
	if left, need := VotersWithout(v, voters, nodeID); left < need && slices.Contains(voters, nodeID) {
		return api.Errorf(api.CodeRefused, "without node %s only %d of %d voters would be left, and %d are needed; bring the others back first (muster cluster status), or let a node or a witness join", name, left, len(voters), need)
	}
	return nil
}

// AnotherLeads says why no other voter could lead while a node is away: its reboot would
// wait for one for ever. Who is silent, or away for now, counts as one that could.
func AnotherLeads(v *configdb.View, voters []string, nodeID, name string) error {
	var why []string
	for _, id := range voters {
		if id == nodeID {
			continue
		}
		n, err := configdb.Nodes.Get(v, id)
		if err != nil {
			continue // it is being added, or was removed: it will not vote
		}
		other := n.Meta.Name
		r, err := configdb.Reboots.Get(v, id)
		switch {
		case n.Meta.Deleting():
			why = append(why, "node "+other+" leaves the cluster")
		case n.Spec.Role == api.RoleReplica:
			why = append(why, "node "+other+" has the role replica (muster node set "+other+" --role voter)")
		case n.Status.Phase == api.NodeLost:
			why = append(why, "node "+other+" is lost")
		case n.Spec.Maintenance && (err != nil || r.Spec.KeepMaintenance):
			why = append(why, "node "+other+" is in maintenance (muster node maintenance off "+other+")")
		default:
			return nil
		}
	}
	if len(why) == 0 {
		return nil // no other votes: MajorityWithout says so
	}
	return api.Errorf(api.CodeRefused, "node %s leads, and no other voter could lead while it is away: %s", name, strings.Join(why, "; "))
}

// VotersWithout counts the voters that would be left without a node, and how many are
// needed.
func VotersWithout(v *configdb.View, voters []string, nodeID string) (left, need int) {
	for _, id := range voters {
		n, err := configdb.Nodes.Get(v, id)
		s := &n.Status
		if c, ok := api.FindCondition(s.Conditions, api.ConditionConfigDB); ok && !c.OK {
			continue // it answers, and stores nothing
		}
		if err == nil && id != nodeID && s.Phase == api.NodeReady && s.CutOff == nil && s.Absence == nil && !s.Stopping && s.Fencing == "" {
			left++
		}
	}
	return left, len(voters)/2 + 1
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
