// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"encoding/json"
	"fmt"
	"net/http"

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
			Node: "m2", Revision: 12, Seconds: 0.0042, Quorum: api.HAQuorum{Voters: 3, Left: 3, Needed: 2, Spare: 1, Kept: true}, Witness: "w",
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
