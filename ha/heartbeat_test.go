// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// board is a pool whose notes are there at once, for all.
type board map[string][]byte

func (b board) Pools() []string { return []string{"pool"} }

func (b board) Read(_ context.Context, _, nodeID string) ([]byte, error) { return b[nodeID], nil }

// slot is a node's own place on the board.
type slot struct {
	board
	h *simHeart
}

func (s slot) Write(_ context.Context, _ string, note []byte) error {
	s.board[s.h.n.id] = note
	return nil
}

func (s slot) Read(ctx context.Context, pool, nodeID string) ([]byte, error) {
	b, _ := s.board.Read(ctx, pool, nodeID)
	return s.h.bend(b)
}

// heartbeats is a world without chance, in which each node renews its lease over the
// network every second, if that is there, and looks at the notes twice a second.
func heartbeats(t *testing.T) *world {
	w := chaosFree(t)
	w.notes = &simNotes{}
	b := board{}
	for _, n := range w.nodes {
		n.rate = 1
		n.heart = &simHeart{n: n, term: 1, voted: 1}
		n.newHeart()
		n.heart.c.Notes = slot{b, n.heart}
	}
	return w
}

// beats lets that go on, and looks after each half second.
func (w *world) beats(d time.Duration, look func()) {
	w.t.Helper()
	ctx := context.Background()
	for end := w.now + d; w.now < end; {
		w.now += beatEvery
		lead := w.nodes[max(0, w.lead)]
		for _, n := range w.nodes {
			n.enforce()
			if n.frozen > w.now {
				continue
			}
			if !n.cutOff && w.followed() && !lead.cutOff {
				n.heart.heard, n.heart.term, n.view = w.now, w.term, w.mem.Local()
			}
			if sent := n.clock(); !n.cutOff && !lead.cutOff && w.now%RenewEvery == 0 {
				lead.svc.grant.onWire(n.id)
				if a, err := lead.svc.grant.renew(ctx, n.id); err == nil {
					must(w.t, n.keeper.extend(ctx, sent+LeaseDuration, a))
					n.keeper.asked = sent
				}
			}
			n.heart.bendMemory()
			must(w.t, n.heart.beat(ctx))
		}
		if lead.frozen <= w.now {
			lead.detect(impatient{ctx}, w.term)
			lead.svc.noteCutOff(ctx, w.term)
		}
		look()
	}
}

func (n *simNode) holds() bool {
	_, _, ok := n.keeper.Current()
	return ok && !n.lapsed
}

func (w *world) node(i int) api.Node {
	n, err := configdb.Nodes.Get(w.mem.Local(), w.nodes[i].id)
	must(w.t, err)
	return n
}

func nothing() {}

func TestANodeThatIsCutOffKeepsItsLeaseByTheLeadersNotes(t *testing.T) {
	w := heartbeats(t)
	w.beats(20*time.Second, nothing)
	w.nodes[3].cutOff = true
	w.beats(time.Minute, func() {
		if !w.nodes[3].holds() || w.phase(3) != api.NodeReady {
			t.Fatalf("at %v: lease %v, %s", w.now, w.nodes[3].holds(), w.phase(3))
		}
	})
	c := w.node(3).Status.CutOff
	if c == nil || !c.Isolated {
		t.Fatalf("it is not said to be cut off: %+v", w.node(3).Status)
	}
	if why := w.nodes[0].svc.silent()[w.nodes[3].id]; !strings.Contains(why, "through a pool") {
		t.Errorf("it may be given VMs: %q", why)
	}
	for _, n := range w.nodes {
		if n.heart.term != 1 {
			t.Errorf("node %d left its term", n.i)
		}
	}
	w.nodes[3].cutOff = false
	w.beats(5*time.Second, nothing)
	if c := w.node(3).Status.CutOff; c != nil || !w.nodes[3].holds() {
		t.Errorf("it is back: %+v", c)
	}
}

