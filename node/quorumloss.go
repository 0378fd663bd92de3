// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"slices"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// quorumPatience is how long this node may know no leader and have no answer of one
// before it says that the quorum is lost: an election is over in less.
const quorumPatience = 5 * time.Second

// noQuorum is what the current member, if there is one, knows of a lost quorum.
func (d *Daemon) noQuorum() *api.QuorumLoss {
	if m := d.current(); m != nil {
		return m.noQuorum()
	}
	return nil
}

// noQuorum returns nil while this node has its quorum. It asks no other node, so
// that it answers at once.
func (m *member) noQuorum() *api.QuorumLoss {
	if _, _, led := m.store.Leader(); led {
		return nil
	}
	age, known := m.store.Staleness()
	if age < quorumPatience {
		return nil
	}
	members, err := m.store.Members()
	if err != nil {
		return nil // only when the store is closed
	}
	l := &api.QuorumLoss{Since: time.Now().Add(-age).UTC().Truncate(time.Second), Unheard: !known, Missing: []api.MissingVoter{}, Guests: []api.LostGuest{}}
	v, hints := m.store.Local(), m.hints()
	for _, mb := range members {
		if !mb.Voter {
			continue
		}
		l.Voters++
		hint := hints[mb.NodeID]
		if mb.NodeID == m.info.NodeID || hint != nil && hint.State == api.GossipAlive {
			l.Reachable++
			continue
		}
		miss := api.MissingVoter{Node: mb.NodeID, Address: mb.Address, State: api.GossipUnknown}
		if hint != nil {
			miss.State = hint.State
		}
		if n, err := configdb.Nodes.Get(v, mb.NodeID); err == nil {
			miss.Node, miss.Role = n.Meta.Name, n.Spec.Role
		}
		l.Missing = append(l.Missing, miss)
	}
	l.Needed = l.Voters/2 + 1
	slices.SortFunc(l.Missing, func(a, b api.MissingVoter) int { return strings.Compare(a.Node, b.Node) })
	if m.keeper != nil {
		_, _, l.LeaseHeld = m.keeper.Current()
	}
	l.Guests = append(l.Guests, lostGuests(v, m.info.NodeID, l.LeaseHeld)...)
	l.Describe(m.info.Node, m.info.Role, m.cfg.DataDir)
	return l
}

// lostGuests are the VMs that ran on a node as its replica knows: without a quorum
// nothing newer can be written.
func lostGuests(v *configdb.View, nodeID string, leaseHeld bool) []api.LostGuest {
	var out []api.LostGuest
	for _, b := range bindingsOf(v, nodeID) {
		vm, err := configdb.VMs.Get(v, b.Meta.ID)
		if err != nil || vm.Status.PID == 0 {
			continue
		}
		g := api.LostGuest{VM: vm.Meta.Name, Project: vm.Meta.Project}
		g.Judge(&b.Spec, leaseHeld)
		out = append(out, g)
	}
	slices.SortFunc(out, func(a, b api.LostGuest) int {
		return strings.Compare(a.Project+"/"+a.VM, b.Project+"/"+b.VM)
	})
	return out
}
