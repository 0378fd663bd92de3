// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package quorum

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Limits and times.
const (
	// MaxVoters bounds the nodes that must answer for a write.
	MaxVoters = 5
	// Stabilisation is how long a replica must have been healthy before it votes.
	Stabilisation = 10 * time.Second
	// FoundingStabilisation is the same while fewer than three nodes vote: until
	// then no failure at all is survived, which is the greater danger.
	FoundingStabilisation = 2 * time.Second
	// LostAfter is how long a voter must have been silent to be replaced.
	LostAfter = 30 * time.Second
)

// Role is what an administrator wants of a node.
type Role uint8

// The roles.
const (
	Auto    Role = iota // votes when it is needed
	Witness             // the same, but goes first: it is there to vote
	Replica             // never votes
)

// Member is what the leader knows of one member.
type Member struct {
	ID     string
	Role   Role
	Voter  bool
	Leader bool // the one that asks
	// Healthy: it answers, has caught up and can store entries.
	Healthy bool
	// For is how long it has been healthy, or not.
	For time.Duration
	// Resting: it should not lead, if another can (maintenance).
	Resting bool
}

func (m Member) lost() bool { return !m.Healthy && m.For >= LostAfter }

// Action is the kind of a step.
type Action string

// The actions.
const (
	Promote  Action = "promote"  // let a replica vote
	Demote   Action = "demote"   // make a voter a replica
	Transfer Action = "transfer" // let another voter lead
)

// Step is one change of the membership.
type Step struct {
	Do  Action
	ID  string // the member that is changed; for Transfer the one that leads next
	Why string
}

// Desired returns how many of n members that could vote should.
func Desired(n int) int {
	switch {
	case n <= 2:
		return n // with one voter of two, a write would be on one disk only
	case n%2 == 0:
		n--
	}
	return min(n, MaxVoters)
}

// group is the members, counted.
type group struct {
	members                []Member
	alive, lost, unhealthy []Member // voters; unhealthy is neither
	candidates             []Member // replicas that may vote now, the best first
	eligible               int      // that could vote, now or soon
}

func count(members []Member) group {
	g := group{members: members}
	for _, m := range members {
		if m.Voter {
			switch {
			case m.lost():
				g.lost = append(g.lost, m)
			case m.Healthy:
				g.alive = append(g.alive, m)
			default:
				g.unhealthy = append(g.unhealthy, m)
			}
		}
		if m.Role != Replica && !m.lost() {
			g.eligible++
		}
	}
	wait := Stabilisation
	if g.voters() < 3 {
		wait = FoundingStabilisation
	}
	for _, m := range members {
		if !m.Voter && m.Role != Replica && m.Healthy && m.For >= wait {
			g.candidates = append(g.candidates, m)
		}
	}
	slices.SortStableFunc(g.candidates, prefer)
	return g
}

// prefer orders members by who should rather vote: witnesses first, then those
// that were there first (IDs are in order of time).
func prefer(a, b Member) int {
	if c := cmp.Compare(rank(a), rank(b)); c != 0 {
		return c
	}
	return cmp.Compare(a.ID, b.ID)
}

func rank(m Member) int {
	switch {
	case m.Leader:
		return 0
	case m.Role == Witness:
		return 1
	}
	return 2
}

func (g group) voters() int { return len(g.alive) + len(g.lost) + len(g.unhealthy) }

// spare reports whether the voters without one of them would still have a
// healthy majority.
func (g group) spare(m Member) bool {
	alive := len(g.alive)
	if m.Healthy {
		alive--
	}
	return alive >= (g.voters()-1)/2+1
}

// Next returns the next change, if one is due.
func Next(members []Member) (Step, bool) {
	g := count(members)
	for _, next := range []func(group) (Step, bool){restingLeader, unwantedVoter, replaceLost, fill, dropLost, surplus} {
		if s, ok := next(g); ok {
			return s, true
		}
	}
	return Step{}, false
}

// heir returns the healthy voter that should lead next.
func (g group) heir(accept func(Member) bool) (Member, bool) {
	var best *Member
	for i, m := range g.alive {
		if m.Leader || m.Resting || m.Role == Replica || !accept(m) {
			continue
		}
		if best == nil || m.For > best.For {
			best = &g.alive[i]
		}
	}
	if best == nil {
		return Member{}, false
	}
	return *best, true
}

func anyMember(Member) bool { return true }

func restingLeader(g group) (Step, bool) {
	for _, m := range g.alive {
		if m.Leader && m.Resting {
			if h, ok := g.heir(anyMember); ok {
				return Step{Transfer, h.ID, "the leader is in maintenance"}, true
			}
		}
	}
	return Step{}, false
}

func unwantedVoter(g group) (Step, bool) {
	for _, m := range g.members {
		if !m.Voter || m.Role != Replica || !g.spare(m) {
			continue
		}
		if !m.Leader {
			return Step{Demote, m.ID, "its role is replica"}, true
		}
		if h, ok := g.heir(anyMember); ok {
			return Step{Transfer, h.ID, "the leader's role is replica"}, true
		}
	}
	return Step{}, false
}

// replaceLost takes the vote of a lost voter when somebody can take its place.
func replaceLost(g group) (Step, bool) {
	if len(g.lost) == 0 || len(g.candidates) == 0 || !g.spare(g.lost[0]) {
		return Step{}, false
	}
	m := g.lost[0]
	return Step{Demote, m.ID, fmt.Sprintf("it has been silent for %s and another node can vote instead", m.For.Truncate(time.Second))}, true
}

// fill promotes while there are too few voters.
func fill(g group) (Step, bool) {
	if len(g.candidates) == 0 || g.voters() >= MaxVoters || g.voters()-len(g.lost) >= Desired(g.eligible) {
		return Step{}, false
	}
	return Step{Promote, g.candidates[0].ID, fmt.Sprintf("%d of %d nodes vote", g.voters()-len(g.lost), g.eligible)}, true
}

// dropLost takes the votes of lost voters that nobody can replace, if without
// all of them the rest can lose one more.
func dropLost(g group) (Step, bool) {
	if len(g.lost) == 0 || len(g.unhealthy) > 0 {
		return Step{}, false
	}
	now := len(g.alive) - (g.voters()/2 + 1)
	then := len(g.alive) - (len(g.alive)/2 + 1)
	m := g.lost[len(g.lost)-1]
	if then <= now || !g.spare(m) {
		return Step{}, false
	}
	return Step{Demote, m.ID, fmt.Sprintf("it has been silent for %s; without its vote the rest can lose one node more", m.For.Truncate(time.Second))}, true
}

// surplus demotes when there are more voters than needed, or an even number.
func surplus(g group) (Step, bool) {
	if len(g.lost)+len(g.unhealthy) > 0 || len(g.alive) <= Desired(g.eligible) {
		return Step{}, false
	}
	last := slices.MaxFunc(g.alive, prefer)
	if last.Leader || !g.spare(last) {
		return Step{}, false
	}
	return Step{Demote, last.ID, fmt.Sprintf("%d voters are one too many", len(g.alive))}, true
}