func TestAllNodesKeepTheirLeasesWhileTheSwitchIsDead(t *testing.T) {
	w := heartbeats(t)
	w.beats(20*time.Second, nothing)
	w.switchFails(true)
	var sessions []uint64
	for _, n := range w.nodes {
		sessions = append(sessions, n.session)
	}
	w.beats(time.Minute, func() {
		for _, n := range w.nodes {
			if !n.holds() {
				t.Fatalf("at %v node %d holds no lease", w.now, n.i)
			}
		}
	})
	left := 0
	for _, n := range w.nodes {
		if n.heart.term > 1 {
			left++
		}
	}
	if left < 3 {
		t.Errorf("%d of 5 voters left the old leader's term", left)
	}
	w.switchFails(false)
	if w.followed() {
		t.Error("the old leader is still followed")
	}
	w.elect()
	for _, n := range w.nodes {
		n.cutOff = false
	}
	w.beats(20*time.Second, nothing)
	for _, n := range w.nodes {
		if !n.holds() || n.session != sessions[n.i] || w.phase(n.i) != api.NodeReady {
			t.Errorf("node %d: lease %v, session %d, %s", n.i, n.holds(), n.session, w.phase(n.i))
		}
	}
}

// What a dead node asked last stays in the pool: it is no sign of life.
func TestTheLastQuestionOfADeadNodeDelaysNothing(t *testing.T) {
	w := heartbeats(t)
	w.beats(20*time.Second, nothing)
	w.nodes[3].cutOff = true
	w.beats(20*time.Second, nothing)
	if w.nodes[3].heart.last.Asks == nil {
		t.Fatal("it asks nothing")
	}
	w.nodes[3].frozen = time.Hour
	died := w.now
	w.beats(LostAfter+3*time.Second, nothing)
	n := w.node(3)
	if n.Status.Phase != api.NodeLost || n.Status.CutOff != nil || !strings.Contains(n.Status.Message, "writes nothing to the pools any more") {
		t.Errorf("%v after its death: %s, %q", w.now-died, n.Status.Phase, n.Status.Message)
	}
}

func TestWithoutTheStorageHeartbeatTheLeaseEnds(t *testing.T) {
	w := heartbeats(t)
	w.beats(20*time.Second, nothing)
	tx := &configdb.Txn{}
	c := api.Cluster{Meta: api.NewMeta(api.KindCluster, "", "c")}
	c.Spec.HA.StorageHeartbeat = api.HeartbeatOff
	must(t, configdb.Clusters.Create(tx, &c))
	_, err := w.mem.Txn(t.Context(), tx)
	must(t, err)
	w.beats(3*time.Second, nothing)
	w.nodes[3].cutOff = true
	w.beats(LostAfter+3*time.Second, nothing)
	if w.nodes[3].holds() || w.phase(3) != api.NodeLost {
		t.Errorf("lease %v, %s", w.nodes[3].holds(), w.phase(3))
	}
}

func TestNobodyLeads(t *testing.T) {
	three, other := []string{"a", "b", "c"}, []string{"a", "b", "d"}
	for what, c := range map[string]struct {
		left map[string]abstention
		want bool
	}{
		"nobody says so":                   {nil, false},
		"one of three":                     {map[string]abstention{"a": {7, false, three}}, false},
		"two of three":                     {map[string]abstention{"a": {7, false, three}, "b": {7, false, three}}, true},
		"one of them has voted":            {map[string]abstention{"a": {7, false, three}, "b": {7, true, three}}, false},
		"in two terms":                     {map[string]abstention{"a": {7, false, three}, "b": {8, false, three}}, false},
		"two lists of voters":              {map[string]abstention{"a": {7, false, three}, "b": {7, false, other}}, false},
		"one of them does not vote":        {map[string]abstention{"a": {7, false, three}, "x": {7, false, three}}, false},
		"a third one that has voted":       {map[string]abstention{"a": {7, false, three}, "b": {7, false, three}, "c": {7, true, three}}, true},
		"two of four are no majority":      {map[string]abstention{"a": {7, false, append(three, "d")}, "b": {7, false, append(three, "d")}}, false},
		"the only voter":                   {map[string]abstention{"a": {7, false, []string{"a"}}}, true},
		"nobody votes, by an empty answer": {map[string]abstention{"a": {7, false, nil}}, false},
	} {
		if got := nobodyLeads(c.left); got != c.want {
			t.Errorf("%s: %v", what, got)
		}
	}
}

