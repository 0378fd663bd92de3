// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package linear

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// flaw is a mistake that a store of the tests makes once.
type flaw int

const (
	none flaw = iota
	staleRead
	staleReadNoRevision
	lostWrite
	doubleApply
	refusedApplied
	wrongRefusal
	tornPair
	phantomValue
)

// simulated is a history of a store that is right but for one flaw. Clients
// overlap; some never learn their outcome.
type simulated struct {
	rng     *rand.Rand
	flaw    flaw
	planted bool
	cells   map[string]cell
	older   []map[string]cell // states before, by revision
	told    map[string]bool   // values of which some client knows the revision
	again   []Change          // will take effect once more after the next write
	rev     uint64
	ops     []Op
}

type pendingOp struct {
	op          *Op
	call, ret   int64
	at          int64 // when it takes effect
	never, mute bool
}

const (
	simOps     = 100
	simClients = 5
	simKeys    = 2
	groupName  = "g"
)

func simulate(seed uint64, f flaw) *simulated {
	s := &simulated{rng: rand.New(rand.NewPCG(seed, 1)), flaw: f, cells: map[string]cell{}, older: []map[string]cell{{}}, told: map[string]bool{}}
	var all []*pendingOp
	for c := range simClients {
		now := int64(s.rng.IntN(50))
		for range simOps / simClients {
			p := &pendingOp{op: &Op{Client: c, Group: groupName, Node: "n1"}, call: now}
			p.at = now + 1 + int64(s.rng.IntN(40))
			p.ret = p.at + 1 + int64(s.rng.IntN(40))
			p.mute = s.rng.IntN(25) == 0
			p.never = p.mute && s.rng.IntN(2) == 0
			if p.mute && !p.never && s.rng.IntN(2) == 0 {
				p.at += 300 // long after the client gave up
			}
			now = p.ret + int64(s.rng.IntN(20))
			all = append(all, p)
		}
	}
	slices.SortStableFunc(all, func(a, b *pendingOp) int { return cmp.Compare(a.at, b.at) })
	for i, p := range all {
		s.ask(i, p.op)
		p.op.Call, p.op.Return = p.call, p.ret
		if p.never {
			p.op.Return = Forever
			continue
		}
		s.execute(p.op, p.mute)
		if p.mute {
			p.op.Status, p.op.Return, p.op.Revision, p.op.Cells = Unknown, Forever, 0, nil
			continue
		}
		for _, c := range p.op.Changes {
			s.told[c.Value] = true
		}
		for _, c := range p.op.Cells {
			s.told[c.Value] = true
		}
	}
	slices.SortStableFunc(all, func(a, b *pendingOp) int { return cmp.Compare(a.call, b.call) })
	for i, p := range all {
		p.op.ID = i
		s.ops = append(s.ops, *p.op)
	}
	return s
}

func (s *simulated) key() string { return fmt.Sprint("k", s.rng.IntN(simKeys)) }

// ask chooses an operation that knows the state, as clients do from before.
func (s *simulated) ask(i int, o *Op) {
	key := s.key()
	have := s.cells[key]
	put := Change{Key: key, Value: fmt.Sprint("v", i)}
	switch s.rng.IntN(10) {
	case 0, 1, 6, 7, 8, 9:
		o.Kind, o.Reads = "get", []string{"k0", "k1"}
	case 2:
		o.Kind, o.Changes = "put", []Change{put}
	case 3:
		o.Kind, o.Changes = "put-if", []Change{put}
		rev := have.revision
		if !have.exists || !s.told[have.value] || s.rng.IntN(3) == 0 {
			rev = 0
		}
		o.Require = []Cond{{Key: key, Revision: rev}}
	case 4:
		o.Kind, o.Changes = "delete", []Change{{Key: key, Delete: true}}
		o.Require = []Cond{{Key: key, Kind: Exists}}
	case 5:
		o.Kind = "pair"
		o.Changes = []Change{{Key: "k0", Value: fmt.Sprint("v", i, "a")}, {Key: "k1", Value: fmt.Sprint("v", i, "b")}}
	}
}

