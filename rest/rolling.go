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
	"github.com/muster-vm/muster/configdb/feature"
)

// Forecaster says what reboots would do.
type Forecaster interface {
	// Forecast says, for nodes that are rebooted one after the other in this order,
	// what would become of their VMs. It changes nothing.
	Forecast(ctx context.Context, v *configdb.View, nodes []api.Node, in api.EvacuateRequest, noEvacuate bool) ([]api.PlannedReboot, error)
}

func rollingRoutes() []route {
	in := typeOf[api.RollingRebootRequest]()
	return []route{
		{method: http.MethodPost, path: base + "cluster/reboot", need: needAdministrator, handle: rollingReboot, verb: "reboot",
			summary: "Reboot all nodes, or some, one after the other", params: longParams, in: in, out: typeOf[TaskReply](), status: http.StatusAccepted},
		{method: http.MethodPost, path: base + "cluster/reboot/plan", need: needAdministrator, handle: rollingPlan, verb: "plan",
			summary: "What a rolling reboot would do; changes nothing", in: in, out: typeOf[api.RebootPlan](), status: http.StatusOK},
	}
}

// rollingReboot answers POST /cluster/reboot. The leader does the work.
func rollingReboot(q *request) error {
	var in api.RollingRebootRequest
	body, err := q.wish(&in)
	if err != nil {
		return err
	}
	votes, err := q.voting()
	if err != nil {
		return err
	}
	out, err := q.change(body, func(c *change) (*effect, error) { return c.rollingReboot(&in, votes) })
	if err != nil {
		return err
	}
	return q.answerTask(out)
}

// rollingPlan answers POST /cluster/reboot/plan.
func rollingPlan(q *request) error {
	var in api.RollingRebootRequest
	if _, err := q.wish(&in); err != nil {
		return err
	}
	v, err := q.freshView(readTimeout)
	if err != nil {
		return err
	}
	votes, err := q.voting()
	if err != nil {
		return err
	}
	list, err := rollingList(v, &in)
	if err != nil {
		return err
	}
	nodes := make([]api.Node, 0, len(list))
	for _, l := range list {
		if n, err := configdb.Nodes.Get(v, l.ID); err == nil && n.Status.HostBoot == l.HostBoot {
			nodes = append(nodes, n)
		}
	}
	slices.SortStableFunc(nodes, func(a, b api.Node) int { return later(&a, votes.Leader) - later(&b, votes.Leader) })
	plan, err := q.forecast(v, nodes, votes, in.Evacuate, in.NoEvacuate)
	if err != nil {
		return err
	}
	if err := mayRoll(v, list, votes); err != nil {
		plan.Refusal = err.Error()
	}
	q.reply(http.StatusOK, v.Revision(), plan)
	return nil
}

func later(n *api.Node, leader string) int {
	if n.Meta.ID == leader {
		return 1
	}
	return 0
}

// forecast fills in what rest knows: votes, and who could lead.
func (q *request) forecast(v *configdb.View, nodes []api.Node, votes Votes, in api.EvacuateRequest, noEvacuate bool) (*api.RebootPlan, error) {
	_ = q.ctl.SetWriteDeadline(time.Now().Add(forecastTimeout + replyTimeout))
	ctx, cancel := context.WithTimeout(q.ctx(), forecastTimeout)
	defer cancel()
	all, err := q.s.cfg.Forecaster.Forecast(ctx, v, nodes, in, noEvacuate)
	if err != nil {
		return nil, err
	}
	for i := range all {
		p := &all[i]
		p.Voters, p.VotersNeeded = VotersWithout(v, votes.Voters, nodes[i].Meta.ID)
		if nodes[i].Meta.ID != votes.Leader {
			continue
		}
		for _, id := range votes.Voters {
			if n, err := configdb.Nodes.Get(v, id); err == nil && id != votes.Leader && n.Status.Phase == api.NodeReady && !n.Spec.Maintenance {
				p.Leaders = append(p.Leaders, n.Meta.Name)
			}
		}
	}
	return &api.RebootPlan{Nodes: all}, nil
}

// forecastTimeout bounds a forecast, which decides about every VM of the nodes.
const forecastTimeout = time.Minute

func (c *change) rollingReboot(in *api.RollingRebootRequest, votes Votes) (*effect, error) {
	list, err := rollingList(c.v, in)
	if err != nil {
		return nil, err
	}
	if err := mayRoll(c.v, list, votes); err != nil {
		return nil, err
	}
	meta, err := clusterMeta(c.v)
	if err != nil {
		return nil, err
	}
	within := time.Duration(len(list)) * (vmOperationDeadline + time.Duration(in.WithinSeconds)*time.Second)
	task, err := c.newTask("", api.TaskSpec{Action: api.ActionRolling, TargetKind: api.KindCluster, TargetID: meta.ID, Target: meta.Name, TargetGeneration: meta.Generation}, within)
	if err != nil {
		return nil, err
	}
	TakeTurn(c.v, c.tx)
	r, err := configdb.RollingReboots.Get(c.v, meta.ID)
	known := err == nil
	if api.IgnoreNotFound(err) != nil {
		return nil, err
	}
	if !known {
		r.Meta = api.NewMeta(api.KindRollingReboot, "", meta.Name)
		r.Meta.ID = meta.ID
	}
	r.Spec = api.RollingRebootSpec{TaskID: task, Nodes: list, Evacuate: in.Evacuate, NoEvacuate: in.NoEvacuate, WithinSeconds: in.WithinSeconds, Actor: c.q.who.actor}
	r.Status = api.RollingRebootStatus{Phase: api.TaskPending}
	e := &effect{status: http.StatusAccepted, kind: api.KindTask, id: task, task: task}
	if !known {
		return e, configdb.RollingReboots.CreateUnnamed(c.tx, &r)
	}
	if err := configdb.RollingReboots.UpdateSpec(c.v, c.tx, &r); err != nil {
		return nil, err
	}
	return e, configdb.RollingReboots.UpdateStatus(c.v, c.tx, &r)
}