func TestNotesOfAnotherLifeOrNodeAreNotRead(t *testing.T) {
	for _, text := range []string{``, `{`, `{"life":2,"node":"a"}`, `{"life":1,"node":"b"}`} {
		if n, err := readNote([]byte(text), 1, "a"); err == nil {
			t.Errorf("%q: %+v", text, n)
		}
	}
	if _, err := readNote([]byte(`{"life":1,"node":"a","later":true}`), 1, "a"); err != nil {
		t.Error(err)
	}
}

// lostWithLease reports whether a node that is lost holds a lease.
func (w *world) lostWithLease() bool {
	for _, n := range w.nodes {
		if w.phase(n.i) == api.NodeLost && n.holds() {
			return true
		}
	}
	return false
}

// elected makes node i a leader of a term, by the votes of these.
func (w *world) elected(i int, term uint64, voters ...int) {
	for _, v := range voters {
		w.nodes[v].heart.term, w.nodes[v].heart.voted = term, term
	}
	l := w.nodes[i]
	w.lead, w.term = i, term
	l.leads, l.believes, l.view = true, configdb.Leadership{Term: term}, w.mem.Local()
	l.svc.grant.begin(term)
	w.nodes[0].leads = i == 0
}

// An answer that is read late: what counts is when it was asked for.
func TestANoteCountsFromItsQuestion(t *testing.T) {
	for _, r := range []rule{everyRule, noteCountsFromQuestion} {
		w := heartbeats(t)
		w.beats(20*time.Second, nothing)
		w.off = r
		n, leader := w.nodes[3], w.nodes[0]
		n.cutOff = true
		for i := 0; n.heart.last.Asks == nil; i++ {
			if w.beats(beatEvery, nothing); i > 20 {
				t.Fatal("it asks nothing")
			}
		}
		n.frozen = w.now + answersStand - time.Second
		w.beats(2*beatEvery, nothing)
		if len(leader.heart.given) != 1 || n.heart.granted != 0 {
			t.Fatalf("%d answers, of which it has read one: %v", len(leader.heart.given), n.heart.granted != 0)
		}
		w.beats(answersStand-3*beatEvery, nothing)
		if n.heart.granted == 0 {
			t.Fatal("it has not read the answer")
		}
		n.heart.c.Notes = slot{board{}, n.heart}
		broken := false
		w.beats(LostAfter, func() { broken = broken || w.lostWithLease() })
		if w.phase(3) != api.NodeLost || broken != (r != everyRule) {
			t.Errorf("%s; it is lost and holds a lease: %v; the rule is off: %v", w.phase(3), broken, r != everyRule)
		}
	}
}

// deaf is a leader that cannot be called.
type deaf struct{}

func (deaf) CallLeader(context.Context, string, []byte) ([]byte, error) {
	return nil, errors.New("no answer")
}

// Rules that chance rarely needs, each in a world in which it is needed: with it no
// node is lost while it holds a lease, without it one is. The switch is dead; node 4 was
// elected, but only its voters know; and they hear it again, which hears no notes, when
// node 0 is about to be lost to it.
func TestRareRulesOfTheStorageHeartbeatAreNeeded(t *testing.T) {
	for _, off := range []rule{votersLeaveTheirTerms, whoHasVotedDoesNotCount, oneTerm} {
		for _, r := range []rule{everyRule, off} {
			w := heartbeats(t)
			w.beats(20*time.Second, nothing)
			w.off = r
			w.switchFails(true)
			back := []int{4, 3, 2}
			switch off {
			case votersLeaveTheirTerms: // the voters of node 4 leave for the next term, and hear it again
				w.elected(4, 2, 2, 3, 4)
			case whoHasVotedDoesNotCount: // all had left their terms for this one before
				for _, n := range w.nodes {
					n.heart.term = 2
					n.heart.note(abstention{Term: 2})
				}
				w.elected(4, 2, 2, 3, 4)
			default: // the others are in terms below and above the leader's, and only node 0 asks
				w.elected(4, 6, 2, 3, 4)
				w.nodes[0].heart.term, w.nodes[1].heart.term, w.nodes[2].heart.term = 4, 4, 7
				for _, n := range w.nodes[1:] {
					n.keeper.session = 0
				}
				back = []int{4, 3, 1}
			}
			w.nodes[4].heart.c.Notes = slot{board{}, w.nodes[4].heart}
			for _, n := range w.nodes {
				n.heart.c.Caller = deaf{} // nobody carries questions to it
			}
			broken := false
			look := func() {
				if n := w.nodes[0]; off == oneTerm && n.heart.byNotes {
					n.heart.c.Notes = slot{board{}, n.heart} // it asks nobody any more
				}
				broken = broken || w.lostWithLease()
			}
			w.beats(LostAfter-time.Second, look)
			for _, i := range back {
				w.nodes[i].cutOff = false
			}
			w.beats(4*time.Second, look)
			if broken != (r == off) {
				t.Errorf("%q: a node is lost and holds a lease: %v; the rule is off: %v", heartRules[off].what, broken, r == off)
			}
		}
	}
}