// plant reports whether the flaw shall be made now, once.
func (s *simulated) plant(f flaw, when bool) bool {
	if s.flaw != f || s.planted || !when {
		return false
	}
	s.planted = true
	return true
}

func (s *simulated) execute(o *Op, mute bool) {
	o.FailedCond = -1
	if o.IsRead() {
		s.read(o, mute)
		return
	}
	p := &step{op: o}
	for _, c := range o.Require {
		p.require = append(p.require, keyNumber(c.Key))
	}
	var st state
	for k, c := range s.cells {
		st.cells[keyNumber(k)] = c
	}
	o.Status = Applied
	if failed := p.failing(st); failed >= 0 {
		o.Status, o.FailedCond = Refused, failed
		if !s.plant(refusedApplied, !mute && o.Kind == "put-if") {
			return
		}
	} else if s.plant(wrongRefusal, !mute && o.Kind == "delete") {
		o.Status = Refused
		return
	}
	if s.plant(lostWrite, !mute && o.Kind == "put" && s.rev > 5) {
		s.rev++
		o.Revision = s.rev
		s.older = append(s.older, s.older[len(s.older)-1])
		return
	}
	s.commit(o, o.Changes)
	if o.Status == Refused {
		o.Revision = 0
	}
	switch {
	case s.again != nil && o.Changes[0].Key == s.again[0].Key:
		s.commit(&Op{}, s.again)
		s.again = nil
	case s.plant(doubleApply, !mute && o.Kind == "put" && s.rev > 5):
		s.again = o.Changes
	}
}

func keyNumber(key string) int { return int(key[1] - '0') }

func (s *simulated) commit(o *Op, changes []Change) {
	s.rev++
	o.Revision = s.rev
	for i, c := range changes {
		if i == 1 && s.plant(tornPair, true) {
			continue
		}
		s.cells[c.Key] = cell{exists: !c.Delete, value: c.Value, revision: s.rev}
	}
	now := map[string]cell{}
	for k, c := range s.cells {
		now[k] = c
	}
	s.older = append(s.older, now)
}

func (s *simulated) read(o *Op, mute bool) {
	from, view := s.cells, s.rev
	if s.rev > 8 && (s.plant(staleRead, !mute) || s.plant(staleReadNoRevision, !mute)) {
		view -= 6
		from = s.older[view]
	}
	o.Status, o.Revision = Applied, view
	if s.flaw == staleReadNoRevision {
		o.Revision = 0
	}
	for _, k := range o.Reads {
		c := from[k]
		got := Cell{Key: k, Exists: c.exists, Value: c.value, Revision: c.revision}
		if s.plant(phantomValue, !mute && c.exists) {
			got.Value = "never written"
		}
		o.Cells = append(o.Cells, got)
	}
}

// finish reads everything at the end, as a campaign does.
func (s *simulated) finish() map[string]map[string]Cell {
	end := s.ops[len(s.ops)-1].Call + 10_000
	o := Op{ID: len(s.ops), Group: groupName, Kind: "get", Reads: []string{"k0", "k1"}, Call: end, Return: end + 1, FailedCond: -1}
	s.read(&o, false)
	s.ops = append(s.ops, o)
	final := map[string]Cell{}
	for _, c := range o.Cells {
		if c.Exists {
			final[c.Key] = c
		}
	}
	return map[string]map[string]Cell{"n1": final}
}

func verdict(t *testing.T, s *simulated) []Violation {
	t.Helper()
	final := s.finish()
	r, err := Check(s.ops, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Undecided) > 0 {
		t.Fatalf("undecided: %v", r.Undecided)
	}
	return append(r.Violations, CheckFinal(s.ops, final)...)
}

func TestRightHistoriesAreAccepted(t *testing.T) {
	for seed := range uint64(300) {
		s := simulate(seed, none)
		if v := verdict(t, s); len(v) > 0 {
			t.Fatalf("seed %d: %v", seed, v[0])
		}
	}
}

