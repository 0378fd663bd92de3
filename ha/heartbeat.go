// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/contain"
)

// Times of the storage heartbeat; see DESIGN.md.
const (
	// beatEvery is how often this node looks whether there is something to say, and
	// stampEvery how often it writes when there is nothing.
	beatEvery  = 500 * time.Millisecond
	stampEvery = 2 * time.Second
	// cutAfter is the silence of the network after which notes are asked and read.
	cutAfter = 3 * RenewEvery / 2
	// askAgain is how long a question stands; patience how long the leader alone is
	// asked, and leaderlessAfter how long a voter has missed the leader before it
	// leaves its term.
	askAgain        = 2 * time.Second
	patience        = 3 * time.Second
	leaderlessAfter = 2 * time.Second
	// surveyEvery is how often the leader reads all notes, so that it sees at once that
	// one has changed when its node falls silent.
	surveyEvery = 4 * time.Second
	// answersStand is how long an answer stays in the note.
	answersStand = 3 * askAgain
	// noteLimit bounds one access to a pool, of which notesAtOnce are read at a time, and
	// answerLimit the answer to all questions of a look.
	noteLimit   = 4 * time.Second
	notesAtOnce = 8
	answerLimit = 2 * time.Second
	// poolPatience is how long a look waits for the pools; what a slow one has comes with
	// a later look.
	poolPatience = 500 * time.Millisecond
	// questionsKept are those whose answers still count.
	questionsKept = 4
)

// HeartbeatConfig describes a heartbeat.
type HeartbeatConfig struct {
	NodeID, Boot string
	Life         uint64
	Notes        Notes
	Keeper       *Keeper
	Service      *Service
	Electorate   Electorate
	Caller       Caller
	DB           interface{ Local() *configdb.View }
	// Sees returns how many other nodes are heard over the network.
	Sees func() int
	// Random returns a random text that nobody can guess.
	Random func() string
	Log    *slog.Logger
	Now    func() time.Duration // nil: BootTime
}

// Heartbeat keeps this node's note in pools, asks by it for the lease when the network
// does not answer, and answers what others ask.
type Heartbeat struct {
	c HeartbeatConfig

	written time.Duration // when; 0: never
	last    note          // what was written
	asked   []asked       // the newest last
	granted time.Duration // the newest question that was answered by a leader's note
	highest abstention
	given   []given
	byNotes bool // the lease lives by notes
	survey  time.Duration

	patience time.Duration
	tasks    *contain.Group // what goes on in pools, since the first look
	tctx     context.Context

	mu      sync.Mutex
	sight   map[place]sight
	arrived []found           // and not looked at yet
	busy    map[visit]bool    // a pool that hangs holds up no other
	tried   map[string]uint64 // number of the note that was written to a pool last
}

// visit is what this node does in a pool once at a time.
type visit struct {
	pool   string
	writes bool
}

// place is where a node leaves its note.
type place struct{ pool, node string }

// found is a note with the pool in which it was read.
type found struct {
	*note
	pool string
}

// asked is a question of this node.
type asked struct {
	question
	sent time.Duration
	left map[string]abstention // by voter
	done bool
}

// given is an answer that this node gave to some questions.
type given struct {
	answer
	at time.Duration
}

// sight is what was seen last of a node in a pool.
type sight struct {
	note    note
	changed time.Duration // 0: it has not changed since it was first read
}

// NewHeartbeat returns one that has not begun.
func NewHeartbeat(c HeartbeatConfig) *Heartbeat {
	if c.Now == nil {
		c.Now = BootTime
	}
	// Numbers go on from where an earlier life of the daemon was at most.
	h := &Heartbeat{c: c, patience: poolPatience, sight: map[place]sight{}, busy: map[visit]bool{}, tried: map[string]uint64{}, last: note{Number: uint64(time.Now().UnixNano())}} //nolint:gosec // since 1970
	c.Service.seen = h.seen
	return h
}

// Run goes on until the context ends.
func (h *Heartbeat) Run(ctx context.Context) (err error) {
	h.tasks, h.tctx = contain.NewGroup(ctx)
	defer func() { err = errors.Join(err, h.tasks.Stop()) }()
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	for {
		if err := h.beat(ctx); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-h.tctx.Done(): // or a panic
			return nil
		}
	}
}