// A new leader goes by what the voters remember, and they remember what they said while
// nobody led. The switch is dead; node 0 lives by the voters' answers; then nodes 2 to 4
// hear each other again, and node 0 reads nothing any more.
func TestVotersRememberThatTheySaidThatNobodyLeads(t *testing.T) {
	for _, off := range []rule{abstentionIsRemembered, whoAnsweredLeaves} {
		for _, r := range []rule{everyRule, off} {
			w := heartbeats(t)
			ctx := context.Background()
			w.beats(20*time.Second, nothing)
			w.off = r
			w.switchFails(true)
			n, leader := w.nodes[0], w.nodes[4]
			var term uint64
			if off == abstentionIsRemembered {
				w.beats(9*time.Second, nothing)
				if !n.heart.byNotes {
					t.Fatal("it does not live by notes")
				}
				term = n.heart.term + 1
				w.elected(4, term, 2, 3, 4)
			} else { // node 1 says so and votes in that term then; node 2 answers its leader before it says so
				w.beats(2*time.Second, nothing)
				term = n.heart.term + 1
				a := asked{question: question{ID: "by hand", Leave: term}, sent: n.clock(), left: map[string]abstention{}}
				a.left[n.id], a.left[w.nodes[1].id] = w.abstains(0, term), w.abstains(1, term)
				w.elected(4, term, 1, 3, 4)
				w.nodes[2].heart.term = term
				n.heart.asked = append(n.heart.asked, a)
			}
			for _, i := range []int{2, 3, 4} {
				w.nodes[i].cutOff = false
			}
			must(t, leader.svc.learn(ctx, term))
			if off == whoAnsweredLeaves {
				n.heart.asked[len(n.heart.asked)-1].left[w.nodes[2].id] = w.abstains(2, term)
				n.heart.count(ctx)
				if now := n.deadline == n.clock()+LeaseDuration; now != (r == off) {
					t.Errorf("the lease went on: %v; the rule is off: %v", now, r == off)
				}
				w.nodes[1].cutOff = false // so that the leader has a majority without node 2
			}
			for _, o := range w.nodes {
				o.heart.c.Caller = deaf{}
			}
			n.heart.c.Notes, leader.heart.c.Notes = slot{board{}, n.heart}, slot{board{}, leader.heart}
			early := false
			w.beats(LostAfter+time.Second, func() {
				early = early || w.phase(0) == api.NodeLost && n.clock() < n.deadline+KillTime
			})
			if w.phase(0) != api.NodeLost || early != (r == off) {
				t.Errorf("%q: the node is %s, lost before its guard is done: %v; the rule is off: %v", heartRules[off].what, w.phase(0), early, r == off)
			}
		}
	}
}

// abstains is what node i says of a term while it knows no leader.
func (w *world) abstains(i int, term uint64) abstention {
	w.t.Helper()
	h := w.nodes[i].heart
	h.heard = w.now - time.Minute
	a, err := h.Abstain(context.Background(), term)
	must(w.t, err)
	return abstention{Term: a.Term, Voted: a.Voted, Voters: a.Voters}
}

