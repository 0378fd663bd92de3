// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package quorum

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// parse reads "A* b c! w~ r=": upper case votes, * leads, ! is lost, ? is
// unhealthy, ~ is a witness, = has the role replica, m is resting, + is new.
func parse(text string) []Member {
	var out []Member
	for _, word := range strings.Fields(text) {
		m := Member{ID: strings.ToLower(word[:1]), Voter: word[0] >= 'A' && word[0] <= 'Z', Healthy: true, For: time.Hour}
		for _, c := range word[1:] {
			switch c {
			case '*':
				m.Leader = true
			case '!':
				m.Healthy = false
			case '?':
				m.Healthy, m.For = false, time.Second
			case '~':
				m.Role = Witness
			case '=':
				m.Role = Replica
			case 'm':
				m.Resting = true
			case '+':
				m.For = FoundingStabilisation
			}
		}
		out = append(out, m)
	}
	return out
}

func TestNext(t *testing.T) {
	for _, tc := range []struct{ name, members, want string }{
		{"a founder alone stays alone", "A*", ""},
		{"the second node votes", "A* b", "promote b"},
		{"the third node votes, soon", "A* B c+", "promote c"},
		{"a fourth node does not: three of four survive as many failures", "A* B C d", ""},
		{"with a fifth both do", "A* B C d e", "promote d"},
		{"a new fourth voter must have been there for a while", "A* B C d+ e+", ""},
		{"six nodes have five voters", "A* B C D E f", ""},
		{"a witness goes first", "A* b c~", "promote c"},
		{"a replica never votes", "A* b= c=", ""},
		{"a voter that became a replica loses its vote", "A* B C=", "demote c"},
		{"but not if the rest had no majority", "A* B! C=", ""},
		{"a leader that became a replica hands over first", "A*= B C", "transfer b"},
		{"a lost voter is replaced", "A* B C! d", "demote c"},
		{"and its place is taken", "A* B c! d", "promote d"},
		{"a lost voter nobody can replace stays: nothing is gained", "A* B C!", ""},
		{"one of five lost and nobody to replace it: nothing is gained", "A* B C D E!", ""},
		{"two of five lost: without them one more may fail", "A* B C D! E!", "demote e"},
		{"and the second goes too", "A* B C D! e!", "demote d"},
		{"a voter that is away for a moment stays", "A* B C? d", ""},
		{"after a removal four voters become three", "A* B C D", "demote d"},
		{"the leader is not the one to go", "A B C D*", "demote c"},
		{"a witness is not the one to go", "A* B C D~", "demote c"},
		{"a leader in maintenance hands over", "A*m B C", "transfer b"},
		{"not to one that is in maintenance too", "A*m Bm Cm", ""},
		{"in six with one lost, the replica takes over", "A* B C D E! f", "demote e"},
		{"two nodes both vote: a write is on two disks", "A* b", "promote b"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := ""
			if s, ok := Next(parse(tc.members)); ok {
				got = fmt.Sprintf("%s %s", s.Do, s.ID)
			}
			if got != tc.want {
				t.Errorf("%s: %q, want %q", tc.members, got, tc.want)
			}
		})
	}
}

// Whatever the members are, steps end, and none of them takes a majority away.
func TestStepsEndAndKeepTheMajority(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		n := rapid.IntRange(1, 9).Draw(rt, "members")
		members := make([]Member, n)
		for i := range members {
			m := &members[i]
			m.ID = string(rune('a' + i))
			m.Role = rapid.SampledFrom([]Role{Auto, Auto, Auto, Witness, Replica}).Draw(rt, "role")
			m.Voter = i == 0 || rapid.Bool().Draw(rt, "voter")
			m.Healthy = i == 0 || rapid.Float64Range(0, 1).Draw(rt, "health") > 0.3
			m.For = rapid.SampledFrom([]time.Duration{time.Second, 5 * time.Second, time.Hour}).Draw(rt, "for")
			m.Resting = rapid.Float64Range(0, 1).Draw(rt, "rest") > 0.8
		}
		members[0].Leader = true
		g := count(members)
		if g.voters() > MaxVoters || len(g.alive) < g.voters()/2+1 {
			return // no leader could be there
		}
		for step := 0; ; step++ {
			s, ok := Next(members)
			if !ok {
				break
			}
			if step > 30 {
				rt.Fatalf("no end: %+v of %+v", s, members)
			}
			for i := range members {
				m := &members[i]
				switch {
				case s.Do == Transfer:
					m.Leader = m.ID == s.ID
				case m.ID == s.ID:
					m.Voter = s.Do == Promote
				}
			}
			g := count(members)
			if g.voters() > MaxVoters {
				rt.Fatalf("%d voters after %+v", g.voters(), s)
			}
			if len(g.alive) < g.voters()/2+1 {
				rt.Fatalf("no majority after %+v: %+v", s, members)
			}
		}
	})
}
