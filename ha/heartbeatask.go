// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"slices"
	"time"
)

// ask makes a question if the network does not renew the lease. The time that it counts
// from is taken first.
func (h *Heartbeat) ask() {
	if !h.cut() {
		h.asked = nil
		if h.byNotes {
			h.byNotes = false
			h.c.Log.Info("the lease is not renewed by notes in pools any more")
		}
		return
	}
	sent := h.c.Now()
	if len(h.asked) > 0 {
		if last := h.asked[len(h.asked)-1]; sent-last.sent < askAgain/2 || !last.done && sent-last.sent < askAgain {
			return
		}
	}
	a := asked{question: question{ID: h.c.Random()}, sent: sent, left: map[string]abstention{}}
	if since, _ := h.c.Keeper.unanswered(); since > cutAfter+patience && sent-h.granted > patience {
		a.Leave = h.termToLeave()
	}
	h.asked = append(h.asked, a)
	h.asked = h.asked[max(0, len(h.asked)-questionsKept):]
}

// termToLeave is one that nobody has voted in, as far as this node knows.
func (h *Heartbeat) termToLeave() uint64 {
	if h.highest.Term == 0 {
		return h.c.Electorate.Term() + 1
	}
	term := max(h.highest.Term, h.c.Electorate.Term())
	if h.highest.Voted || term > h.highest.Term {
		term++
	}
	return term
}

// note keeps the highest term that was heard of.
func (h *Heartbeat) note(left abstention) {
	if left.Term > h.highest.Term || left.Term == h.highest.Term && left.Voted {
		h.highest = left
	}
}

// accept takes answers to this node's questions from a note.
func (h *Heartbeat) accept(ctx context.Context, n *note) {
	for _, answer := range n.Answers {
		for i := range h.asked {
			if h.asked[i].done || !slices.Contains(answer.To, h.asked[i].ID) {
				continue
			}
			switch {
			case answer.Grant != nil:
				h.granted = max(h.granted, h.asked[i].sent)
				h.goOn(ctx, i, "by the leader", n.Node)
			case answer.Left != nil:
				h.note(*answer.Left)
				h.asked[i].left[n.Node] = *answer.Left
			}
		}
	}
}

// count looks whether the answers of the voters are a majority's, with this node's own.
func (h *Heartbeat) count(ctx context.Context) {
	for i := range h.asked {
		a := &h.asked[i]
		if a.done || a.Leave == 0 {
			continue
		}
		if term, ok := lacking(a.left, h.c.NodeID, abstention{Term: a.Leave, Voters: h.c.Electorate.Voters()}); ok {
			if own, ok := h.leave(ctx, term); ok {
				a.left[h.c.NodeID] = own
			}
		}
		if nobodyLeads(a.left) {
			h.goOn(ctx, i, "as nobody leads", "")
		}
	}
}

// lacking reports whether a voter's own answer would make a majority of the others' in
// some term. Before that it leaves no term: with its line back it would depose a leader
// for nothing. expected is what it would say first.
func lacking(left map[string]abstention, self string, expected abstention) (term uint64, ok bool) {
	own, said := left[self]
	views := []abstention{expected} // it may be the only voter
	for node, a := range left {
		if node != self {
			views = append(views, a)
		}
	}
	for _, one := range views {
		agree := agreeing(left, one, self)
		if slices.Contains(one.Voters, self) && agree <= len(one.Voters)/2 && agree+1 > len(one.Voters)/2 && (!said || own.Term < one.Term) {
			term, ok = max(term, one.Term), true
		}
	}
	return term, ok
}

// agreeing counts those who are in a term, have not voted in it and have one list of
// voters, of which they are. It leaves out one node.
func agreeing(left map[string]abstention, one abstention, but string) (n int) {
	for node, a := range left {
		if node != but && a.Term == one.Term && !a.Voted && slices.Equal(a.Voters, one.Voters) && slices.Contains(a.Voters, node) {
			n++
		}
	}
	return n
}

// nobodyLeads reports whether a majority is in one term, in which none of it has voted,
// and has one list of voters.
func nobodyLeads(left map[string]abstention) bool {
	for _, one := range left {
		if agreeing(left, one, "") > len(one.Voters)/2 {
			return true
		}
	}
	return false
}

// goOn continues the lease from the time of a question.
func (h *Heartbeat) goOn(ctx context.Context, i int, how, node string) {
	h.asked[i].done = true
	err := h.c.Keeper.goOn(ctx, h.asked[i].sent)
	if err != nil {
		h.c.Log.Warn("the lease does not go on by a note", "node", node, "err", err)
		return
	}
	if !h.byNotes {
		h.byNotes = true
		since, _ := h.c.Keeper.unanswered()
		h.c.Log.Warn("the network renews no lease: it goes on by notes in pools", "granted", how, "node", node, "silent", since.Round(time.Millisecond))
	}
}
