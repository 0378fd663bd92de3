// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"maps"
	"slices"
)

// answer answers the questions in notes that are for this node to answer: each once, and
// only if the note changes since this node reads it, so that its node lives. It is one
// answer for all.
func (h *Heartbeat) answer(ctx context.Context, notes []found) {
	_, leads := h.c.Service.grant.leader.Leadership()
	leader := h.c.Electorate.Leader()
	carries := !leads && leader != ""
	if carries { // what it does not see by itself
		notes = slices.DeleteFunc(notes, func(f found) bool { return !h.blind(leader, f.pool) })
	}
	asking := h.asking(notes)
	if len(asking) == 0 {
		return
	}
	actx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	var a answer
	if leads || carries {
		lease := h.c.Service.grant.renewByNotes
		if carries {
			lease = h.carry
		}
		grant, to, err := lease(actx, slices.Sorted(maps.Keys(asking)))
		if err != nil {
			h.c.Log.Debug("no lease by a note", "err", err)
		}
		for _, node := range to {
			a.To = append(a.To, asking[node].ID)
		}
		a.Grant = &grant
	} else {
		term := uint64(0)
		for _, node := range slices.Sorted(maps.Keys(asking)) {
			if q := asking[node]; q.Leave != 0 {
				term = max(term, q.Leave)
				a.To = append(a.To, q.ID)
			}
		}
		left, ok := h.leave(actx, term)
		if !ok {
			return
		}
		a.Left = &left
	}
	if len(a.To) > 0 {
		h.given = append(h.given, given{a, h.c.Now()})
	}
}

// asking returns the questions in notes that this node has not answered, by node.
func (h *Heartbeat) asking(notes []found) map[string]question {
	out, newest := map[string]question{}, map[string]uint64{}
	for _, n := range notes {
		if n.Asks == nil || n.Number < newest[n.Node] || !h.lives(n) {
			continue
		}
		newest[n.Node] = n.Number
		delete(out, n.Node)
		if !slices.ContainsFunc(h.given, func(g given) bool { return slices.Contains(g.To, n.Asks.ID) }) {
			out[n.Node] = *n.Asks
		}
	}
	return out
}

// abstains reports whether this node is a voter that has missed the leader for long
// enough to leave its term. Who does not vote has none: its term says nothing, and would
// depose a leader.
func (h *Heartbeat) abstains() bool {
	return h.c.Electorate.Leaderless() > leaderlessAfter && slices.Contains(h.c.Electorate.Voters(), h.c.NodeID)
}

// leave is a voter's answer while it knows no leader.
func (h *Heartbeat) leave(ctx context.Context, term uint64) (abstention, bool) {
	if term == 0 || !h.abstains() {
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
