// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
)

// serveHA is a cluster of two nodes and a witness, in which db1 finds no place.
func (f *fakeCluster) serveHA(w http.ResponseWriter, r *http.Request, path string) {
	reply := func(v any) { b, _ := json.Marshal(v); f.send(w, 200, b) }
	loss := api.HALoss{
		Killed: []string{"m1"}, Revision: 12, Quorum: api.HAQuorum{Voters: 3, Left: 2, Needed: 2, Kept: true},
		Counts: map[string]int{"restarts": 1, "refused": 1, "waits": 1},
		Steps: []api.HAStep{
			{Order: 1, Priority: api.PriorityHigh, VM: "web1", Project: "default", From: "m1", Outcome: api.HARestarts, Node: "m2"},
			{Order: 2, VM: "db1", Project: "default", From: "m1", Outcome: api.HARefused, Reason: "no node can take it:\x1b[31m m2: needs 8 GiB"},
			{Order: 3, VM: "plain", Project: "default", From: "m1", Outcome: api.HAWaits, Reason: "it is not protected"},
		},
	}
	switch r.Method + " " + path {
	case "GET ha/status":
		s := api.HAStatus{
			Node: "m2", Revision: 12, Seconds: 0.0042, Quorum: api.HAQuorum{Voters: 3, Left: 3, Needed: 2, Spare: 1, Kept: true}, Witness: "w", IfQuorumLost: api.HAQuorumLost{Ends: 2, RunsOn: 1},
			Admission: api.HAAdmission{
				HASettings: api.HASettings{Failures: 1, Admission: api.AdmissionRefuse}, Sets: 2, OfAll: 2, Message: "if m1 died, 1 protected VMs would not restart: db1",
				Worst: []string{"m1"}, RefusedVMs: 1, Refused: loss.Steps[1:2],
			},
			Nodes: []api.HANode{
				{Node: "m1", Role: api.RoleVoter, Phase: api.NodeReady, Voter: true, Leader: true, GuardLevel: "softdog", Protected: 2, Unprotected: 1, Loss: &loss},
				{Node: "m2", Role: api.RoleVoter, Phase: api.NodeReady, Voter: true, GuardLevel: "process only", Loss: &api.HALoss{Killed: []string{"m2"}, Quorum: loss.Quorum}},
			},
		}
		for i := range 12 {
			s.Nodes[0].Loss.Steps = append(s.Nodes[0].Loss.Steps, api.HAStep{Order: 4 + i, VM: fmt.Sprintf("off%d", i), Project: "default", From: "m1", Outcome: api.HAStays})
		}
		reply(s)
	case "POST ha/simulate":
		var in api.HASimulateRequest
		if err := api.DecodeStrict(r.Body, &in); err != nil {
			f.fail(w, err)
			return
		}
		if in.Kill[0] != "m1" {
			f.fail(w, &api.Error{Code: api.CodeNotFound, Field: "kill[0]", Detail: "node \"" + in.Kill[0] + "\" does not exist"})
			return
		}
		loss.Killed = in.Kill
		reply(loss)
	default:
		http.NotFound(w, r)
	}
}

// serveFailovers has two losses: the second was declared too early.
func (f *fakeCluster) serveFailovers(w http.ResponseWriter, r *http.Request, path string) {
	reply := func(v any) { b, _ := json.Marshal(v); f.send(w, 200, b) }
	loss := func(id string, silent int64) api.Failover {
		o := api.NewFailover(&api.Node{Meta: api.Meta{ID: "n1", Name: "m1"}, Status: api.NodeStatus{GuardLevel: "softdog"}}, api.CauseLease, time.Now())
		o.Meta.ID, o.Meta.Name, o.Meta.Kind, o.Meta.Revision = id, id, api.KindFailover, 50
		o.Spec.LeaderID, o.Spec.Leader, o.Spec.Term, o.Spec.SilentMillis, o.Spec.Since = "n2", "m2", 3, silent, api.SinceGrant
		o.Spec.Rules = api.LeaseRules{LeaseMillis: 10_000, DriftPerMille: 10, KillMillis: 2_000, MarginMillis: 1_000}
		return o
	}
	all := map[string]api.Failover{"loss1": loss("loss1", 13_204), "loss2": loss("loss2", 9_000)}
	id, isProof := strings.CutSuffix(strings.TrimPrefix(path, "failovers"), "/proof")
	id = strings.TrimPrefix(id, "/")
	o, known := all[id]
	switch {
	case r.Method != http.MethodGet:
		http.NotFound(w, r)
	case id == "":
		reply(map[string]any{"kind": "failoverList", "items": []api.Failover{all["loss1"], all["loss2"]}, "revision": 60})
	case !known:
		f.fail(w, &api.Error{Code: api.CodeNotFound, Detail: "failover \"" + id + "\" does not exist"})
	case !isProof:
		reply(o)
	default:
		m := api.NewFailoverMove(id, &api.VM{Meta: api.Meta{ID: "v1", Name: "web\x1b[31m1", Project: "default"}}, o.Spec.At.Add(41*time.Millisecond))
		m.Meta.Revision, m.Meta.StatusRevision = 51, 55
		m.Spec.Outcome, m.Spec.Term, m.Spec.FromNodeID, m.Spec.FromEpoch, m.Spec.NodeID, m.Spec.Node, m.Spec.Epoch = api.HARestarts, 3, "n1", 1, "n2", "m2", 2
		runs := m.Spec.At.Add(420 * time.Millisecond)
		m.Status = api.FailoverMoveStatus{Phase: api.MoveRunning, At: &runs, Epoch: 2}
		b := api.Binding{Meta: api.Meta{ID: "v1", Revision: 51}, Spec: api.BindingSpec{NodeID: "n2", Node: "m2", Epoch: 2}}
		reply(api.FailoverProof{Failover: o, Moves: []api.FailoverMove{m}, Bindings: []api.Binding{b}, Revision: 60})
	}
}
