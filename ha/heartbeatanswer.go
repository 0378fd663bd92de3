// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"slices"
)

// answer answers the question in a note, if it is for this node to do so: once, and
// only if the note has changed since this node reads it, so that its node lives.
func (h *Heartbeat) answer(ctx context.Context, n found) {
	if n.Asks == nil || slices.ContainsFunc(h.given, func(g given) bool { return g.Node == n.Node && g.ID == n.Asks.ID }) {
		return
	}
	if !h.lives(n) {
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
		left, ok := h.leave(actx, n.Asks.Leave)
		if !ok {
			return
		}
		a.Left = &left
	}
	h.given = append(h.given, given{a, h.c.Now()})
}

// leave is a voter's answer while it knows no leader. Who does not vote has none: its
// term says nothing, and would depose a leader.
func (h *Heartbeat) leave(ctx context.Context, term uint64) (abstention, bool) {
	if term == 0 || h.c.Electorate.Leaderless() <= leaderlessAfter || !slices.Contains(h.c.Electorate.Voters(), h.c.NodeID) {
		return abstention{}, false
	}
	left, err := h.c.Electorate.Abstain(ctx, term)
	if err != nil {
		h.c.Log.Debug("this node does not leave its term", "err", err)
		return abstention{}, false
	}
	h.note(abstention(left))
	return abstention(left), true
}
