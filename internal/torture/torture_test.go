// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package torture

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/internal/linear"
)

func TestOneSeedOneSchedule(t *testing.T) {
	list := func(seed uint64) []string {
		s := NewSchedule(seed, 3)
		var out []string
		for range 100 {
			out = append(out, s.Next().String())
		}
		return out
	}
	if !slices.Equal(list(7), list(7)) {
		t.Error("the same seed gave two schedules")
	}
	if slices.Equal(list(7), list(8)) {
		t.Error("two seeds gave the same schedule")
	}
}

func TestARoundHasEveryKind(t *testing.T) {
	for seed := range uint64(50) {
		s := NewSchedule(seed, 3)
		seen, onLeader, pairs := map[Kind]bool{}, 0, 0
		for i := range 2*len(baseKinds) - 2 + len(pairKinds) {
			e := s.Next()
			if e.N != i || e.Hold < holdLeast || e.Hold > cutOffHold || e.Calm < calmLeast || e.Calm > calmMost {
				t.Fatalf("seed %d: episode %+v", seed, e)
			}
			if len(e.Faults) > 1 {
				pairs++
			}
			for _, f := range e.Faults {
				seen[f.Kind] = true
				if f.Leader {
					onLeader++
				}
				if f.Node < 0 || f.Node > 2 {
					t.Fatalf("seed %d: fault %+v", seed, f)
				}
			}
			if i == len(baseKinds)-1 && len(seen) != len(baseKinds) {
				t.Errorf("seed %d: the first %d episodes have only %v", seed, i+1, seen)
			}
		}
		if onLeader == 0 || pairs != len(pairKinds) {
			t.Errorf("seed %d: %d faults for the leader, %d pairs", seed, onLeader, pairs)
		}
	}
}

func TestOneSeedOneStreamPerClient(t *testing.T) {
	list := func(seed uint64, client int) (out []Ask) {
		s := NewStream(seed, client, 3)
		for range 1000 {
			out = append(out, s.Next())
		}
		return out
	}
	a := list(1, 0)
	if !slices.Equal(a, list(1, 0)) || slices.Equal(a, list(1, 1)) || slices.Equal(a, list(2, 0)) {
		t.Error("a stream must depend on seed and client and on nothing else")
	}
	kinds, rules, old, elsewhere := map[What]int{}, 0, 0, 0
	for _, x := range a {
		kinds[x.What]++
		if x.Rule {
			rules++
		}
		if x.Old > 0 {
			old++
		}
		if x.Elsewhere > 0 {
			elsewhere++
		}
		if x.Elsewhere > 2 || x.Slot >= RawSlots || x.Rule && x.Slot >= RuleSlots || x.Pause > pauseMost {
			t.Fatalf("ask %+v", x)
		}
	}
	if len(kinds) != len(mix) || rules == 0 || old == 0 || elsewhere == 0 {
		t.Errorf("of 1000: %v, %d rules, %d old, %d elsewhere", kinds, rules, old, elsewhere)
	}
	total := 0
	for _, m := range mix {
		total += m.weight
	}
	if total != weightAll {
		t.Errorf("the weights add up to %d", total)
	}
}

func TestRegistersLiveForAWhile(t *testing.T) {
	at := Register
	raw, rule := Ask{Slot: 3}, Ask{Slot: 1, Rule: true}
	if at(raw, 0) != at(raw, RawEpoch-1) || at(raw, 0) == at(raw, RawEpoch) || at(rule, 0) == at(rule, RuleEpoch) {
		t.Error("the epochs are wrong")
	}
	if back := (Ask{Slot: 3, Old: 2}); at(back, 2*RawEpoch) != at(raw, 0) || at(back, 0) != at(raw, 0) {
		t.Error("an old register is not found again")
	}
}

const second = time.Second

func kinds(vs []linear.Violation) string {
	var out []string
	for _, v := range vs {
		out = append(out, string(v.Kind))
	}
	return strings.Join(out, " ")
}