func clusterMeta(v *configdb.View) (api.Meta, error) {
	all, err := configdb.Clusters.List(v)
	if err != nil || len(all) == 0 {
		return api.Meta{}, api.Errorf(api.CodeInternal, "the object of the cluster cannot be read: %v", err)
	}
	return all[0].Meta, nil
}

// rollingUnderWay is the rolling reboot that has not ended, or whose end its task has
// not read; nil if there is none.
func rollingUnderWay(v *configdb.View) (*api.RollingReboot, error) {
	all, err := configdb.RollingReboots.List(v)
	for i := range all {
		t, terr := configdb.Tasks.Get(v, all[i].Spec.TaskID)
		if !all[i].Status.Phase.Final() || terr == nil && !t.Status.Phase.Final() {
			return &all[i], err
		}
	}
	return nil, err
}

func underWay(r *api.RollingReboot) error {
	if r == nil {
		return nil
	}
	return api.Errorf(api.CodeRefused, "a rolling reboot is under way; wait for task %s, or muster task cancel %s", r.Spec.TaskID, r.Spec.TaskID)
}

// rollingList are the nodes that a request is about.
func rollingList(v *configdb.View, in *api.RollingRebootRequest) (list []api.RollingNode, err error) {
	if in.Continue {
		return continued(v)
	}
	nodes, err := configdb.Nodes.List(v)
	if err != nil {
		return nil, err
	}
	if len(in.Nodes) > 0 {
		nodes = nil
	}
	for _, name := range in.Nodes {
		n, err := configdb.Nodes.Find(v, "", name)
		if err != nil {
			return nil, atField(err, "nodes")
		}
		if slices.ContainsFunc(nodes, func(o api.Node) bool { return o.Meta.ID == n.Meta.ID }) {
			return nil, api.Invalid("nodes", "names node %s twice", n.Meta.Name)
		}
		nodes = append(nodes, n)
	}
	for i := range nodes {
		n := &nodes[i]
		list = append(list, api.RollingNode{ID: n.Meta.ID, Node: n.Meta.Name, HostBoot: n.Status.HostBoot, Maintenance: n.Spec.Maintenance})
	}
	return list, nil
}

// continued is the list of the last rolling reboot, if something is left of it.
func continued(v *configdb.View) ([]api.RollingNode, error) {
	meta, err := clusterMeta(v)
	if err != nil {
		return nil, err
	}
	last, err := configdb.RollingReboots.Get(v, meta.ID)
	if api.IgnoreNotFound(err) != nil {
		return nil, err
	}
	if err != nil {
		return nil, &api.Error{Code: api.CodeRefused, Field: "continue", Detail: "there has been no rolling reboot; begin one without continue"}
	}
	for _, l := range last.Spec.Nodes {
		if n, err := configdb.Nodes.Get(v, l.ID); err == nil && n.Status.HostBoot == l.HostBoot {
			return last.Spec.Nodes, nil
		}
	}
	return nil, &api.Error{Code: api.CodeRefused, Field: "continue", Detail: "every node of the last rolling reboot runs another boot than when it began; begin a new one without continue"}
}

// mayRoll says why a rolling reboot cannot begin.
func mayRoll(v *configdb.View, list []api.RollingNode, votes Votes) error {
	if !feature.RollingReboot.InForce(v) {
		return api.Errorf(api.CodeRefused, "rolling reboots need a node that leads and knows them at any time: the feature level of the cluster has to be %d, it is %d; upgrade the nodes that muster cluster status names", feature.RollingReboot.Level(), feature.Level(v))
	}
	r, err := rollingUnderWay(v)
	if err != nil || r != nil {
		if err == nil {
			err = underWay(r)
		}
		return err
	}
	nodes, err := configdb.Nodes.List(v)
	if err != nil {
		return err
	}
	if len(nodes) == 1 {
		return api.Errorf(api.CodeRefused, "the cluster has one node, %s, and nothing could lead while it is away; stop its VMs and reboot the host itself, or let two more nodes, or one and a witness, join", nodes[0].Meta.Name)
	}
	evacuations, err := configdb.Evacuations.List(v)
	if err != nil {
		return err
	}
	if len(evacuations) > 0 {
		e := &evacuations[0].Spec
		return api.Errorf(api.CodeRefused, "node %s is being evacuated; wait for task %s", e.Node, e.TaskID)
	}
	for i := range nodes {
		n := &nodes[i]
		at := slices.IndexFunc(list, func(l api.RollingNode) bool { return l.ID == n.Meta.ID })
		if at >= 0 && list[at].HostBoot == n.Status.HostBoot {
			if err := MayReboot(v, n, api.RebootHost, votes, false); err != nil {
				return err
			}
		} else if n.Status.Phase == api.NodeLost {
			return api.Errorf(api.CodeRefused, "node %s is lost; bring it back, or remove it: muster node remove %s --force", n.Meta.Name, n.Meta.Name)
		}
	}
	return nil
}
