// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// endReboots forgets what was asked for, as the leader does at the end.
func (f *fixture) endReboots() {
	f.t.Helper()
	if _, err := configdb.Transact(f.t.Context(), f.db, "test", 2, func(v *configdb.View, tx *configdb.Txn) error {
		all, err := configdb.Reboots.List(v)
		for i := range all {
			configdb.Reboots.DeleteUnnamed(tx, &all[i])
		}
		return err
	}); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) changeNode(name string, change func(*api.NodeStatus)) {
	f.t.Helper()
	f.setNode(name, func(n *api.Node) { change(&n.Status) })
}

func TestRebootIsRefusedByName(t *testing.T) {
	for name, c := range map[string]struct {
		was   func(*api.NodeStatus)
		body  string
		words string
	}{
		"lost":           {func(s *api.NodeStatus) { s.Phase = api.NodeLost }, `{}`, "is lost"},
		"lives by notes": {func(s *api.NodeStatus) { s.CutOff = &api.CutOff{} }, `{}`, "is cut off from the network"},
		"being fenced":   {func(s *api.NodeStatus) { s.Fencing = "a" }, `{}`, "carries out no command"},
		"old software":   {func(s *api.NodeStatus) { s.HostBoot = "" }, `{}`, "upgrade it"},
		"bound":          {func(*api.NodeStatus) {}, `{"withinSeconds":5}`, "withinSeconds"},
		"force, live":    {func(*api.NodeStatus) {}, `{"evacuate":{"forceStopSeconds":5}}`, "forceStopSeconds"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			f.changeNode("m2", c.was)
			if r := f.do(call{method: "POST", path: "nodes/m2/reboot", body: c.body}); r.status < 400 || !strings.Contains(string(r.body), c.words) {
				t.Errorf("%d %s", r.status, r.body)
			}
			if n, _ := configdb.Nodes.Find(f.db.Local(), "", "m2"); n.Spec.Maintenance {
				t.Error("it is in maintenance nevertheless")
			}
		})
	}
}

func TestRebootsGoOneAtATime(t *testing.T) {
	f := newFixture(t)
	ask := func(path, body string) (int, string) {
		r := f.do(call{method: "POST", path: path, body: body})
		return r.status, string(r.body)
	}
	if code, text := ask("nodes/m1/reboot", `{}`); code != 202 {
		t.Fatalf("%d %s", code, text)
	}
	for path, words := range map[string]string{"nodes/m1/shutdown": "planned reboot already", "nodes/m2/reboot": "one at a time", "nodes/m1/evacuate": "has a planned reboot"} {
		if code, text := ask(path, `{}`); code < 400 || !strings.Contains(text, words) {
			t.Errorf("%s: %d %s", path, code, text)
		}
	}
	if code, text := ask("nodes/m2/reboot", `{"force":true}`); code != 202 {
		t.Errorf("forced: %d %s", code, text)
	}
}

func TestMajorityWithoutANode(t *testing.T) {
	f := newFixture(t)
	m1, m2 := f.nodeIDs["m1"], f.nodeIDs["m2"]
	v := f.db.Local()
	if err := MajorityWithout(v, []string{m1}, m2, "m2"); err != nil {
		t.Errorf("it has no vote: %v", err)
	}
	if err := MajorityWithout(v, []string{m1, m2}, m2, "m2"); err == nil || !strings.Contains(err.Error(), "only 1 of 2") {
		t.Errorf("one of two: %v", err)
	}
	if err := MajorityWithout(v, []string{m1, m2, "gone"}, m2, "m2"); err == nil {
		t.Error("the third voter is gone")
	}
	f.changeNode("m1", func(s *api.NodeStatus) { s.CutOff = &api.CutOff{} })
	if err := MajorityWithout(f.db.Local(), []string{m1}, "other", "x"); err != nil {
		t.Errorf("that has no vote: %v", err)
	}
}

