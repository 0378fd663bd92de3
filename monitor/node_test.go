// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package monitor

import (
	"context"
	"encoding/json"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/muster-vm/muster/monitor/series"
)

func TestANodeAnswersProbesAndPrometheus(t *testing.T) {
	dir := t.TempDir() // its removal is no part of the bubble
	synctest.Test(t, func(t *testing.T) {
		end := time.Now().AddDate(0, 1, 0).UTC()
		n := NewNode(NodeConfig{
			Node: "m1", DataDir: dir, CertNotAfter: func() time.Time { return end },
			Lease:  func() time.Duration { return 7 * time.Second },
			Gossip: func() map[string]int { return map[string]int{"alive": 3, "dead": 1} },
			Replica: func() series.ReplicaState {
				return series.ReplicaState{Leader: true, Term: 3, Applied: 90, Committed: 100, Entries: 40, ApplyTime: 20 * time.Millisecond}
			},
			Services: func() []series.ServiceState { return []series.ServiceState{{Name: "ha", Running: true, Restarts: 2}} },
			Pools:    func() []series.Mount { return []series.Mount{{Name: "local", Path: dir}} },
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- n.Run(ctx) }()
		time.Sleep(11 * time.Second)
		synctest.Wait()
		var b strings.Builder
		n.WriteMetrics(&b)
		for _, want := range []string{
			"muster_lease_remaining_seconds 7\n", "muster_raft_lag_entries 10\n", "muster_raft_apply_seconds 0.0005\n", "muster_raft_applies_total 40\n", `muster_service_restarts_total{service="ha"} 2`, "# TYPE muster_node_load1 gauge\n",
			`muster_gossip_members{state="alive"} 3`, `muster_gossip_members{state="dead"} 1`,
			`muster_collector_up{collector="node"} 1`, `muster_pool_used_percent{pool="local"} `,
		} {
			if !strings.Contains(b.String(), want) {
				t.Errorf("/metrics lacks %q:\n%s", want, b.String())
			}
		}
		raw, err := n.ServeProbe(ctx, []byte(`{"metrics":["muster_raft_leader","muster_pool_used_percent","none"]}`))
		var a probeAnswer
		if err != nil || json.Unmarshal(raw, &a) != nil || len(a.Samples) != 2 || !a.CertNotAfter.Equal(end) || a.Time != time.Now().UnixNano() {
			t.Errorf("probe %s, %v", raw, err)
		}
		for _, bad := range []string{"", "[]", `{"metrics":[` + strings.Repeat(`"x",`, 500) + `"x"]}`} {
			if _, err := n.ServeProbe(ctx, []byte(bad)); err == nil {
				t.Errorf("probe %.20q was answered", bad)
			}
		}
		if m := n.Metrics("muster_lease_*", time.Hour); m.Node != "m1" || len(m.Series) != 1 || len(m.Series[0].Points) != 2 || len(m.Collectors) != 8 {
			t.Errorf("metrics %+v", m)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestAProbeSaysWhatTheNodeDoesNotKnow: without this, each restart of a daemon
// and each dead server would look like recovery.
func TestAProbeSaysWhatTheNodeDoesNotKnow(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		var hang atomic.Bool
		release := make(chan struct{})
		n := NewNode(NodeConfig{
			Node: "m1", DataDir: dir,
			Services: func() []series.ServiceState {
				if hang.Load() {
					<-release
				}
				return []series.ServiceState{{Name: "ha", Running: true}}
			},
		})
		probe := func() probeAnswer {
			t.Helper()
			raw, err := n.ServeProbe(t.Context(), []byte(`{"metrics":["muster_service_up","muster_node_load1"]}`))
			var a probeAnswer
			if err != nil || json.Unmarshal(raw, &a) != nil {
				t.Fatalf("probe %s, %v", raw, err)
			}
			return a
		}
		if a := probe(); !a.Partial {
			t.Errorf("before it measures: %+v", a)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- n.Run(ctx) }()
		time.Sleep(time.Second)
		if a := probe(); !a.Partial || len(a.Samples) != 2 || len(a.Stuck) != 0 {
			t.Errorf("soon after the begin: %+v", a)
		}
		time.Sleep(2 * time.Minute)
		if a := probe(); a.Partial || len(a.Samples) != 2 || len(a.Stuck) != 0 {
			t.Errorf("when all is known: %+v", a)
		}
		hang.Store(true)
		time.Sleep(2 * time.Minute)
		if a := probe(); a.Partial || len(a.Samples) != 1 || len(a.Stuck) != 1 || a.Stuck[0] != `muster_service_up{service="ha"}` {
			t.Errorf("while a collector hangs: %+v", a)
		}
		close(release)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