// A flaw that was planted is found, and by its name where it has one. Some
// leave no trace in the answers (a lost write that another one overwrote before
// anybody read it), so that of many seeds most must be found.
func TestPlantedFlawsAreFound(t *testing.T) {
	const seeds = 60
	for _, c := range []struct {
		name  string
		flaw  flaw
		kind  ViolationKind // at least one violation is of this kind
		least int           // of the seeds in which it was planted, in percent
	}{
		{"a stale read", staleRead, NotLinearizable, 95},
		{"a stale read that hides its revision", staleReadNoRevision, NotLinearizable, 80},
		{"a lost write", lostWrite, NotLinearizable, 65},
		{"a write that is applied twice", doubleApply, DoubleApply, 55},
		{"a refused write that took effect", refusedApplied, NotLinearizable, 55},
		{"a refusal without a reason", wrongRefusal, NotLinearizable, 50},
		{"half of a transaction", tornPair, NotLinearizable, 75},
		{"a value that nobody wrote", phantomValue, Phantom, 100},
	} {
		t.Run(c.name, func(t *testing.T) {
			planted, found := 0, 0
			for seed := range uint64(seeds) {
				s := simulate(seed, c.flaw)
				v := verdict(t, s)
				if !s.planted {
					continue
				}
				planted++
				if slices.ContainsFunc(v, func(v Violation) bool { return v.Kind == c.kind }) {
					found++
				}
			}
			if planted < seeds/2 || found*100 < planted*c.least {
				t.Errorf("planted in %d of %d histories, found in %d; want at least %d %%", planted, seeds, found, c.least)
			}
		})
	}
}

// The smallest histories that break each promise.
func TestNamedViolations(t *testing.T) {
	op := func(o Op) Op {
		o.Group, o.FailedCond = groupName, -1
		return o
	}
	put := func(id int, value string, rev uint64, call, ret int64) Op {
		return op(Op{ID: id, Kind: "put", Changes: []Change{{Key: "k", Value: value}}, Status: Applied, Revision: rev, Call: call, Return: ret})
	}
	get := func(id int, value string, rev, view uint64, call, ret int64) Op {
		return op(Op{ID: id, Kind: "get", Reads: []string{"k"}, Status: Applied, Revision: view, Call: call, Return: ret,
			Cells: []Cell{{Key: "k", Exists: value != "", Value: value, Revision: rev}}})
	}
	refused := op(Op{ID: 0, Kind: "put-if", Require: []Cond{{Key: "k", Revision: 9}}, Changes: []Change{{Key: "k", Value: "a"}}, Status: Refused, Call: 0, Return: 1})
	noQuorum := refused
	noQuorum.Status = Failed
	stale := func(o Op) Op { o.Stale = true; return o }
	for _, c := range []struct {
		name string
		ops  []Op
		want ViolationKind
	}{
		{"stale read", []Op{put(0, "a", 1, 0, 1), put(1, "b", 2, 2, 3), get(2, "a", 1, 0, 4, 5)}, NotLinearizable},
		{"an older view after a newer one", []Op{put(0, "a", 5, 0, 1), get(1, "a", 5, 9, 2, 3), put(2, "b", 7, 4, 5)}, NotLinearizable},
		{"lost write", []Op{put(0, "a", 1, 0, 1), get(1, "", 0, 0, 2, 3)}, NotLinearizable},
		{"applied twice", []Op{put(0, "a", 1, 0, 1), get(1, "a", 1, 2, 2, 3), get(2, "a", 3, 4, 4, 5)}, DoubleApply},
		{"applied at another revision than was said", []Op{put(0, "a", 1, 0, 1), get(1, "a", 3, 4, 2, 3)}, DoubleApply},
		{"refused and applied", []Op{refused, get(1, "a", 3, 4, 2, 3)}, RefusedApplied},
		{"no quorum and applied", []Op{noQuorum, get(1, "a", 3, 4, 2, 3)}, RefusedApplied},
		{"newer than its view", []Op{put(0, "a", 3, 0, 9), get(1, "a", 3, 2, 1, 2)}, TornView},
		{"before it was written", []Op{get(0, "a", 3, 4, 0, 1), put(1, "a", 3, 2, 3)}, Phantom},
		{"a stale read of the future", []Op{stale(get(0, "a", 3, 4, 0, 1)), put(1, "a", 3, 2, 3)}, Phantom},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := Check(c.ops, Options{})
			if err != nil {
				t.Fatal(err)
			}
			if r.Count(c.want) == 0 {
				t.Errorf("violations %v, want %s", r.Violations, c.want)
			}
		})
	}
	t.Run("a read that may be stale is no violation", func(t *testing.T) {
		r, err := Check([]Op{put(0, "a", 1, 0, 1), put(1, "b", 2, 2, 3), stale(get(2, "a", 1, 1, 4, 5))}, Options{})
		if err != nil || !r.OK() {
			t.Errorf("%v %v", r, err)
		}
	})
	t.Run("no quorum, and nothing was done", func(t *testing.T) {
		r, err := Check([]Op{noQuorum, get(1, "", 0, 4, 2, 3)}, Options{})
		if err != nil || !r.OK() {
			t.Errorf("%v %v", r, err)
		}
	})
}