// shelves are some pools, of which a node may write to a part.
type shelves struct {
	slot
	boards map[string]board
	writes []string
}

func (s shelves) Pools() []string { return slices.Sorted(maps.Keys(s.boards)) }

func (s shelves) Write(_ context.Context, pool string, note []byte) error {
	if !slices.Contains(s.writes, pool) {
		return errors.New("no space")
	}
	s.boards[pool][s.h.n.id] = note
	return nil
}

func (s shelves) Read(_ context.Context, pool, nodeID string) ([]byte, error) {
	return s.boards[pool][nodeID], nil
}

// What an earlier life of a daemon left in a pool to which this one cannot write.
func TestANoteOfAnEarlierLifeHidesNothing(t *testing.T) {
	w := heartbeats(t)
	boards := map[string]board{"a": {}, "b": {}}
	for _, n := range w.nodes {
		n.heart.c.Notes = shelves{slot{nil, n.heart}, boards, []string{"a"}}
	}
	n := w.nodes[3]
	early, err := json.Marshal(note{Life: 1, Node: n.id, Boot: "earlier", Number: math.MaxUint64, Asks: &question{ID: "of long ago"}})
	must(t, err)
	boards["b"][n.id] = early
	w.beats(20*time.Second, nothing)
	n.cutOff = true
	w.beats(time.Minute, func() {
		if !n.holds() {
			t.Fatalf("at %v: it holds no lease", w.now)
		}
	})
	first := n.heart.last.Number
	n.newHeart()
	if n.heart.last.Number <= first {
		t.Errorf("a later life counts from %d, the one before was at %d", n.heart.last.Number, first)
	}
	if sees, ago, ok := w.nodes[0].heart.seen(n.id); !ok || sees != 0 || ago > livesWithin {
		t.Errorf("%d, %v, %v", sees, ago, ok)
	}
}

// A write of a pool that hung may land after a later one.
func TestANoteThatLandsLateTellsNothing(t *testing.T) {
	w := heartbeats(t)
	h := w.nodes[0].heart
	sees := func(boot string, number uint64) (arrived bool, changed time.Duration) {
		w.now += time.Second
		h.see(found{&note{Life: 1, Node: "x", Boot: boot, Number: number}, "pool"})
		return len(h.take()) == 1, h.sight[place{"pool", "x"}].changed
	}
	sees("a", 7)
	_, at := sees("a", 8)
	if arrived, changed := sees("a", 7); arrived || changed != at {
		t.Errorf("a note that landed late: arrived %v, a change at %v, the last one was at %v", arrived, changed, at)
	}
	if arrived, changed := sees("a", 8); !arrived || changed != at {
		t.Errorf("the same note again: arrived %v, a change at %v, the last one was at %v", arrived, changed, at)
	}
	if arrived, changed := sees("another daemon, which counts anew", 1); !arrived || changed == at {
		t.Errorf("the note of another daemon: arrived %v, a change at %v", arrived, changed)
	}
}

// A line that fails for a moment costs no election.
func TestAVoterAloneLeavesNoTerm(t *testing.T) {
	w := heartbeats(t)
	w.beats(20*time.Second, nothing)
	n := w.nodes[3]
	n.heart.c.Notes = slot{board{}, n.heart} // the pool is away, too
	n.cutOff = true
	w.beats(9*time.Second, nothing)
	if n.heart.last.Asks == nil || n.heart.last.Asks.Leave == 0 || n.heart.term != 1 {
		t.Errorf("it asks %+v and is in term %d", n.heart.last.Asks, n.heart.term)
	}
}

