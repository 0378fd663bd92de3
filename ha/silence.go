// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"fmt"
	"time"

	"github.com/muster-vm/muster/configdb"
)

const (
	// silentAfter is how long a node may be silent and still be given VMs of a
	// lost one: three requests for a lease that did not come.
	silentAfter = 3 * RenewEvery
	// gatherWithin is how long the recovery waits for a node that is about to be
	// declared lost, so that nodes that died together are in one plan.
	gatherWithin = 2 * time.Second
)

// silent are the nodes that are not lost yet but may be dead, with the reason.
func (s *Service) silent() map[string]string {
	out := map[string]string{}
	v := s.db.Local()
	for _, id := range s.readyNodes() {
		quiet, noted, wired := s.grant.offWire(s.term(), id)
		n, err := configdb.Nodes.Get(v, id)
		switch d := s.grant.silence(id); {
		case d >= silentAfter:
			out[id] = fmt.Sprintf("has not renewed its lease for %d s", int(d.Seconds()))
		case noted:
			out[id] = fmt.Sprintf("was not heard over the network for %d s; its lease is renewed through a pool", int(quiet.Seconds()))
		case err == nil && n.Status.CutOff != nil && !wired:
			out[id] = "was cut off from the network, and this leader has not heard it since it leads"
		}
	}
	return out
}

// term is that of the leadership of this node, 0 without.
func (s *Service) term() uint64 {
	l, _ := s.grant.leader.Leadership()
	return l.Term
}

// gathering reports whether a node is about to be declared lost: within
// gatherWithin it is, or has renewed its lease.
func (s *Service) gathering() bool {
	for _, id := range s.readyNodes() {
		if d, _ := s.grant.leaseless(id); d > LostAfter-gatherWithin && d < LostAfter+gatherWithin {
			return true
		}
	}
	return false
}