func TestFinalState(t *testing.T) {
	put := Op{ID: 0, Group: "k", Kind: "put", Changes: []Change{{Key: "k", Value: "a"}}, Status: Applied, Revision: 4, Call: 0, Return: 1}
	del := Op{ID: 1, Group: "k", Kind: "delete", Changes: []Change{{Key: "k", Delete: true}}, Status: Unknown, Call: 2, Return: Forever}
	there := map[string]Cell{"k": {Key: "k", Exists: true, Value: "a", Revision: 4}}
	old := map[string]Cell{"k": {Key: "k", Exists: true, Value: "z", Revision: 3}}
	for _, c := range []struct {
		name  string
		ops   []Op
		final map[string]map[string]Cell
		want  string
		lost  int
	}{
		{"all is there", []Op{put}, map[string]map[string]Cell{"n1": there, "n2": there}, "", 0},
		{"one node lacks it", []Op{put}, map[string]map[string]Cell{"n1": there, "n2": {}}, "diverged lost_write", 1},
		{"all have an older one", []Op{put}, map[string]map[string]Cell{"n1": old, "n2": old}, "lost_write lost_write", 1},
		{"a deletion of unknown outcome explains it", []Op{put, del}, map[string]map[string]Cell{"n1": {}, "n2": {}}, "", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			var kinds []string
			for _, v := range CheckFinal(c.ops, c.final) {
				kinds = append(kinds, string(v.Kind))
			}
			if got := strings.Join(kinds, " "); got != c.want {
				t.Errorf("violations %q, want %q", got, c.want)
			}
			if n := LostKeys(c.ops, c.final); n != c.lost {
				t.Errorf("%d lost keys, want %d", n, c.lost)
			}
		})
	}
}

func TestBadHistoriesAreErrors(t *testing.T) {
	twice := []Op{{Changes: []Change{{Key: "k", Value: "a"}}}, {Changes: []Change{{Key: "k", Value: "a"}}}}
	if _, err := Check(twice, Options{}); err == nil {
		t.Error("a value that is written twice was accepted")
	}
	var wide Op
	wide.Status, wide.Return = Applied, 1
	for i := range MaxCells + 1 {
		wide.Changes = append(wide.Changes, Change{Key: fmt.Sprint(i), Value: fmt.Sprint(i)})
	}
	r, err := Check([]Op{wide}, Options{})
	if err != nil || r.OK() {
		t.Errorf("a group of %d keys: %v, %v; want undecided", MaxCells+1, r, err)
	}
}

func TestRecorderOrdersCallsAndReturns(t *testing.T) {
	r := NewRecorder()
	a, b := &Op{Kind: "a"}, &Op{Kind: "b"}
	r.Begin(a)
	r.End(a, func(o *Op) { o.Status = Applied })
	r.Begin(b)
	r.End(b, func(o *Op) { o.Status = Unknown })
	ops := r.Ops()
	if len(ops) != 2 || ops[0].Call >= ops[0].Return || ops[0].Return >= ops[1].Call || ops[1].Return != Forever {
		t.Errorf("recorded %+v", ops)
	}
	if d := r.Now(); d <= 0 || d > time.Minute {
		t.Errorf("the clock says %s", d)
	}
}