func TestStaleReads(t *testing.T) {
	acks := []Ack{
		{Node: "n1", Life: 1, Return: 5 * second, Revision: 10},
		{Node: "n2", Life: 1, Return: 9 * second, Revision: 20},
	}
	read := func(node string, life int, call, age time.Duration, rev uint64) StaleRead {
		return StaleRead{Node: node, Life: life, Call: call, Return: call + 1, Stated: true, Known: true, Age: age, Revision: rev}
	}
	silent := read("n3", 1, 20*second, 0, 30)
	silent.Stated = false
	unknown := read("n3", 1, 20*second, 0, 1)
	unknown.Known = false
	for _, c := range []struct {
		name string
		read StaleRead
		want string
	}{
		{"fresh", read("n3", 1, 20*second, 0, 20), ""},
		{"as old as it says", read("n3", 1, 20*second, 12*second, 10), ""},
		{"older than it says", read("n3", 1, 20*second, 2*second, 10), "misstated_age"},
		{"a little older than it says", read("n3", 1, 10*second, 0, 10), ""},
		{"lacks its own write", read("n2", 1, 10*second, 0, 10), "own_write_unread"},
		{"lacks its own write of an earlier life", read("n2", 2, 10*second, 0, 10), ""},
		{"does not say that it is stale", silent, "misstated_age"},
		{"says that it does not know", unknown, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := kinds(CheckStale([]StaleRead{c.read}, acks, 2*second)); got != c.want {
				t.Errorf("violations %q, want %q", got, c.want)
			}
		})
	}
}

func TestProbes(t *testing.T) {
	for _, c := range []struct {
		name string
		p    Probe
		want string
	}{
		{"a write says no quorum", Probe{Write: true, Return: 10 * second, Status: 503, Code: CodeNoQuorum}, ""},
		{"a leader's write says that nobody knows", Probe{Write: true, Return: 10 * second, Status: 504, Code: CodeTimeout}, ""},
		{"a read says no quorum", Probe{Return: 3 * second, Status: 503, Code: CodeNoQuorum}, ""},
		{"a read is served", Probe{Return: 1, Status: 200}, "wrong_answer"},
		{"a write is served", Probe{Write: true, Return: 1, Status: 201}, "wrong_answer"},
		{"a write fails for another reason", Probe{Write: true, Return: 1, Status: 500, Code: "internal"}, "wrong_answer"},
		{"no answer", Probe{Write: true, Return: 14 * second}, "no_answer"},
		{"a read that takes too long", Probe{Return: 8 * second, Status: 503, Code: CodeNoQuorum}, "no_answer"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := kinds(CheckProbes([]Probe{c.p})); got != c.want {
				t.Errorf("violations %q, want %q", got, c.want)
			}
		})
	}
}

func TestOutage(t *testing.T) {
	acks := []Ack{{Return: 1 * second}, {Return: 2 * second}, {Return: 5 * second}, {Return: 6 * second}, {Return: 9 * second}}
	for _, c := range []struct {
		span    Span
		longest time.Duration
		began   time.Duration
	}{
		{Span{0, 7 * second}, 3 * second, 2 * second},
		{Span{4 * second, 7 * second}, 1 * second, 4 * second},
		{Span{10 * second, 12 * second}, 2 * second, 10 * second},
	} {
		if d, at := Outage(acks, c.span); d != c.longest || at != c.began {
			t.Errorf("%v: %s at %s, want %s at %s", c.span, d, at, c.longest, c.began)
		}
	}
}

