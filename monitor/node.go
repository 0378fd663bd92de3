// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package monitor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/monitor/series"
	"github.com/muster-vm/muster/monitor/snmp"
)

// NodeConfig describes the part that runs on every node. What is nil is not
// measured.
type NodeConfig struct {
	Node    string
	DataDir string
	// Proc is the /proc file system; "/proc" when empty.
	Proc string
	// Guests are the VMs on this host.
	Guests series.Guests
	// Pools are the directories of the pools that this node has.
	Pools func() []series.Mount
	// Replica is the configuration database as this node sees it.
	Replica func() series.ReplicaState
	// Lease is how long this node's lease is still valid.
	Lease func() time.Duration
	// Gossip counts the nodes by their state in gossip.
	Gossip func() map[string]int
	// Services are the supervised services.
	Services func() []series.ServiceState
	// CertNotAfter is the end of this node's certificate.
	CertNotAfter func() time.Time
	// CertLife is how long that certificate was to last when it was issued.
	CertLife func() time.Duration
	// Agent answers SNMP.
	Agent *snmp.Agent
	Log   *slog.Logger
	Now   func() time.Time
}

// Node measures one node and answers for it.
type Node struct {
	cfg    NodeConfig
	began  atomic.Int64 // Run, in nanoseconds since 1970
	store  *series.Store
	runner *series.Runner
}

// NewNode returns a node that measures nothing until Run.
func NewNode(cfg NodeConfig) *Node {
	if cfg.Proc == "" {
		cfg.Proc = "/proc"
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	proc := series.Proc(cfg.Proc)
	list := []series.Collector{proc.CPU(), proc.NICs(), series.DataDir(cfg.DataDir)}
	if cfg.Pools != nil {
		list = append(list, series.Pools(cfg.Pools))
	}
	if cfg.Guests != nil {
		list = append(list, proc.VMs(cfg.Guests))
	}
	if cfg.Replica != nil {
		list = append(list, series.Replica(cfg.Replica))
	}
	if cfg.Lease != nil {
		list = append(list, series.Lease(cfg.Lease))
	}
	if cfg.Gossip != nil {
		list = append(list, series.Gossip(cfg.Gossip))
	}
	if cfg.Services != nil {
		list = append(list, series.Services(cfg.Services))
	}
	if cfg.Agent != nil {
		list = append(list, agentCollector(cfg.Agent))
	}
	store := series.NewStore(cfg.Now)
	return &Node{cfg: cfg, store: store, runner: series.NewRunner(store, cfg.Log, list...)}
}

// agentPeriod is how often the counters of the SNMP agent are taken.
const agentPeriod = 10 * time.Second

func agentCollector(a *snmp.Agent) series.Collector {
	return series.Collector{Name: "snmp", Period: agentPeriod, Deadline: time.Second, Collect: func(_ context.Context, r *series.Report) error {
		s := a.Stats()
		r.Set(series.AgentRequests, float64(s.Answered))
		for _, c := range []struct {
			reason string
			n      uint64
		}{
			{"malformed", s.Malformed}, {"community", s.WrongCommunity}, {"user", s.UnknownUser},
			{"authentication", s.NotAuthentic}, {"time", s.Stale}, {"unsupported", s.Unsupported},
		} {
			r.Set(series.AgentRefused, float64(c.n), series.Label{Name: "reason", Value: c.reason})
		}
		return nil
	}}
}

// settleTime is how long after its begin a node may lack series: some need two
// runs of their collector.
const settleTime = 60 * time.Second

// Run measures until the context ends.
func (n *Node) Run(ctx context.Context) error {
	n.began.Store(n.cfg.Now().UnixNano())
	return n.runner.Run(ctx)
}

// WriteMetrics appends the current values in the Prometheus text format.
func (n *Node) WriteMetrics(b *strings.Builder) { n.store.WriteText(b) }

// Metrics returns the series of a name, or those that begin with name if that
// ends in *; all when it is empty. since is how far back, 0 for the newest
// values only.
func (n *Node) Metrics(name string, since time.Duration) api.Metrics {
	return api.Metrics{Node: n.cfg.Node, Series: n.store.Query(name, since), Collectors: n.runner.States()}
}

// ServeProbe answers the leader's MethodProbe.
func (n *Node) ServeProbe(_ context.Context, request []byte) ([]byte, error) {
	var q probeRequest
	if err := json.Unmarshal(request, &q); err != nil {
		return nil, fmt.Errorf("decode probe: %w", err)
	}
	if len(q.Metrics) > maxWanted+1 {
		return nil, errors.New("decode probe: too many metrics")
	}
	var a probeAnswer
	if n.cfg.CertNotAfter != nil {
		a.CertNotAfter = n.cfg.CertNotAfter()
	}
	began := n.began.Load()
	a.Partial = began == 0 || n.cfg.Now().Sub(time.Unix(0, began)) < settleTime
	failing := map[string]bool{}
	for _, st := range n.runner.States() {
		failing[st.Name] = !st.OK
	}
	if n.cfg.CertLife != nil {
		a.CertLife = n.cfg.CertLife()
	}
	for _, name := range q.Metrics {
		for _, s := range n.store.Query(strings.TrimSuffix(name, "*"), 0) {
			if len(a.Samples) == maxSamples {
				a.Partial = true
				break
			}
			a.Samples = append(a.Samples, probeSample{Metric: s.Name, Labels: s.Labels, Value: s.Points[0].Value})
		}
		stuck := n.store.Stuck(name, failing)
		a.Stuck = append(a.Stuck, stuck[:min(len(stuck), maxSamples-len(a.Stuck))]...)
	}
	a.Time = n.cfg.Now().UnixNano() // last, so that it is as young as can be
	return json.Marshal(a)
}

// AgentSource shows a node's replica to its SNMP agent.
type AgentSource struct {
	DB      configdb.DB
	Cluster string
	Node    string
	Version string
	Status  func(ctx context.Context) (api.ClusterStatus, error)
}

// State implements snmp.Source.
func (s AgentSource) State(ctx context.Context) (*snmp.State, error) {
	st, err := s.Status(ctx)
	if err != nil {
		return nil, err
	}
	v := s.DB.Local()
	out := &snmp.State{Cluster: s.Cluster, Node: s.Node, Version: s.Version, Status: st}
	var errs [3]error
	// What cannot be read is left out: the rest is still worth an answer.
	out.Nodes, errs[0] = configdb.Nodes.List(v)
	out.VMs, errs[1] = configdb.VMs.List(v)
	out.Alerts, errs[2] = configdb.Alerts.List(v)
	if err := errors.Join(errs[:]...); err != nil {
		slog.Debug("objects left out of the SNMP tables", "err", err)
	}
	return out, nil
}
