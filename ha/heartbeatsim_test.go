// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/configdb"
)

// simNotes is a pool with the notes of all nodes, in a world whose switch fails now and
// then, so that nobody hears anybody but by notes.
type simNotes struct {
	old    map[string][][]byte // by node, the newest last
	dead   bool                // the switch
	longer int                 // looks at VMs whose lease lives by notes
}

// simHeart is the heartbeat of a node and its part in elections.
type simHeart struct {
	*Heartbeat
	n       *simNode
	life    int
	term    uint64
	voted   uint64
	heard   time.Duration // of a leader
	away    time.Duration // from the pool, until then
	beating bool
	back    int // how many notes back it reads
	serial  int
}

func newHeartWorld(t *testing.T, seed uint64, vms int, off rule) *world {
	w := newWorld(t, seed, vms, off)
	w.notes = &simNotes{old: map[string][][]byte{}}
	for _, n := range w.nodes {
		n.heart = &simHeart{n: n, term: 1, voted: 1}
		n.newHeart()
	}
	return w
}

func (n *simNode) newHeart() {
	h := n.heart
	h.life = n.life
	h.Heartbeat = NewHeartbeat(HeartbeatConfig{
		NodeID: n.id, Boot: fmt.Sprint(n.life), Life: 1, Notes: h, Keeper: n.keeper, Service: n.svc, Electorate: h, Caller: h, DB: n,
		Sees: func() int { return 0 }, Random: func() string { h.serial++; return fmt.Sprintf("%d-%d-%d", n.i, n.life, h.serial) },
		Log: slog.New(slog.DiscardHandler), Now: n.clock,
	})
	h.patience = time.Hour // what is simulated takes no time
}

// vote lets a majority of those who can vote for the leader of the world's term.
func (w *world) vote(leader *simNode, can []*simNode) {
	if w.notes == nil {
		return
	}
	for _, o := range w.nodes {
		w.term = max(w.term, o.heart.term+1)
	}
	need := len(w.nodes)/2 + 1
	for _, i := range append([]int{-1}, w.rng.Perm(len(can))...) {
		o := leader
		if i >= 0 {
			o = can[i]
		}
		if o.heart.term == w.term || need == 0 {
			continue
		}
		o.heart.term, o.heart.voted = w.term, w.term
		need--
	}
	if w.rng.IntN(3) == 0 { // before anybody has heard of it
		leader.cutOff = true
	}
}

// followed reports whether a majority acknowledges what the leader of the world's term
// says.
func (w *world) followed() bool {
	if w.notes == nil {
		return true
	}
	follow := 0
	for _, n := range w.nodes {
		if !n.cutOff && n.frozen <= w.now && n.heart.term <= w.term {
			follow++
		}
	}
	return follow > len(w.nodes)/2 && w.nodes[w.lead].heart.term == w.term
}

// chaosOfNotes is what befalls a world with notes beside the rest.
func (w *world) chaosOfNotes() {
	if w.notes == nil {
		return
	}
	if w.notes.dead && w.rng.IntN(60) == 0 {
		w.switchFails(false)
		if w.rng.IntN(2) == 0 {
			w.elect()
		}
		w.switchFails(w.rng.IntN(3) == 0) // or it was a moment only
	}
	n := w.nodes[w.rng.IntN(len(w.nodes))]
	switch w.rng.IntN(250) {
	case 0:
		w.switchFails(true)
	case 1, 2, 3:
		n.heart.away = w.now + w.upTo(20*time.Second)
	case 4, 5: // it hears of a higher term, or is a candidate whom nobody elects
		if n.i == w.lead {
			break
		}
		if n.heart.term++; w.rng.IntN(2) == 0 {
			n.heart.voted = n.heart.term
		}
	}
	if !w.notes.dead && (w.lead < 0 || !w.followed() || w.nodes[w.lead].cutOff) && w.rng.IntN(10) == 0 {
		w.elect()
	}
	for _, n := range w.nodes {
		if !n.cutOff && w.lead >= 0 && w.followed() && !w.nodes[w.lead].cutOff && w.nodes[w.lead].frozen <= w.now {
			if h := n.heart; h.term <= w.term {
				h.term, h.heard = w.term, w.now
			}
		}
	}
}

func (w *world) switchFails(dead bool) {
	w.notes.dead = dead
	for _, n := range w.nodes {
		n.cutOff = dead
	}
}

// beatHeart is one look of a node at the notes.
func (n *simNode) beatHeart() {
	h := n.heart
	if h == nil || h.beating || n.w.rng.IntN(3) != 0 {
		return
	}
	if h.life != n.life {
		n.newHeart()
	}
	h.back = 0
	if n.w.rng.IntN(4) == 0 {
		h.back = n.w.rng.IntN(8)
	}
	h.bendMemory()
	h.beating = true
	must(n.w.t, h.beat(context.Background()))
	h.beating = false
	if h.byNotes {
		n.w.notes.longer++
	}
}