func TestAVotersOwnAnswerIsLast(t *testing.T) {
	three := []string{"a", "b", "c"}
	five := append(slices.Clone(three), "d", "e")
	says := func(term uint64, voters []string) abstention { return abstention{Term: term, Voters: voters} }
	for what, c := range map[string]struct {
		left   map[string]abstention
		voters []string
		want   uint64 // 0: it says nothing
	}{
		"nobody has answered":                 {nil, three, 0},
		"it is the only voter":                {nil, []string{"a"}, 7},
		"one of three":                        {map[string]abstention{"b": says(7, three)}, three, 7},
		"one of three, in a higher term":      {map[string]abstention{"b": says(9, three)}, three, 9},
		"one of three, which has voted":       {map[string]abstention{"b": {9, true, three}}, three, 0},
		"one of five":                         {map[string]abstention{"b": says(7, five)}, five, 0},
		"two of five":                         {map[string]abstention{"b": says(7, five), "c": says(7, five)}, five, 7},
		"two of five, in two terms":           {map[string]abstention{"b": says(7, five), "c": says(8, five)}, five, 0},
		"three of five need no more":          {map[string]abstention{"b": says(7, five), "c": says(7, five), "d": says(7, five)}, five, 0},
		"it has said so":                      {map[string]abstention{"b": says(7, three), "a": says(7, three)}, three, 0},
		"it was in a lower term":              {map[string]abstention{"b": says(8, three), "a": says(7, three)}, three, 8},
		"it votes no more, the others say":    {map[string]abstention{"b": says(7, []string{"b", "c", "d"})}, three, 0},
		"one of three, who does not vote yet": {map[string]abstention{"x": says(7, three)}, three, 0},
	} {
		if term, ok := lacking(c.left, "a", says(7, c.voters)); term != c.want || ok != (c.want != 0) {
			t.Errorf("%s: %d, %v", what, term, ok)
		}
	}
}

// A pool of which an access has not ended holds up no other.
func TestAPoolThatHangsHoldsUpNoOther(t *testing.T) {
	w := heartbeats(t)
	boards := map[string]board{"a": {}, "b": {}}
	for _, n := range w.nodes {
		n.heart.c.Notes = shelves{slot{nil, n.heart}, boards, []string{"b"}}
		n.heart.busy[visit{"a", true}], n.heart.busy[visit{"a", false}] = true, true
	}
	w.beats(20*time.Second, nothing)
	n := w.nodes[3]
	n.cutOff = true
	w.beats(time.Minute, func() {
		if !n.holds() {
			t.Fatalf("at %v: it holds no lease", w.now)
		}
	})
}

// stuck is a pool of which no access ends before the test.
type stuck struct {
	slot
	over chan struct{}
}

func (s stuck) Write(context.Context, string, []byte) error { <-s.over; return nil }

func (s stuck) Read(context.Context, string, string) ([]byte, error) { <-s.over; return nil, nil }

func TestALookEndsThoughItsPoolHangs(t *testing.T) {
	w := heartbeats(t)
	s := stuck{slot{board{}, w.nodes[0].heart}, make(chan struct{})}
	h := w.nodes[0].heart
	h.c.Notes, h.patience = s, time.Millisecond
	for range 3 {
		w.now += surveyEvery + time.Second
		must(t, h.beat(t.Context()))
	}
	h.mu.Lock()
	busy := len(h.busy)
	h.mu.Unlock()
	if busy != 2 {
		t.Errorf("%d accesses are under way; one write and one round of reads may", busy)
	}
	close(s.over)
	must(t, h.tasks.Wait())
}

// counted counts confirmations.
type counted struct {
	Leader
	n int
}

func (c *counted) Confirm(ctx context.Context, term uint64) error {
	c.n++
	return c.Leader.Confirm(ctx, term)
}

func TestOneConfirmationIsForAllQuestions(t *testing.T) {
	w := heartbeats(t)
	w.beats(20*time.Second, nothing)
	leader := w.nodes[0]
	c := &counted{Leader: leader}
	leader.svc.grant.leader = c
	var asked []string
	for i := 1; i < 5; i++ {
		n := w.nodes[i]
		q := note{Life: 1, Node: n.id, Boot: "x", Number: math.MaxUint64, Asks: &question{ID: n.id}}
		b, err := json.Marshal(q)
		must(t, err)
		leader.heart.c.Notes.(slot).board[n.id] = b
		asked = append(asked, n.id)
	}
	leader.svc.grant.fenced[w.nodes[4].id] = true
	w.now += surveyEvery + beatEvery
	must(t, leader.heart.beat(t.Context()))
	if g := leader.heart.given; c.n != 1 || len(g) != 1 || !slices.Equal(g[0].To, asked[:3]) || g[0].Grant == nil {
		t.Errorf("%d confirmations, %+v", c.n, g)
	}
}

