// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// fakeForecaster says that nothing is on any node.
type fakeForecaster struct{}

func (fakeForecaster) Forecast(_ context.Context, _ *configdb.View, nodes []api.Node, _ api.EvacuateRequest, _ bool) (out []api.PlannedReboot, err error) {
	for i := range nodes {
		out = append(out, api.PlannedReboot{Node: nodes[i].Meta.Name})
	}
	return out, nil
}

// endRolling ends the rolling reboot, and its task.
func (f *fixture) endRolling() {
	f.t.Helper()
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		all, err := configdb.RollingReboots.List(v)
		if err != nil || len(all) == 0 {
			return err
		}
		task, err := configdb.Tasks.Get(v, all[0].Spec.TaskID)
		if err != nil {
			return err
		}
		all[0].Status.Phase, task.Status.Phase = api.TaskFailed, api.TaskFailed
		if err := configdb.RollingReboots.UpdateStatus(v, tx, &all[0]); err != nil {
			return err
		}
		return configdb.Tasks.UpdateStatus(v, tx, &task)
	})
}

func (f *fixture) rolling(body string) (int, string) {
	f.t.Helper()
	r := f.do(call{method: "POST", path: "cluster/reboot", body: body})
	return r.status, string(r.body)
}

func TestRollingRebootIsRefusedByName(t *testing.T) {
	for name, c := range map[string]struct {
		before func(f *fixture)
		body   string
		words  string
	}{
		"another is under way": {func(f *fixture) { f.rolling(`{}`) }, `{}`, "a rolling reboot is under way; wait for task"},
		"a node's reboot":      {func(f *fixture) { f.do(call{method: "POST", path: "nodes/m2/reboot", body: `{}`}) }, `{"nodes":["m1"]}`, "node m2 has a planned reboot"},
		"an evacuation":        {func(f *fixture) { f.do(call{method: "POST", path: "nodes/m2/evacuate", body: `{}`}) }, `{"nodes":["m1"]}`, "node m2 is being evacuated"},
		"lost":                 {func(f *fixture) { f.setNodePhase("m2", api.NodeLost) }, `{}`, "node m2 is lost"},
		"lost, not on the list": {
			func(f *fixture) { f.setNodePhase("m2", api.NodeLost) }, `{"nodes":["m1"]}`, "node m2 is lost",
		},
		"one node": {func(f *fixture) {
			f.txn(func(v *configdb.View, tx *configdb.Txn) error {
				n, err := configdb.Nodes.Find(v, "", "m2")
				configdb.Nodes.Delete(tx, &n)
				return err
			})
		}, `{}`, "the cluster has one node, m1, and nothing could lead"},
		"two voters": {func(f *fixture) {
			f.cluster.members = []api.MemberStatus{{NodeID: f.nodeIDs["m1"], Voter: true, Leader: true}, {NodeID: f.nodeIDs["m2"], Voter: true}}
		}, `{}`, "only 1 of 2 voters would be left"},
		"the feature level": {func(f *fixture) {
			f.txn(func(v *configdb.View, tx *configdb.Txn) error {
				all, err := configdb.Clusters.List(v)
				if err != nil {
					return err
				}
				all[0].Spec.FeatureLevel = 1
				return configdb.Clusters.UpdateSpec(v, tx, &all[0])
			})
		}, `{}`, "the feature level of the cluster has to be 2, it is 1"},
		"old software":        {func(f *fixture) { f.changeNode("m2", func(s *api.NodeStatus) { s.HostBoot = "" }) }, `{}`, "upgrade it"},
		"no such node":        {func(*fixture) {}, `{"nodes":["m9"]}`, "does not exist"},
		"twice":               {func(*fixture) {}, `{"nodes":["m1","m1"]}`, "twice"},
		"both":                {func(*fixture) {}, `{"nodes":["m1"],"continue":true}`, "nodes"},
		"nothing to continue": {func(*fixture) {}, `{"continue":true}`, "no rolling reboot"},
		"all are done": {func(f *fixture) {
			f.rolling(`{}`)
			f.endRolling()
			for _, n := range []string{"m1", "m2"} {
				f.changeNode(n, func(s *api.NodeStatus) { s.HostBoot = "next" })
			}
		}, `{"continue":true}`, "every node of the last rolling reboot"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			withCluster(f)
			c.before(f)
			if code, text := f.rolling(c.body); code < 400 || !strings.Contains(text, c.words) {
				t.Errorf("%d %s", code, text)
			}
		})
	}
}

func TestRollingRebootGoesOnWithWhatIsLeft(t *testing.T) {
	f := newFixture(t)
	withCluster(f)
	if code, text := f.rolling(`{"nodes":["m2","m1"]}`); code != 202 {
		t.Fatalf("%d %s", code, text)
	}
	if r := f.do(call{method: "POST", path: "nodes/m1/reboot", body: `{}`}); r.status < 400 || !strings.Contains(string(r.body), "a rolling reboot is under way") {
		t.Errorf("%d %s", r.status, r.body)
	}
	get := func() api.RollingReboot {
		all, err := configdb.RollingReboots.List(f.db.Local())
		if err != nil || len(all) != 1 {
			t.Fatal(all, err)
		}
		return all[0]
	}
	first := get()
	if r := f.do(call{method: "POST", path: "tasks/" + first.Spec.TaskID + "/cancel"}); r.status != 202 || !get().Spec.Cancel {
		t.Errorf("%d %s", r.status, r.body)
	}
	f.endRolling()
	f.changeNode("m2", func(s *api.NodeStatus) { s.HostBoot = "next" })
	plan := want[api.RebootPlan](t, f.do(call{method: "POST", path: "cluster/reboot/plan", body: `{"continue":true}`}), 200)
	if len(plan.Nodes) != 1 || plan.Nodes[0].Node != "m1" || plan.Refusal != "" {
		t.Errorf("%+v", plan)
	}
	if code, text := f.rolling(`{"continue":true,"withinSeconds":60}`); code != 202 {
		t.Fatalf("%d %s", code, text)
	}
	again := get()
	if s := again.Spec; s.TaskID == first.Spec.TaskID || s.Cancel || s.WithinSeconds != 60 || len(s.Nodes) != 2 || s.Nodes[0].HostBoot != "boot" || again.Status.Phase != api.TaskPending {
		t.Errorf("%+v", again)
	}
}

func TestRebootPlans(t *testing.T) {
	f := newFixture(t)
	withCluster(f)
	f.cluster.members = []api.MemberStatus{{NodeID: f.nodeIDs["m1"], Voter: true, Leader: true}, {NodeID: f.nodeIDs["m2"], Voter: true}}
	before := f.db.Local().Revision()
	for path, leaders := range map[string]int{"nodes/m1/reboot/plan": 1, "nodes/m2/shutdown/plan": 0} {
		p := want[api.RebootPlan](t, f.do(call{method: "POST", path: path}), 200)
		if len(p.Nodes) != 1 || len(p.Nodes[0].Leaders) != leaders || p.Nodes[0].Voters != 1 || p.Nodes[0].VotersNeeded != 2 || !strings.Contains(p.Refusal, "only 1 of 2 voters") {
			t.Errorf("%s: %+v", path, p)
		}
	}
	p := want[api.RebootPlan](t, f.do(call{method: "POST", path: "cluster/reboot/plan"}), 200)
	if len(p.Nodes) != 2 || p.Nodes[1].Node != "m1" {
		t.Errorf("the leader is not last: %+v", p)
	}
	if f.db.Local().Revision() != before {
		t.Error("it changed something")
	}
}
