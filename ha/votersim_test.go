// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"slices"
)

// roster is the list of the voters that a node goes by: the last in its log, and the term
// of what it has at the end of that.
type roster struct {
	term   uint64
	lists  []list // all in its log, the last of which counts
	voters []int  // of that
}

// list is an entry with a list: its term, and which it is.
type list struct{ term, index uint64 }

func (r roster) last() list { return r.lists[len(r.lists)-1] }

// with is the log after one more entry.
func (r roster) with(term uint64, voters []int) roster {
	return roster{term, append(slices.Clone(r.lists), list{term, r.last().index + 1}), voters}
}

func (r roster) has(i int) bool { return slices.Contains(r.voters, i) }

func (r roster) majority(of int) bool { return of > len(r.voters)/2 }

// newerThan reports that a node with this list at the end of its log does not vote for one
// with the other.
func (r roster) newerThan(o roster) bool {
	return r.term > o.term || r.term == o.term && r.last().index > o.last().index
}

func (r roster) is(o roster) bool { return r.term == o.term && r.last() == o.last() }

// keep stores what a leader has, as itself does that made it, and a follower that gets it.
// One that goes back to a list that it has had all the time stores none.
func (n *simNode) keep(r roster) {
	fresh := !slices.Contains(n.roster.lists, r.last())
	if !fresh && r.last() != n.roster.last() {
		n.w.rollbacks++
	}
	if n.roster = r; fresh && n.w.off != listIsTakenDown {
		n.told.Mark(r.last().term, n.clock)
	}
}

// changeVoters is what befalls the list of voters of a changing world: now and then a
// change, or several at once, as fast as Raft allows, after which the leader may be cut off.
func (w *world) changeVoters() {
	if n := w.nodes[w.rng.IntN(len(w.nodes))]; n.cutOff && w.rng.IntN(20) == 0 {
		n.cutOff = false // a short list has a majority of two, which are away too often
	}
	if w.lead < 0 && w.rng.IntN(10) == 0 {
		w.elect()
	}
	if w.lead < 0 || w.nodes[w.lead].cutOff {
		return
	}
	l := w.nodes[w.lead]
	for _, n := range w.nodes {
		if n.behind(l) && w.rng.IntN(4) == 0 {
			n.follow(l)
		}
	}
	if l.inside > 0 || l.frozen > w.now || w.rng.IntN(25) != 0 {
		return
	}
	for range 1 + w.rng.IntN(3) {
		if !w.changeVoter(l) {
			return
		}
	}
	if w.countCut() < 2 && w.rng.IntN(2) == 0 {
		l.cutOff = true
		w.elect()
	}
}

// behind reports that a node can get the leader's list, and has another.
func (n *simNode) behind(l *simNode) bool {
	return n != l && !n.cutOff && n.frozen <= n.w.now && !n.roster.is(l.roster)
}

func (n *simNode) follow(l *simNode) {
	n.keep(l.roster)
	n.voter = max(n.voter, n.w.term)
}

// changeVoter adds or removes one, and reports whether a majority has stored that. Now and
// then nobody else gets to know of it.
func (w *world) changeVoter(l *simNode) bool {
	if !w.committed(l) {
		return false
	}
	voters, i := slices.Clone(l.roster.voters), w.rng.IntN(len(w.nodes))
	switch {
	case i == l.i || l.roster.has(i) && len(voters) == 3:
		return true
	case l.roster.has(i):
		voters = slices.DeleteFunc(voters, func(v int) bool { return v == i })
	default:
		voters = append(voters, i)
	}
	l.keep(l.roster.with(w.term, voters))
	w.changes++
	if w.countCut() < 2 && w.rng.IntN(8) == 0 {
		l.cutOff = true
		w.elect()
		return false
	}
	return w.committed(l)
}

// committed has the leader's list stored by a majority of its voters, if that can be.
func (w *world) committed(l *simNode) bool {
	stored := 0
	for _, i := range w.rng.Perm(len(w.nodes)) {
		n := w.nodes[i]
		if !l.roster.has(i) {
			continue
		}
		if !l.roster.majority(stored) && n.behind(l) {
			n.follow(l)
		}
		if n.roster.is(l.roster) {
			stored++
		}
	}
	return l.roster.majority(stored)
}

// candidate returns one of the nodes that a majority of its voters among them elects, and
// with it a majority that does; where the list never changes, any of them.
func (w *world) candidate(can []*simNode) (*simNode, []*simNode) {
	if !w.changing {
		return can[w.rng.IntN(len(can))], nil
	}
	for _, i := range w.rng.Perm(len(can)) {
		n := can[i]
		if !n.roster.has(n.i) {
			continue
		}
		by := []*simNode{n}
		for _, k := range w.rng.Perm(len(can)) {
			if o := can[k]; o != n && n.roster.has(o.i) && !o.roster.newerThan(n.roster) && !n.roster.majority(len(by)) {
				by = append(by, o)
			}
		}
		if n.roster.majority(len(by)) {
			return n, by
		}
	}
	return nil, nil
}
