// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/clusternet"
	"github.com/muster-vm/muster/internal/contain"
	"github.com/muster-vm/muster/internal/gossip"
	"github.com/muster-vm/muster/internal/pki"
	"github.com/muster-vm/muster/internal/version"
	"github.com/muster-vm/muster/monitor/series"
)

// Times and names of gossip.
const (
	// gossipLook is how often members and keys are compared with the database.
	gossipLook     = time.Second
	gossipKeyLabel = "cluster/gossip-key"
)

// listenPort takes the one port number, for TCP and for the packets of gossip.
func listenPort(listen string) (net.Listener, net.PacketConn, error) {
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		return nil, nil, portError(listen, err)
	}
	udp, err := net.ListenPacket("udp", listen)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("cannot listen on UDP %s, which the nodes need besides TCP: %w; stop what uses the port, or choose another with --listen ADDR:PORT", listen, err), ln.Close())
	}
	return ln, udp, nil
}

func (m *member) newGossip(packets net.PacketConn) *gossip.Service {
	return gossip.New(gossip.Config{
		NodeID: m.info.NodeID, Packets: packets, Dial: m.identity, Local: m.load,
		Listen: func() net.Listener { return m.port.Listener(clusternet.ProtoGossip) },
		Log:    m.log.With("module", "gossip"),
	})
}

// gossiping runs gossip with the members and keys that the database has.
func (m *member) gossiping(ctx context.Context) error {
	group, ctx := contain.NewGroup(ctx)
	group.Go(func() { m.tellGossip(ctx) })
	return errors.Join(m.gossip.Run(ctx), group.Stop())
}

// tellGossip keeps members and keys up to date.
func (m *member) tellGossip(ctx context.Context) {
	tick := time.NewTicker(gossipLook)
	defer tick.Stop()
	var seen gossipMark
	var told string
	for {
		v := m.store.Local()
		if mark := m.gossipMark(v); mark != seen {
			if err := m.setGossip(v); err == nil {
				seen, told = mark, ""
			} else if told != err.Error() {
				told = err.Error()
				m.log.Warn("gossip goes on with what it knew", "err", err)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// gossipMark changes whenever members or keys may have: of every prefix the number
// of keys and the newest revision.
type gossipMark struct {
	nodes, removed              int
	nodesAt, removedAt, cluster uint64
}

func (m *member) gossipMark(v *configdb.View) gossipMark {
	var k gossipMark
	for e := range v.Scan(configdb.Nodes.SpecPrefix(), "") {
		k.nodes++
		k.nodesAt = max(k.nodesAt, e.Revision)
	}
	for e := range v.Scan(removedPrefix, "") {
		k.removed++
		k.removedAt = max(k.removedAt, e.Revision)
	}
	if e, ok := v.Get(configdb.Clusters.SpecKey(m.info.ClusterID)); ok {
		k.cluster = e.Revision
	}
	return k
}

func (m *member) setGossip(v *configdb.View) error {
	nodes, err := configdb.Nodes.List(v)
	if err != nil {
		return err
	}
	list := make([]gossip.Member, 0, len(nodes))
	for i := range nodes {
		n := &nodes[i]
		if m.trusted(n.Meta.ID) == nil {
			list = append(list, gossip.Member{ID: n.Meta.ID, Name: n.Meta.Name, Address: n.Spec.Address})
		}
	}
	m.gossip.SetMembers(list)
	c, err := configdb.Clusters.Get(v, m.info.ClusterID)
	if err != nil || c.Spec.Gossip == nil {
		return api.IgnoreNotFound(err) // not replicated yet, or the leader adds it
	}
	keys, err := m.gossipKeys(&c.Spec)
	if err != nil {
		return err
	}
	return m.gossip.SetKeys(keys)
}

// gossipKeys opens the keys of the cluster.
func (m *member) gossipKeys(c *api.ClusterSpec) (gossip.Keys, error) {
	scope := fmt.Sprintf("%s/%d", m.info.ClusterID, c.Life)
	var keys gossip.Keys
	for i, sealed := range [][]byte{c.Gossip.Primary, c.Gossip.Next, c.Gossip.Previous} {
		if len(sealed) == 0 && i > 0 {
			continue
		}
		secret, err := pki.Open(m.info.clusterKey, gossipKeyLabel, sealed)
		if err != nil {
			return keys, err
		}
		key, err := gossip.DeriveKey(secret, scope)
		if err != nil {
			return keys, err
		}
		if i == 0 {
			keys.Primary = key
		} else {
			keys.Others = append(keys.Others, key)
		}
	}
	return keys, nil
}

// load is what this node tells the others of itself.
func (m *member) load() gossip.Summary {
	s := gossip.Summary{
		CPUPercent: -1, DiskFull: m.store.DiskFull() != nil, Revision: m.store.Local().Revision(),
		VMs: uint64(m.hyper.Running()), Version: version.Version, FeatureLevel: version.FeatureLevel,
	}
	var used uint64
	for _, name := range []string{"muster_node_*", "muster_disk_*"} {
		for _, one := range m.meter.Metrics(name, 0).Series {
			v := one.Points[0].Value
			switch one.Name {
			case series.NodeCPU:
				s.CPUPercent = v
			case series.NodeMemTotal:
				s.MemoryTotal = uint64(v)
			case series.NodeMemUsed:
				used = uint64(v)
			case series.DiskFree:
				s.DiskFree = uint64(v)
			case series.DiskTotal:
				s.DiskTotal = uint64(v)
			}
		}
	}
	if used <= s.MemoryTotal {
		s.MemoryFree = s.MemoryTotal - used
	}
	return s
}

// hints returns what gossip knows of the nodes, by ID.
func (m *member) hints() map[string]*api.GossipHint {
	out := map[string]*api.GossipHint{}
	for _, p := range m.gossip.Peers() {
		h := &api.GossipHint{State: p.State}
		if !p.Since.IsZero() {
			h.ForSeconds = time.Since(p.Since).Seconds()
		}
		if p.Known {
			h.Load, h.AgeSeconds = loadOf(p.Summary), p.SummaryAge.Seconds()
		}
		out[p.ID] = h
	}
	return out
}

// loadOf turns a summary into the form of REST. Numbers that cannot be come from
// a broken node and are cut.
func loadOf(s gossip.Summary) *api.NodeLoad {
	size := func(v uint64) api.Size { return api.Size(min(v, 1<<62)) }
	l := &api.NodeLoad{
		MemoryFree: size(s.MemoryFree), MemoryTotal: size(s.MemoryTotal), DiskFree: size(s.DiskFree), DiskTotal: size(s.DiskTotal),
		DiskFull: s.DiskFull, Revision: s.Revision, VMs: int(min(s.VMs, 1<<31)), Version: s.Version, FeatureLevel: int(min(s.FeatureLevel, 1<<31)),
	}
	if s.CPUPercent >= 0 {
		l.CPUPercent = &s.CPUPercent
	}
	return l
}

// gossipMembers counts the members by state, for monitoring.
func (m *member) gossipMembers() map[string]int {
	out := map[string]int{}
	for _, s := range []api.GossipState{api.GossipUnknown, api.GossipAlive, api.GossipSuspect, api.GossipDead, api.GossipLeft} {
		out[string(s)] = 0
	}
	for _, p := range m.gossip.Peers() {
		out[string(p.State)]++
	}
	return out
}
