// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

const (
	// cutOffAfter is the silence of the network after which a node whose lease goes on
	// by notes is said to be cut off, cutOffEvery how often that is looked at.
	cutOffAfter = 2 * cutAfter
	cutOffEvery = time.Second
	// livesWithin is how old the last note may be of a host that lives.
	livesWithin = 2 * stampEvery
)

// noteCutOff says in the database which nodes are heard by notes alone: they get no VMs.
func (s *Service) noteCutOff(ctx context.Context, term uint64) {
	if s.seen == nil || s.grant.now() < s.cutOffNext {
		return
	}
	s.cutOffNext = s.grant.now() + cutOffEvery
	nodes, _ := configdb.Nodes.List(s.db.Local()) // readyNodes says what cannot be read
	for i := range nodes {
		n := &nodes[i]
		if n.Status.Phase != api.NodeReady {
			continue
		}
		quiet, noted, wired := s.grant.offWire(term, n.Meta.ID)
		cut := noted && quiet > cutOffAfter
		back := wired && quiet <= cutAfter // in this term: a new leader does not know yet
		if was := n.Status.CutOff != nil; cut == was || was && !back {
			continue
		}
		if err := s.writeCutOff(ctx, term, n.Meta.ID, cut); err != nil && ctx.Err() == nil {
			s.log.Warn("that a node is cut off, or not any more, is not noted", "node", n.Meta.Name, "err", err)
		}
	}
}

func (s *Service) writeCutOff(ctx context.Context, term uint64, nodeID string, cut bool) error {
	_, err := configdb.Transact(ctx, s.db, Actor, 2, func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Get(v, nodeID)
		if err != nil || n.Status.Phase != api.NodeReady {
			return api.IgnoreNotFound(err)
		}
		tx.RequireTerm(term)
		if n.Status.CutOff = nil; cut {
			sees, _, known := s.seen(nodeID) // not of questions that were carried here
			n.Status.CutOff = &api.CutOff{Since: time.Now().UTC(), Isolated: known && sees == 0}
		}
		return configdb.Nodes.UpdateStatus(v, tx, &n)
	})
	return err
}

// lastSeen says what notes in pools show of a node that is lost.
func (s *Service) lastSeen(nodeID string) string {
	if s.seen == nil {
		return ""
	}
	switch _, ago, ok := s.seen(nodeID); {
	case ok && ago < livesWithin:
		return ", though its daemon still writes to the pools"
	case ok:
		return ", and it writes nothing to the pools any more"
	}
	return ""
}
