// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"path/filepath"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/pki"
	"github.com/muster-vm/muster/internal/version"
	"github.com/muster-vm/muster/monitor"
	"github.com/muster-vm/muster/monitor/series"
	"github.com/muster-vm/muster/monitor/snmp"
)

// wireMonitor builds what measures this node and what watches the cluster.
func (m *member) wireMonitor(services func() []api.ServiceStatus) error {
	var err error
	if m.cfg.SNMPListen != "" {
		m.agent, err = snmp.NewAgent(snmp.Config{
			Listen: m.cfg.SNMPListen, Community: m.cfg.SNMPCommunity, User: m.cfg.SNMPUser, Secret: m.cfg.SNMPSecret,
			NodeID: m.info.NodeID, Source: monitor.AgentSource{DB: m.store, Cluster: m.info.Cluster, Node: m.info.Node, Version: version.Version, Status: m.Status},
			Log: m.log.With("module", "snmp"),
		})
		if err != nil {
			return err
		}
	}
	m.meter = monitor.NewNode(monitor.NodeConfig{
		Node: m.info.Node, DataDir: m.cfg.DataDir, Guests: guestsOf{m}, Pools: m.poolMounts, Replica: m.replicaState,
		Lease: m.keeper.Remaining, Gossip: m.gossipMembers, Services: serviceStates(services), CertNotAfter: func() time.Time { return m.identity.Leaf().NotAfter }, CertLife: func() time.Duration { return pki.Life(m.identity.Leaf()) },
		Agent: m.agent, Log: m.log.With("module", "monitor"),
	})
	m.monitor = monitor.New(monitor.Config{
		DB: m.store, NodeID: m.info.NodeID, NodeName: m.info.Node, Cluster: m.info.Cluster, ClusterID: m.info.ClusterID,
		Members: m, Peers: peersOf{m}, Sealer: sealer{m.info.clusterKey}, Log: m.log.With("module", "monitor"),
	})
	m.wireLone()
	m.rpc.Handle(monitor.MethodProbe, m.meter.ServeProbe)
	return nil
}

// Members implements monitor.Members.
func (m *member) Members(ctx context.Context) ([]api.MemberStatus, error) {
	st, err := m.Status(ctx)
	return st.Members, err
}

// guestsOf are the VMs on this host as monitor sees them.
type guestsOf struct{ m *member }

// Guests implements series.Guests.
func (g guestsOf) Guests(ctx context.Context) ([]series.Guest, error) {
	v := g.m.store.Local()
	qemus := g.m.hyper.Measure(ctx)
	var out []series.Guest
	for _, b := range bindingsOf(v, g.m.info.NodeID) {
		vm, err := configdb.VMs.Get(v, b.Meta.ID)
		if err != nil || vm.Status.PID == 0 {
			continue // gone, or not running
		}
		q, asked := qemus[vm.Meta.ID]
		out = append(out, series.Guest{
			ID: vm.Meta.ID, Name: vm.Meta.Name, Project: vm.Meta.Project, PID: vm.Status.PID, Memory: int64(vm.Spec.Memory),
			Balloon: q.Balloon, Disks: asked, DiskRead: q.DiskRead, DiskWritten: q.DiskWritten,
		})
	}
	return out, nil
}

// poolMounts are the directories of the pools that are ready here and have one.
func (m *member) poolMounts() []series.Mount {
	v := m.store.Local()
	pools, err := configdb.Pools.List(v)
	if err != nil {
		m.log.Warn("pools that cannot be read are not measured", "err", err)
	}
	var out []series.Mount
	for i := range pools {
		if pools[i].Spec.Type == api.PoolRBD || !m.storage.HasPool(v, pools[i].Meta.Name) {
			continue // a pool in Ceph has no directory; its state says how full it is
		}
		path := pools[i].Spec.Path
		if path == "" {
			path = filepath.Join(m.cfg.DataDir, poolDir)
		}
		out = append(out, series.Mount{Name: pools[i].Meta.Name, Path: path})
	}
	return out
}

func (m *member) replicaState() series.ReplicaState {
	_, leads := m.store.Leadership()
	_, committed, applied := m.store.Indexes()
	age, known := m.store.Staleness()
	entries, took := m.store.ApplyTime()
	return series.ReplicaState{
		Leader: leads, Term: m.store.Term(), Applied: applied, Committed: committed,
		Revision: m.store.Local().Revision(), Staleness: age, StalenessKnown: known,
		Entries: entries, ApplyTime: took,
	}
}

func serviceStates(list func() []api.ServiceStatus) func() []series.ServiceState {
	return func() []series.ServiceState {
		var out []series.ServiceState
		for _, s := range list() {
			out = append(out, series.ServiceState{Name: s.Name, Running: s.State == api.ServiceRunning, Restarts: uint64(max(0, s.Restarts))})
		}
		return out
	}
}

// peersOf calls nodes for monitor.
type peersOf struct{ m *member }

// Call implements monitor.Peers.
func (p peersOf) Call(ctx context.Context, n api.Node, method string, request []byte) ([]byte, error) {
	if n.Meta.ID == p.m.info.NodeID {
		return p.m.meter.ServeProbe(ctx, request)
	}
	return p.m.client.Call(ctx, n.Meta.ID, n.Spec.Address, method, request)
}

// sealer keeps secrets with the cluster key.
type sealer struct{ key []byte }

// Seal implements monitor.Sealer.
func (s sealer) Seal(label string, plain []byte) ([]byte, error) {
	return pki.Seal(s.key, label, plain)
}

// Open implements monitor.Sealer.
func (s sealer) Open(label string, sealed []byte) ([]byte, error) {
	return pki.Open(s.key, label, sealed)
}

// monitorOf is monitoring as rest sees it.
type monitorOf struct{ d *Daemon }

// WriteMetrics implements rest.Monitor.
func (o monitorOf) WriteMetrics(b *strings.Builder) {
	if m := o.d.current(); m != nil {
		m.meter.WriteMetrics(b)
	}
}

// Metrics implements rest.Monitor.
func (o monitorOf) Metrics(name string, since time.Duration) api.Metrics {
	if m := o.d.current(); m != nil {
		return m.meter.Metrics(name, since)
	}
	return api.Metrics{Node: o.d.nodeName()}
}

// SealSecret implements rest.Monitor.
func (o monitorOf) SealSecret(receiverID, secret string) ([]byte, error) {
	m := o.d.current()
	if m == nil {
		return nil, notMember()
	}
	return m.monitor.SealSecret(receiverID, secret)
}

// TestReceiver implements rest.Monitor.
func (o monitorOf) TestReceiver(ctx context.Context, receiverID, actor string) error {
	m := o.d.current()
	if m == nil {
		return notMember()
	}
	return m.monitor.TestReceiver(ctx, receiverID, actor)
}
