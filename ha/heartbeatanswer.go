// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"slices"

	"github.com/muster-vm/muster/configdb"
)

// answer answers the question in a note, if it is for this node to do so: once, and
// only if the note has changed since this node reads it, so that its node lives.
func (h *Heartbeat) answer(ctx context.Context, n *note) {
	if n.Asks == nil || slices.ContainsFunc(h.given, func(g given) bool { return g.Node == n.Node && g.ID == n.Asks.ID }) {
		return
	}
	if _, ago, ok := h.seen(n.Node); !ok || ago > askAgain {
		return
	}
	actx, cancel := context.WithTimeout(ctx, noteLimit)
	defer cancel()
	a := answer{Node: n.Node, ID: n.Asks.ID}
	if _, leads := h.c.Service.grant.leader.Leadership(); leads {
		grant, err := h.c.Service.grant.renewByNote(actx, n.Node)
		if err != nil {
			h.c.Log.Debug("no lease by a note", "node", n.Node, "err", err)
			return
		}
		a.Grant = &grant
	} else {
		left, ok := h.leave(actx, n)
		if !ok {
			return
		}
		a.Left = (*abstention)(&left)
	}
	h.given = append(h.given, given{a, h.c.Now()})
}

// leave is a voter's answer while it knows no leader.
func (h *Heartbeat) leave(ctx context.Context, n *note) (configdb.Abstention, bool) {
	if n.Asks.Leave == 0 || h.c.Electorate.Leaderless() <= leaderlessAfter || !slices.Contains(h.c.Electorate.Voters(), h.c.NodeID) {
		return configdb.Abstention{}, false
	}
	left, err := h.c.Electorate.Abstain(ctx, n.Asks.Leave)
	if err != nil {
		h.c.Log.Debug("this node does not leave its term", "node", n.Node, "err", err)
		return configdb.Abstention{}, false
	}
	h.note(left)
	return left, true
}