// few is an electorate in which this node has no vote.
type few struct{ *simHeart }

func (f few) Voters() []string { return f.simHeart.Voters()[:3] }

func TestWhoHasNoVoteReadsNoQuestions(t *testing.T) {
	w := heartbeats(t)
	w.beats(20*time.Second, nothing)
	w.switchFails(true)
	w.now += leaderlessAfter + time.Second
	n := w.nodes[4].heart
	n.c.Electorate = few{n}
	if got := n.whom(n.c.Notes.Pools()); !slices.Equal(got, n.c.Electorate.Voters()) {
		t.Errorf("it reads the notes of %v", got)
	}
	if got := w.nodes[1].heart.whom([]string{"pool"}); len(got) != 4 {
		t.Errorf("a voter reads the notes of %v", got)
	}
}

// However many ask, a note has room for the answers; the newest are kept.
func TestANoteHasABoundedSize(t *testing.T) {
	const room, voters = 15 << 10, 9
	id := strings.Repeat("x", 36)
	n := note{Life: math.MaxUint64, Node: id, Boot: id, Number: math.MaxUint64, Sees: 1000, Asks: &question{strings.Repeat("q", 26), math.MaxUint64}}
	var all []given
	now := time.Hour
	for at := now - 2*answersStand; at <= now; at += beatEvery {
		a := answer{Left: &abstention{Term: math.MaxUint64, Voted: true}}
		for range voters {
			a.Left.Voters = append(a.Left.Voters, id)
		}
		for i := range 100 {
			a.To = append(a.To, fmt.Sprintf("%20d-%05d", at, i))
		}
		all = append(all, given{a, at})
	}
	kept := 0
	for _, g := range recent(all, now) {
		kept += len(g.To)
		n.Answers = append(n.Answers, g.answer)
	}
	newest := n.Answers[len(n.Answers)-1].To
	if b, err := json.Marshal(n); err != nil || len(b) > room || kept != maxAnswered || len(newest) != 100 {
		t.Errorf("%d bytes of %d for %d answers, %v", len(b), room, kept, err)
	}
	for i := range all { // one each
		all[i].To = all[i].To[:20]
	}
	n.Answers = nil
	for _, g := range recent(all, now) {
		n.Answers = append(n.Answers, g.answer)
	}
	if b, err := json.Marshal(n); err != nil || len(b) > room || len(n.Answers) < int(answersStand/beatEvery) {
		t.Errorf("%d bytes of %d for %d answers, %v", len(b), room, len(n.Answers), err)
	}
}

// A new leader has heard nobody yet: who was cut off under the one before may be dead.
func TestANewLeaderGivesNothingToWhoWasCutOff(t *testing.T) {
	w := heartbeats(t)
	w.beats(20*time.Second, nothing)
	w.nodes[3].cutOff = true
	w.beats(10*time.Second, nothing)
	if w.node(3).Status.CutOff == nil {
		t.Fatal("it is not cut off")
	}
	w.elected(1, 2, 0, 1, 2)
	svc := w.nodes[1].svc
	if why := svc.silent()[w.nodes[3].id]; !strings.Contains(why, "was cut off") {
		t.Errorf("it may be given VMs: %q", why)
	}
	if why, ok := svc.silent()[w.nodes[2].id]; ok {
		t.Errorf("another one: %q", why)
	}
	svc.grant.onWire(w.nodes[3].id)
	if why, ok := svc.silent()[w.nodes[3].id]; ok {
		t.Errorf("it is back: %q", why)
	}
}

// refusesOnce is a database of which one transaction fails.
type refusesOnce struct {
	*simNode
	refused bool
}

func (r *refusesOnce) Txn(ctx context.Context, tx *configdb.Txn) (uint64, error) {
	if !r.refused {
		r.refused = true
		return 0, errors.New("no answer")
	}
	return r.simNode.Txn(ctx, tx)
}