// beat looks once. Of the times that a lease may count from, none is read after the
// question was written.
func (h *Heartbeat) beat(ctx context.Context) error {
	pools := h.c.Notes.Pools()
	if len(pools) == 0 || Settings(h.c.DB.Local()).StorageHeartbeat == api.HeartbeatOff {
		return nil
	}
	h.ask()
	if err := h.write(ctx, pools); err != nil {
		return err
	}
	h.read(ctx, pools, h.whom(pools))
	notes := h.take()
	for _, f := range notes {
		h.accept(ctx, f.note)
	}
	h.answer(ctx, notes)
	h.count(ctx)
	return h.write(ctx, pools)
}

// whom returns the nodes whose notes matter now.
func (h *Heartbeat) whom(pools []string) (ids []string) {
	voters := h.c.Electorate.Voters()
	if h.cut() {
		ids = append(ids, voters...)
	}
	_, leads := h.c.Service.grant.leader.Leadership()
	leader := h.c.Electorate.Leader()
	switch {
	case leads:
		ids = append(ids, h.ready(!h.due(surveyEvery))...)
	case h.abstains(): // nobody else has an answer
		ids = append(ids, h.ready(false)...)
	case leader != "" && slices.Contains(voters, h.c.NodeID):
		if slices.ContainsFunc(pools, func(pool string) bool { return h.blind(leader, pool) }) {
			if h.due(carryEvery) {
				ids = append(ids, h.ready(false)...)
			}
		} else if h.due(surveyEvery) {
			ids = append(ids, leader)
		}
	}
	slices.Sort(ids)
	ids = slices.Compact(ids)
	return slices.DeleteFunc(ids, func(id string) bool { return id == h.c.NodeID })
}

// due reports whether it is time to read notes that are not known to be needed.
func (h *Heartbeat) due(every time.Duration) bool {
	if h.c.Now()-h.survey <= every {
		return false
	}
	h.survey = h.c.Now()
	return true
}

// ready returns the nodes that are, or those of them that the network does not hear.
func (h *Heartbeat) ready(quietOnly bool) (ids []string) {
	l, _ := h.c.Service.grant.leader.Leadership()
	nodes, _ := configdb.Nodes.List(h.c.DB.Local()) // one that cannot be read is not answered
	for i := range nodes {
		id := nodes[i].Meta.ID
		if nodes[i].Status.Phase != api.NodeReady {
			continue
		}
		if quiet, _, _ := h.c.Service.grant.offWire(l.Term, id); !quietOnly || quiet > cutAfter {
			ids = append(ids, id)
		}
	}
	return ids
}

// each goes on with one kind of visits in these pools, except where the last one has not
// ended yet. It returns when all have ended that it began, or patience has.
func (h *Heartbeat) each(ctx context.Context, pools []string, writes bool, do func(ctx context.Context, pool string)) {
	if h.tasks == nil {
		h.tasks, h.tctx = contain.NewGroup(ctx)
	}
	ended := make(chan struct{}, len(pools))
	begun := 0
	for _, pool := range pools {
		if h.claim(visit{pool, writes}) {
			begun++
			h.tasks.Go(func() {
				defer func() {
					h.release(visit{pool, writes})
					ended <- struct{}{}
				}()
				do(h.tctx, pool)
			})
		}
	}
	patience := time.NewTimer(h.patience)
	defer patience.Stop()
	for range begun {
		select {
		case <-ended:
		case <-patience.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

func (h *Heartbeat) claim(v visit) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.busy[v] {
		return false
	}
	h.busy[v] = true
	return true
}

func (h *Heartbeat) release(v visit) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.busy, v)
}

// read reads the notes of these nodes in each pool: what an earlier life of a daemon left
// in one pool must not hide what the present one says in another.
func (h *Heartbeat) read(ctx context.Context, pools, ids []string) {
	if len(ids) == 0 {
		return
	}
	h.each(ctx, pools, false, func(ctx context.Context, pool string) {
		turns := make(chan struct{}, notesAtOnce)
		for _, id := range ids {
			turns <- struct{}{}
			h.tasks.Go(func() {
				defer func() { <-turns }()
				limited, cancel := context.WithTimeout(ctx, noteLimit)
				defer cancel()
				h.readOne(limited, pool, id)
			})
		}
		for range cap(turns) { // until all have ended
			turns <- struct{}{}
		}
	})
}