// bendMemory changes what a node remembers as if a rule were not kept.
func (h *simHeart) bendMemory() {
	n := h.n
	switch n.w.off {
	case noteCountsFromQuestion:
		for i := range h.asked {
			h.asked[i].sent = n.clock()
		}
	case onlyWhatRunsGoesOn:
		if n.keeper.session != 0 {
			n.keeper.deadline = n.clock() + time.Hour
		}
	case majorityLeaves:
		for i := range h.asked {
			for _, one := range h.asked[i].left {
				for v := range 3 {
					h.asked[i].left[n.w.nodes[v].id] = one
				}
			}
		}
	}
}

// Pools implements Notes.
func (h *simHeart) Pools() []string {
	if h.away > h.n.w.now {
		return nil
	}
	return []string{"pool"}
}

// Write implements Notes: some take their time.
func (h *simHeart) Write(_ context.Context, _ string, b []byte) error {
	w, id := h.n.w, h.n.id
	land := func() { w.notes.old[id] = append(w.notes.old[id], b) }
	if w.rng.IntN(6) == 0 {
		w.after(w.upTo(8*time.Second), land)
		return errors.New("no answer")
	}
	land()
	return nil
}

// Read implements Notes: now and then it is an old one.
func (h *simHeart) Read(_ context.Context, _, nodeID string) ([]byte, error) {
	all := h.n.w.notes.old[nodeID]
	if len(all) == 0 {
		return nil, nil
	}
	return h.bend(all[max(0, len(all)-1-h.back)])
}

// bend changes what is read as if a rule were not kept.
func (h *simHeart) bend(b []byte) ([]byte, error) {
	k := len(h.asked)
	if off := h.n.w.off; b == nil || k == 0 || off != answerNamesQuestion && off != oneTerm {
		return b, nil
	}
	var n note
	if err := json.Unmarshal(b, &n); err != nil {
		return nil, err
	}
	last := h.asked[k-1]
	for i := range n.Answers {
		a := &n.Answers[i]
		switch mine := slices.ContainsFunc(a.To, h.n.asked); {
		case !mine:
		case h.n.w.off == answerNamesQuestion:
			a.To = []string{last.ID}
		case a.Left != nil && last.Leave != 0:
			a.Left.Term = last.Leave
		}
	}
	return json.Marshal(n)
}

// asked reports whether a question is of this node, in whatever life.
func (n *simNode) asked(id string) bool { return strings.HasPrefix(id, fmt.Sprintf("%d-", n.i)) }

// Abstain implements Electorate.
func (h *simHeart) Abstain(_ context.Context, term uint64) (configdb.Abstention, error) {
	h.n.w.meanwhile(20, 100)
	if h.Leaderless() == 0 {
		return configdb.Abstention{}, errors.New("there is a leader")
	}
	a := configdb.Abstention{Term: max(h.term, term), Voters: h.Voters()}
	if h.n.w.off != whoAnsweredLeaves {
		a.Term = max(a.Term, h.n.told.Answered()+1)
	}
	a.Voted = h.voted == a.Term && h.n.w.off != whoHasVotedDoesNotCount
	if h.n.w.off != votersLeaveTheirTerms {
		h.term = a.Term
	}
	if h.n.w.off != abstentionIsRemembered {
		h.n.told.Abstain(a.Term, h.n.clock, func() bool { return true })
	}
	return a, nil
}

// Leaderless implements Electorate.
func (h *simHeart) Leaderless() time.Duration { return h.n.w.now - h.heard }

// Leader implements Electorate.
func (h *simHeart) Leader() string {
	if w := h.n.w; h.Leaderless() < RenewEvery && w.lead >= 0 {
		return w.nodes[w.lead].id
	}
	return ""
}

// CallLeader implements Caller.
func (h *simHeart) CallLeader(ctx context.Context, method string, request []byte) ([]byte, error) {
	w := h.n.w
	w.meanwhile(20, 50)
	if w.lead < 0 || method != MethodCarry {
		return nil, errors.New("no leader")
	}
	lead := w.nodes[w.lead]
	if h.n.cutOff || lead.cutOff || lead.frozen > w.now {
		return nil, errors.New("no answer")
	}
	w.carried++
	return lead.svc.ServeCarry(ctx, request)
}

// Term implements Electorate.
func (h *simHeart) Term() uint64 { return h.term }

// Voters implements Electorate.
func (h *simHeart) Voters() (ids []string) {
	for _, n := range h.n.w.nodes {
		ids = append(ids, n.id)
	}
	return ids
}

var heartRules = map[rule]ruleOff{
	noteCountsFromQuestion:  {"by notes, too, a lease counts from the moment it was asked for", 1},
	answerNamesQuestion:     {"an answer counts for the question that it names", 21},
	onlyWhatRunsGoesOn:      {"by notes a lease that has lapsed does not begin anew", 5},
	votersLeaveTheirTerms:   {"who says that nobody leads has left all earlier terms", 1},
	whoHasVotedDoesNotCount: {"who has voted in a term does not say that nobody leads in it", 1},
	majorityLeaves:          {"it takes a majority to say that nobody leads", 58},
	oneTerm:                 {"the majority says so of one term", 1},
	abstentionIsRemembered:  {"the voters remember that they have said so", 1},
	whoAnsweredLeaves:       {"who has answered a leader says that nobody leads in a higher term alone", 1},
}
