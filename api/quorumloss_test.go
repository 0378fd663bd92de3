// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"strings"
	"testing"
	"time"
)

func TestWhatBecomesOfAGuestWithoutQuorum(t *testing.T) {
	guarded := &StorageGuard{Epoch: 3, Pools: []string{"p"}}
	for _, c := range []struct {
		name  string
		b     BindingSpec
		lease bool
		want  LostOutcome
	}{
		{"not protected", BindingSpec{Epoch: 3}, false, LostRunsOn},
		{"storage guard", BindingSpec{Epoch: 3, Protected: true, StorageGuard: guarded}, false, LostRunsOn},
		{"storage guard of an older epoch", BindingSpec{Epoch: 4, Protected: true, StorageGuard: guarded}, false, LostEnded},
		{"lease held", BindingSpec{Epoch: 3, Protected: true}, true, LostWithLease},
		{"lease over", BindingSpec{Epoch: 3, Protected: true}, false, LostEnded},
	} {
		var g LostGuest
		if g.Judge(&c.b, c.lease); g.Outcome != c.want || g.Why == "" {
			t.Errorf("%s: %+v, want %s", c.name, g, c.want)
		}
	}
}

func TestALostQuorumNamesTheWayOut(t *testing.T) {
	l := QuorumLoss{Since: time.Unix(0, 0), Voters: 3, Needed: 2, Reachable: 1, Missing: []MissingVoter{{Node: "m2", Address: "10.0.0.2:7600"}, {Node: "m3", Address: "10.0.0.3:7600"}}}
	l.Describe("m1", RoleVoter, "/srv/muster")
	for _, words := range []string{"at node m1 since 1970-01-01 00:00:00 UTC", "1 of 3 voters reachable, 2 needed, missing m2, m3"} {
		if !strings.Contains(l.Banner, words) {
			t.Errorf("%q lacks %q", l.Banner, words)
		}
	}
	if len(l.Next) != 2 || !strings.HasPrefix(l.Next[0], "start 1 of the missing voters") || !strings.Contains(l.Next[0], "m3 (10.0.0.3:7600)") || !strings.Contains(l.Next[1], "on m1, muster cluster recover --data-dir /srv/muster;") {
		t.Errorf("%q", l.Next)
	}
	if l.Describe("m1", RoleWitness, "/srv/muster"); strings.Contains(l.Next[1], "muster cluster recover") {
		t.Errorf("a witness is told to recover: %q", l.Next)
	}
	l.Reachable = 2
	if l.Describe("m1", RoleVoter, "/srv/muster"); len(l.Next) != 1 || strings.Contains(l.Next[0], "recover") {
		t.Errorf("with a majority reachable: %q", l.Next)
	}
}