// A voter that answers and cannot store what is decided is none that stays.
func TestAVoterThatStoresNothingDoesNotCount(t *testing.T) {
	f := newFixture(t)
	var ids []string
	for _, id := range f.nodeIDs {
		ids = append(ids, id)
	}
	f.setNode("m2", func(n *api.Node) {
		n.Status.Conditions = api.SetCondition(n.Status.Conditions, api.Condition{Type: api.ConditionConfigDB, Reason: "NodeFull", Message: "the disk is full"}, time.Now())
	})
	left, need := VotersWithout(f.db.Local(), ids, f.nodeIDs["m1"])
	if left != len(ids)-2 || need != len(ids)/2+1 {
		t.Errorf("%d of %d would be left, %d are needed", left, len(ids), need)
	}
}

func TestRebootIsNotCancelledAfterItsCommand(t *testing.T) {
	f := newFixture(t)
	f.do(call{method: "POST", path: "nodes/m1/reboot", body: `{}`})
	step := func(s api.RebootStep) (task string) {
		if _, err := configdb.Transact(t.Context(), f.db, "test", 2, func(v *configdb.View, tx *configdb.Txn) error {
			rb, err := configdb.Reboots.Get(v, f.nodeIDs["m1"])
			if err != nil {
				return err
			}
			task, rb.Status.Step = rb.Spec.TaskID, s
			return configdb.Reboots.UpdateStatus(v, tx, &rb)
		}); err != nil {
			t.Fatal(err)
		}
		return task
	}
	if r := f.do(call{method: "POST", path: "tasks/" + step(api.RebootLeaving) + "/cancel"}); r.status < 400 || !strings.Contains(string(r.body), "cannot be taken back") {
		t.Errorf("%d %s", r.status, r.body)
	}
	if r := f.do(call{method: "POST", path: "tasks/" + step(api.RebootEmptying) + "/cancel"}); r.status != 202 {
		t.Errorf("%d %s", r.status, r.body)
	}
	if rb, _ := configdb.Reboots.Get(f.db.Local(), f.nodeIDs["m1"]); !rb.Spec.Cancel {
		t.Error("nobody was told")
	}
}

// TestTheLeadersRebootNeedsAnotherOne: that no other voter could lead is told at once,
// also by the dry runs, and not of a node that does not lead.
func TestTheLeadersRebootNeedsAnotherOne(t *testing.T) {
	f := newFixture(t)
	withCluster(f)
	f.txn(func(_ *configdb.View, tx *configdb.Txn) error {
		n := api.Node{Meta: api.NewMeta(api.KindNode, "", "m3"), Status: api.NodeStatus{Phase: api.NodeReady, HostBoot: "boot"}}
		f.nodeIDs["m3"] = n.Meta.ID
		return configdb.Nodes.Create(tx, &n)
	})
	for _, name := range []string{"m1", "m2", "m3"} {
		f.cluster.members = append(f.cluster.members, api.MemberStatus{NodeID: f.nodeIDs[name], Node: name, Voter: true, Leader: name == "m1"})
	}
	f.setNode("m2", func(n *api.Node) { n.Spec.Maintenance = true })
	f.setNode("m3", func(n *api.Node) { n.Spec.Role = api.RoleReplica })
	const why = "node m1 leads, and no other voter could lead while it is away: "
	ask := func(path string, status int, words ...string) {
		t.Helper()
		r := f.do(call{method: "POST", path: path, body: `{}`})
		for _, w := range words {
			if !strings.Contains(string(r.body), w) {
				t.Errorf("%s: %q is not in %s", path, w, r.body)
			}
		}
		if r.status != status {
			t.Errorf("%s: %d %s", path, r.status, r.body)
		}
	}
	both := []string{why, "node m2 is in maintenance (muster node maintenance off m2)", "node m3 has the role replica"}
	for path, status := range map[string]int{"nodes/m1/reboot": 409, "nodes/m1/shutdown": 409, "cluster/reboot": 409, "nodes/m1/reboot/plan": 200, "cluster/reboot/plan": 200} {
		ask(path, status, both...)
	}
	if n, _ := configdb.Nodes.Find(f.db.Local(), "", "m1"); n.Spec.Maintenance {
		t.Error("it is in maintenance nevertheless")
	}
	ask("nodes/m2/reboot", 202)
	f.endReboots()
	f.setNode("m3", func(n *api.Node) { n.Spec.Role = api.RoleVoter })
	ask("nodes/m1/reboot", 202)
}