// watched is a watch of two changes of r1 and one of r2, as it should be.
func watched() []Seen {
	return []Seen{
		{Conn: 0, Type: "synced", Resume: 1},
		{Conn: 0, Type: "put", Kind: WatchedRule, ID: "a", Revision: 5, Target: "r1", Value: "v1", Resume: 4},
		{Conn: 0, Type: "put", Kind: WatchedEvent, ID: "e5", Revision: 5, Target: "r1", Resume: 5},
		{Conn: 0, Type: "put", Kind: WatchedRule, ID: "a", Revision: 6, Target: "r1", Value: "v2", Resume: 5},
		{Conn: 0, Type: "put", Kind: WatchedEvent, ID: "e6", Revision: 6, Target: "r1", Resume: 6},
		{Conn: 1, Since: 6, Type: "put", Kind: WatchedRule, ID: "b", Revision: 8, Target: "r2", Value: "v3", Resume: 7},
		{Conn: 1, Since: 6, Type: "put", Kind: WatchedEvent, ID: "e8", Revision: 8, Target: "r2", Resume: 8},
		{Conn: 1, Since: 6, Type: "synced", Resume: 8},
	}
}

func TestWatches(t *testing.T) {
	acks := []Ack{{Revision: 5, Key: "r1"}, {Revision: 6, Key: "r1"}, {Revision: 8, Key: "r2"}}
	final := map[string]linear.Cell{"r1": {Key: "r1", Exists: true, Value: "v2", Revision: 6}, "r2": {Key: "r2", Exists: true, Value: "v3", Revision: 8}}
	without := func(i int) []Seen { return slices.Delete(watched(), i, i+1) }
	insert := func(i int, s ...Seen) []Seen { return slices.Insert(watched(), i, s...) }
	for _, c := range []struct {
		name string
		seen []Seen
		want string
	}{
		{"all is as it should be", watched(), ""},
		{"an event is missing", without(4), "watch_gap"},
		{"the last state is missing", without(3), "watch_wrong"},
		{"an object is missing", without(5), "watch_wrong"},
		{"two events of one change", insert(5, Seen{Type: "put", Kind: WatchedEvent, ID: "e6b", Revision: 6, Target: "r1", Resume: 6}), "double_apply"},
		{"an object that is gone is still there", insert(8, Seen{Conn: 1, Since: 6, Type: "put", Kind: WatchedRule, ID: "c", Revision: 9, Target: "r3", Value: "v", Resume: 9}), "watch_wrong"},
		{"its deletion comes", insert(8,
			Seen{Conn: 1, Since: 6, Type: "put", Kind: WatchedRule, ID: "c", Revision: 9, Target: "r3", Value: "v", Resume: 9},
			Seen{Conn: 1, Since: 6, Type: "delete", Kind: WatchedRule, ID: "c", Resume: 10}), ""},
		{"the deletion of an older object with the name", insert(8,
			Seen{Conn: 1, Since: 6, Type: "delete", Kind: WatchedRule, ID: "z", Resume: 10}), ""},
		{"the revision goes back", insert(5, Seen{Type: "put", Kind: WatchedEvent, ID: "x", Revision: 7, Target: "r9", Resume: 3}), "watch_order"},
		{"an event goes back", insert(5, Seen{Type: "put", Kind: WatchedEvent, ID: "x", Revision: 3, Target: "r9", Resume: 6}), "watch_order"},
		{"a resumed watch repeats what is older", insert(5, Seen{Conn: 1, Since: 6, Type: "put", Kind: WatchedEvent, ID: "e6", Revision: 6, Target: "r1", Resume: 5}), "watch_order"},
		{"a relist begins anew", insert(5,
			Seen{Conn: 0, Type: "relist"},
			Seen{Conn: 0, Type: "put", Kind: WatchedRule, ID: "a", Revision: 6, Target: "r1", Value: "v2", Resume: 5},
			Seen{Conn: 0, Type: "put", Kind: WatchedEvent, ID: "e6", Revision: 6, Target: "r1", Resume: 6},
			Seen{Conn: 0, Type: "synced", Resume: 6}), ""},
		{"a relist without an object that was there", insert(5,
			Seen{Conn: 0, Type: "relist"}, Seen{Conn: 0, Type: "synced", Resume: 6}), "watch_wrong"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := Replay("n1", c.seen)
			if got := kinds(append(w.Violations, CheckWatch("n1", w, acks, final, 0)...)); got != c.want {
				t.Errorf("violations %q, want %q", got, c.want)
			}
		})
	}
}
