// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"crypto/rand"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/ha"
	"github.com/muster-vm/muster/storage"
)

// newHeartbeat keeps the lease by notes in pools when the network fails.
func (m *member) newHeartbeat() *ha.Heartbeat {
	return ha.NewHeartbeat(ha.HeartbeatConfig{
		NodeID: m.info.NodeID, Boot: m.facts.bootID, Life: m.info.life(), Notes: notes{m.storage}, Keeper: m.keeper, Service: m.ha,
		Electorate: electorate{m.store}, Caller: m, DB: m.store, Sees: m.sees, Random: rand.Text, Log: m.log.With("module", "ha"),
	})
}

// sees is how many other nodes gossip hears.
func (m *member) sees() (n int) {
	for _, p := range m.gossip.Peers() {
		if !p.Self && p.State == api.GossipAlive {
			n++
		}
	}
	return n
}

// notes are those of pools.
type notes struct{ s *storage.Service }

// Pools implements ha.Notes.
func (n notes) Pools() []string { return n.s.NotePools() }

// Write implements ha.Notes.
func (n notes) Write(ctx context.Context, poolID string, note []byte) error {
	return n.s.WriteNote(ctx, poolID, note)
}

// Read implements ha.Notes.
func (n notes) Read(ctx context.Context, poolID, nodeID string) ([]byte, error) {
	return n.s.ReadNote(ctx, poolID, nodeID)
}

// electorate is Raft's, as this node knows it.
type electorate struct{ *configdb.Store }

// Leader implements ha.Electorate.
func (e electorate) Leader() string {
	id, _, _ := e.Store.Leader()
	return id
}

// Voters implements ha.Electorate.
func (e electorate) Voters() []string {
	members, _ := e.Store.Members() // none while Raft shuts down
	return voting(members)
}

// voting returns the IDs of those who vote.
func voting(members []configdb.Member) (ids []string) {
	for _, m := range members {
		if m.Voter {
			ids = append(ids, m.NodeID)
		}
	}
	return ids
}