func TestACutOffThatIsNotNotedHoldsUpNoOther(t *testing.T) {
	w := heartbeats(t)
	w.beats(20*time.Second, nothing)
	leader := w.nodes[0]
	w.nodes[3].cutOff, w.nodes[4].cutOff = true, true
	w.beats(cutOffAfter-beatEvery, nothing)
	leader.svc.db = &refusesOnce{simNode: leader}
	for i := 0; w.node(3).Status.CutOff == nil && w.node(4).Status.CutOff == nil; i++ {
		if w.beats(beatEvery, nothing); i > 20 {
			t.Fatal("nothing is noted")
		}
	}
	if !leader.svc.db.(*refusesOnce).refused || w.node(4).Status.CutOff == nil {
		t.Errorf("refused: %v; %+v", leader.svc.db.(*refusesOnce).refused, w.node(4).Status.CutOff)
	}
}

// A witness that leads has no pools: the voters that have some carry the questions to it.
func TestQuestionsAreCarriedToALeaderWithoutPools(t *testing.T) {
	for _, leaders := range [][]string{nil, {"b"}} { // none, or one that the other nodes have not
		w := heartbeats(t)
		boards := map[string]board{"a": {}}
		for _, n := range w.nodes {
			n.heart.c.Notes = shelves{slot{nil, n.heart}, boards, []string{"a"}}
		}
		own := map[string]board{}
		for _, p := range leaders {
			own[p] = board{}
		}
		w.nodes[0].heart.c.Notes = shelves{slot{nil, w.nodes[0].heart}, own, leaders}
		w.beats(20*time.Second, nothing)
		if w.carried > 0 {
			t.Errorf("%d calls carried no question", w.carried)
		}
		n := w.nodes[3]
		n.cutOff = true
		w.beats(time.Minute, func() {
			if !n.holds() || w.phase(3) != api.NodeReady {
				t.Fatalf("at %v: lease %v, %s", w.now, n.holds(), w.phase(3))
			}
		})
		for _, o := range w.nodes {
			if o.heart.term != 1 {
				t.Errorf("node %d left its term", o.i)
			}
		}
		if c := w.node(3).Status.CutOff; c == nil {
			t.Error("it is not said to be cut off")
		}
		n.frozen = time.Hour
		w.beats(LostAfter+4*time.Second, nothing)
		if w.phase(3) != api.NodeLost {
			t.Errorf("it is dead and %s", w.phase(3))
		}
	}
}

func TestQuestionsAreNotCarriedToALeaderThatSeesThem(t *testing.T) {
	w := heartbeats(t)
	w.beats(20*time.Second, nothing)
	was := w.carried
	w.nodes[3].cutOff = true
	w.beats(30*time.Second, nothing)
	if w.carried != was {
		t.Errorf("%d calls", w.carried-was)
	}
}

func TestCarriedQuestionsAreChecked(t *testing.T) {
	w := heartbeats(t)
	w.beats(20*time.Second, nothing)
	svc := w.nodes[0].svc
	svc.grant.fenced[w.nodes[4].id] = true
	req, err := json.Marshal(carryRequest{[]string{w.nodes[3].id, w.nodes[4].id, api.NewID()}})
	must(t, err)
	b, err := svc.ServeCarry(t.Context(), req)
	must(t, err)
	var a carryAnswer
	must(t, json.Unmarshal(b, &a))
	if !slices.Equal(a.Granted, []string{w.nodes[3].id}) || a.Grant.Term != w.term {
		t.Errorf("%+v", a)
	}
	many, err := json.Marshal(carryRequest{make([]string, maxAnswered+1)})
	must(t, err)
	for what, req := range map[string][]byte{"malformed": []byte("{"), "too many": many, "nobody": []byte("{}")} {
		if b, err := svc.ServeCarry(t.Context(), req); err == nil {
			t.Errorf("%s: %s", what, b)
		}
	}
	if b, err := w.nodes[1].svc.ServeCarry(t.Context(), req); err == nil {
		t.Errorf("who does not lead: %s", b)
	}
}