func (h *Heartbeat) readOne(ctx context.Context, pool, id string) {
	b, err := h.c.Notes.Read(ctx, pool, id)
	if err != nil || b == nil {
		return // the pool says what is wrong
	}
	n, err := readNote(b, h.c.Life, id)
	if err != nil {
		h.c.Log.Debug("a note is not read", "pool", pool, "err", err)
		return
	}
	h.see(found{n, pool})
}

// take returns the notes that have arrived since it was called last.
func (h *Heartbeat) take() []found {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := h.arrived
	h.arrived = nil
	slices.SortStableFunc(out, func(a, b found) int { return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(a.pool, b.pool)) })
	return out
}

// see takes a note in, and when it changed. One that was written before what was seen of
// the same daemon has landed late: it tells nothing.
func (h *Heartbeat) see(f found) {
	h.mu.Lock()
	defer h.mu.Unlock()
	at := place{f.pool, f.Node}
	old, known := h.sight[at]
	if known && old.note.Boot == f.Boot && f.Number < old.note.Number {
		return
	}
	now := sight{note: *f.note, changed: old.changed}
	if known && (old.note.Boot != f.Boot || old.note.Number != f.Number) {
		now.changed = h.c.Now()
	}
	h.sight[at] = now
	h.arrived = append(h.arrived, f)
}

// lives reports whether a note has changed since this node reads it.
func (h *Heartbeat) lives(f found) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	s, ok := h.sight[place{f.pool, f.Node}]
	return ok && h.c.Now()-s.changed <= askAgain
}

// seen returns how many others a node hears, by its notes, and how long ago one of these
// changed last: very long, if none has since it was first read.
func (h *Heartbeat) seen(nodeID string) (sees int, ago time.Duration, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var last sight
	for at, s := range h.sight {
		if at.node == nodeID && (!ok || s.changed > last.changed) {
			last, ok = s, true
		}
	}
	return last.note.Sees, h.c.Now() - last.changed, ok
}

// cut reports whether this node holds a lease that the network does not renew.
func (h *Heartbeat) cut() bool {
	since, held := h.c.Keeper.unanswered()
	return held && since > cutAfter
}

// write puts the note into the pools, if it changed or it is time.
func (h *Heartbeat) write(ctx context.Context, pools []string) error {
	now := h.c.Now()
	n := note{Life: h.c.Life, Node: h.c.NodeID, Boot: h.c.Boot, Sees: h.c.Sees()}
	if len(h.asked) > 0 && !h.asked[len(h.asked)-1].done {
		q := h.asked[len(h.asked)-1].question
		n.Asks = &q
	}
	h.given = recent(h.given, now)
	for _, g := range h.given {
		n.Answers = append(n.Answers, g.answer)
	}
	every := stampEvery
	if n.Asks != nil {
		every = beatEvery
	}
	n.Number = h.last.Number
	if h.written == 0 || now-h.written >= every || !reflect.DeepEqual(n, h.last) {
		n.Number++
		h.last, h.written = n, now
	}
	b, err := json.Marshal(h.last)
	if err != nil {
		return err
	}
	number := h.last.Number
	h.each(ctx, slices.DeleteFunc(slices.Clone(pools), func(pool string) bool { return h.has(pool, number) }), true, func(ctx context.Context, pool string) {
		limited, cancel := context.WithTimeout(ctx, noteLimit)
		defer cancel()
		h.mu.Lock()
		h.tried[pool] = number
		h.mu.Unlock()
		if err := h.c.Notes.Write(limited, pool, b); err != nil {
			h.c.Log.Debug("a note is not written", "pool", pool, "err", err)
		}
	})
	return nil
}

// has reports whether a note was written to a pool, or could not be.
func (h *Heartbeat) has(pool string, number uint64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.tried[pool] == number
}

// recent leaves the answers that stand, and of too many questions the newest: a note has
// a bounded size.
func recent(all []given, now time.Duration) (out []given) {
	room := maxAnswered
	for i := len(all) - 1; i >= 0 && room > 0 && now-all[i].at <= answersStand; i-- {
		g := all[i]
		g.To = g.To[max(0, len(g.To)-room):]
		room -= len(g.To)
		out = append(out, g)
	}
	slices.Reverse(out)
	return out
}
