// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
)

func (f *fakeCluster) serveCluster(w http.ResponseWriter, r *http.Request, node, path string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	reply := func(status int, v any) { b, _ := json.Marshal(v); f.send(w, status, b) }
	switch r.Method + " " + path {
	case "GET cluster":
		busy := 42.4
		hints := map[string]*api.GossipHint{
			"m1": {State: api.GossipAlive, ForSeconds: 600, AgeSeconds: 2.5, Load: &api.NodeLoad{
				CPUPercent: &busy, MemoryFree: 2 * api.GiB, MemoryTotal: 16 * api.GiB, DiskFree: 5 * api.GiB, DiskTotal: 50 * api.GiB, Revision: 12, VMs: 3, Version: "1.2.3"}},
			"m2": {State: api.GossipSuspect, ForSeconds: 3.2, AgeSeconds: 8, Load: &api.NodeLoad{DiskTotal: 50 * api.GiB, DiskFull: true}},
		}
		if node == "local" {
			node = "m1"
		}
		s := api.ClusterStatus{Cluster: "prod", ClusterID: "c-1", Life: f.life, Node: node, Leader: "m1", Term: 3, Revision: f.rev, Quorum: true,
			FeatureLevel: &api.FeatureLevelStatus{Level: 1, Highest: 2, Waits: []string{"m2: supports 1"}}}
		for _, n := range []string{"m1", "m2"} {
			s.Members = append(s.Members, api.MemberStatus{NodeID: "id-" + n, Node: n, Address: "10.0.0.1:7600", Voter: true, Leader: n == "m1", Role: api.RoleVoter, Phase: api.NodeReady, Gossip: hints[n], Version: "0.9"})
		}
		s.Members[0].FeatureLevels, s.Members[1].FeatureLevels = &api.FeatureLevels{Min: 1, Max: 2}, &api.FeatureLevels{Min: 1, Max: 1}
		reply(200, s)
	case "POST cluster/init":
		if node != "local" {
			f.fail(w, api.Errorf(api.CodeForbidden, "only on the socket"))
			return
		}
		var in api.InitRequest
		if err := api.DecodeStrict(r.Body, &in); err != nil {
			f.fail(w, err)
			return
		}
		reply(200, api.InitResult{Cluster: first(in.Name, "muster"), ClusterID: "c-1", Node: "m1", Address: "10.0.0.1:7600", Token: "muster_01_first", CACert: "PEM"})
	case "POST cluster/join":
		var in api.JoinRequest
		_ = api.DecodeStrict(r.Body, &in)
		if in.Token != "join-me" {
			f.fail(w, api.Errorf(api.CodeRefused, "the token was used already; make another with muster cluster token create"))
			return
		}
		reply(200, api.JoinResult{Cluster: "prod", ClusterID: "c-1", Node: "m3", Address: "10.0.0.3:7600"})
	case "POST cluster/reboot", "POST cluster/reboot/plan":
		var in api.RollingRebootRequest
		if err := errors.Join(api.DecodeStrict(r.Body, &in), in.Validate()); err != nil {
			f.fail(w, err)
			return
		}
		if strings.HasSuffix(path, "plan") {
			reply(200, api.RebootPlan{Nodes: []api.PlannedReboot{
				{Node: "m2", Voters: 2, VotersNeeded: 2, VMs: []api.PlannedVM{{VM: "web1", To: "m1", Fate: api.FateMigrate}}},
				{Node: "m1", Voters: 2, VotersNeeded: 2, Leaders: []string{"m2", "m3"}, Refusal: "vm db1 runs; --level stop shuts it down", VMs: []api.PlannedVM{{VM: "db1", To: "m1", Fate: api.FateStay, Reason: "it has a TPM"}}},
			}})
			return
		}
		t := api.NewTask(api.ActionRolling, api.KindCluster, api.Meta{ID: "c-1", Name: "prod"}, "ann", time.Hour, time.Now())
		t.Status.Phase, t.Status.Message = api.TaskSucceeded, "rebooted: m2, m1"
		if in.Continue {
			t.Status.Phase, t.Status.Code, t.Status.Message = api.TaskFailed, api.CodeTimeout, "not all was well within 10m0s: node m2 is lost; rebooted: m2; left: m1"
		}
		reply(202, map[string]any{"task": t, "object": t, "revision": f.rev})
	case "POST cluster/tokens":
		var in api.JoinTokenRequest
		if err := api.DecodeStrict(r.Body, &in); err != nil {
			f.fail(w, err)
			return
		}
		reply(201, api.JoinToken{Token: fmt.Sprintf("join_%s_%d", in.Role, in.TTLSeconds)})
	default:
		if strings.HasPrefix(path, "cluster/ca") {
			f.serveAuthority(w, r, path)
			return
		}
		f.serveBackups(w, r, node, path)
	}
}
