// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package fsm

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/muster-vm/muster/internal/version"
)

// entry is one log entry of a generated history.
type entry struct {
	index, term uint64
	cmd         Command
}

// Few names, so that things collide.
var (
	someKeys     = []string{"a", "a/", "a/b", "a/b/c", "a\xff", "b", "b/\x00", "c"}
	somePrefixes = append([]string{"", "a/b/", "zz", "\xff"}, someKeys...)
)

func genTxn() *rapid.Generator[Txn] {
	return rapid.Custom(func(t *rapid.T) Txn {
		var x Txn
		if rapid.IntRange(0, 3).Draw(t, "with a session") > 0 {
			x.Request.Session[0] = byte(rapid.IntRange(1, 3).Draw(t, "session"))
			x.Request.Sequence = rapid.Uint64Range(0, 12).Draw(t, "sequence")
			x.Request.Done = rapid.Uint64Range(0, x.Request.Sequence).Draw(t, "done")
		}
		for range rapid.IntRange(0, 2).Draw(t, "preconditions") {
			p := Precondition{Check: Check(rapid.IntRange(1, 4).Draw(t, "check"))}
			switch p.Check {
			case CheckRevision:
				p.Key, p.Revision = rapid.SampledFrom(someKeys).Draw(t, "key"), rapid.Uint64Range(0, 20).Draw(t, "revision")
			case CheckExists:
				p.Key = rapid.SampledFrom(someKeys).Draw(t, "key")
			case CheckEmpty:
				p.Key = rapid.SampledFrom(somePrefixes[1:]).Draw(t, "prefix")
			case CheckTerm:
				p.Revision = rapid.Uint64Range(1, 2).Draw(t, "term")
			}
			x.Require = append(x.Require, p)
		}
		for range rapid.IntRange(0, 4).Draw(t, "changes") {
			op := Op{Key: rapid.SampledFrom(someKeys).Draw(t, "key"), Delete: rapid.Bool().Draw(t, "delete")}
			if !op.Delete {
				op.Value = rapid.SliceOfN(rapid.Byte(), 0, 6).Draw(t, "value")
			}
			x.Ops = append(x.Ops, op)
		}
		return x
	})
}

func genHistory(t *rapid.T) []entry {
	var out []entry
	var index, term uint64 = 0, 1
	now := int64(0)
	for range rapid.IntRange(1, 25).Draw(t, "entries") {
		index += rapid.Uint64Range(1, 2).Draw(t, "step")
		term = max(term, rapid.Uint64Range(1, 2).Draw(t, "term"))
		if rapid.IntRange(0, 3).Draw(t, "jump") == 0 { // most of a session's patience, to a sweep
			index = (index/sweepEvery + SessionIdle*2/3/sweepEvery) * sweepEvery
		}
		// Clocks of leaders differ: time may go back.
		now += rapid.Int64Range(-int64(time.Minute), int64(time.Hour)).Draw(t, "time")
		out = append(out, entry{index, term, Command{Time: now, Txns: rapid.SliceOfN(genTxn(), 0, 3).Draw(t, "txns")}})
	}
	return out
}

func apply(t rapid.TB, s *State, e entry) []Outcome {
	t.Helper()
	out, err := s.Apply(e.index, e.term, e.cmd.Encode())
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func snapshotOf(t rapid.TB, s *State) []byte {
	t.Helper()
	var b bytes.Buffer
	n, err := s.Snapshot().WriteTo(&b)
	if err != nil || n != int64(b.Len()) {
		t.Fatalf("snapshot: %d bytes reported, %d written, %v", n, b.Len(), err)
	}
	return b.Bytes()
}

// Two nodes that apply the same entries are the same to the byte, also when
// one of them was restored from a snapshot on the way.
func TestNodesStayIdentical(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		history := genHistory(t)
		restart := rapid.IntRange(0, len(history)).Draw(t, "restart at")
		a, b := New(), New()
		for i, e := range history {
			if i == restart {
				restored := New()
				if err := restored.Restore(bytes.NewReader(snapshotOf(t, b))); err != nil {
					t.Fatal(err)
				}
				b = restored
			}
			if x, y := apply(t, a, e), apply(t, b, e); !slices.Equal(x, y) {
				t.Fatalf("entry %d: outcomes %+v and %+v", e.index, x, y)
			}
		}
		x, y := snapshotOf(t, a), snapshotOf(t, b)
		if !bytes.Equal(x, y) {
			t.Fatalf("snapshots differ:\n%x\n%x", x, y)
		}
		if a.View().Bytes() != b.View().Bytes() || a.View().Time() != b.View().Time() || a.View().Term() != b.View().Term() {
			t.Fatalf("views differ: %+v %+v", a.View(), b.View())
		}
	})
}

// model is the state machine written the slow and obvious way.
type model struct {
	keys     map[string]Entry
	now      int64
	sessions map[[16]byte]*modelSession
}

type modelSession struct {
	seen     uint64
	done     uint64
	answered map[uint64]Outcome
}

func (m *model) apply(e entry) []Outcome {
	m.now = max(m.now, e.cmd.Time)
	touched := map[string]bool{}
	var out []Outcome
	for _, x := range e.cmd.Txns {
		out = append(out, m.request(e, x, touched))
	}
	for id, s := range m.sessions {
		if e.index%sweepEvery == 0 && e.index-s.seen > SessionIdle {
			delete(m.sessions, id)
		}
	}
	return out
}

func (m *model) request(e entry, x Txn, touched map[string]bool) Outcome {
	id := x.Request
	if id.Session == [16]byte{} {
		return m.txn(e, x, touched)
	}
	s := m.sessions[id.Session]
	if s == nil && id.Done > 0 {
		return Outcome{Revision: e.index, Status: SessionUnknown}
	}
	if s == nil {
		s = &modelSession{answered: map[uint64]Outcome{}}
		m.sessions[id.Session] = s
	}
	s.seen = e.index
	if o, ok := s.answered[id.Sequence]; ok {
		return o
	}
	if id.Sequence < s.done {
		return Outcome{Revision: e.index, Status: SessionUnknown}
	}
	o := m.txn(e, x, touched)
	if o.Status == Overlap {
		return o
	}
	s.answered[id.Sequence] = o
	s.done = max(s.done, id.Done)
	for seq := range s.answered {
		if seq < s.done {
			delete(s.answered, seq)
		}
	}
	return o
}

func (m *model) txn(e entry, x Txn, touched map[string]bool) Outcome {
	for _, op := range x.Ops {
		if touched[op.Key] {
			return Outcome{Revision: e.index, Status: Overlap}
		}
	}
	for i, p := range x.Require {
		have := m.keys[p.Key].Revision
		actual, ok := have, true
		switch p.Check {
		case CheckRevision:
			ok = have == p.Revision
		case CheckExists:
			ok = have != 0
		case CheckEmpty:
			actual = 0
			for k := range m.keys {
				ok = ok && !strings.HasPrefix(k, p.Key)
			}
		case CheckTerm:
			actual, ok = e.term, e.term == p.Revision
		}
		if !ok {
			return Outcome{Revision: e.index, Status: Conflict, Failed: i, Actual: actual}
		}
	}
	for _, op := range x.Ops {
		touched[op.Key] = true
		if op.Delete {
			delete(m.keys, op.Key)
			continue
		}
		n := Entry{Key: op.Key, Value: op.Value, Revision: e.index, Created: e.index}
		if old, ok := m.keys[op.Key]; ok {
			n.Created = old.Created
		}
		m.keys[op.Key] = n
	}
	return Outcome{Revision: e.index, Status: Applied}
}

// check compares everything that can be read.
func (m *model) check(t rapid.TB, v *View) {
	t.Helper()
	var size int64
	for _, k := range someKeys {
		got, ok := v.Get(k)
		want, there := m.keys[k]
		if ok != there || !sameEntry(got, want) {
			t.Fatalf("%q is %+v (%v), want %+v (%v)", k, got, ok, want, there)
		}
		if there {
			size += int64(len(k) + len(want.Value))
		}
	}
	if v.Len() != len(m.keys) || v.Bytes() != size || v.Time() != m.now {
		t.Fatalf("%d keys, %d bytes, time %d; want %d, %d, %d", v.Len(), v.Bytes(), v.Time(), len(m.keys), size, m.now)
	}
	for _, prefix := range somePrefixes {
		empty := true
		for _, after := range append([]string{""}, someKeys...) {
			var want []string
			for _, k := range slices.Sorted(maps.Keys(m.keys)) {
				if strings.HasPrefix(k, prefix) {
					empty = false
					if after == "" || k > after {
						want = append(want, k)
					}
				}
			}
			var got []string
			for e := range v.Scan(prefix, after) {
				got = append(got, e.Key)
			}
			if !slices.Equal(got, want) {
				t.Fatalf("scan %q after %q: %q, want %q", prefix, after, got, want)
			}
		}
		if v.Empty(prefix) != empty {
			t.Fatalf("empty %q: %v", prefix, !empty)
		}
	}
}

func sameEntry(a, b Entry) bool {
	return a.Key == b.Key && bytes.Equal(a.Value, b.Value) && a.Revision == b.Revision && a.Created == b.Created
}

func TestStateAgreesWithTheModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s, m := New(), &model{keys: map[string]Entry{}, sessions: map[[16]byte]*modelSession{}}
		for _, e := range genHistory(t) {
			got, want := apply(t, s, e), m.apply(e)
			if !slices.Equal(got, want) {
				t.Fatalf("entry %d %+v: outcomes %+v, want %+v", e.index, e.cmd, got, want)
			}
			m.check(t, s.View())
		}
	})
}

// put is a command of one transaction with one change.
func put(key, value string, id RequestID) Command {
	return Command{Txns: []Txn{{Request: id, Ops: []Op{{Key: key, Value: []byte(value)}}}}}
}

func TestARequestTakesEffectOnce(t *testing.T) {
	s := New()
	id := RequestID{Session: [16]byte{1}, Sequence: 0}
	first := apply(t, s, entry{1, 1, put("k", "1", id)})
	apply(t, s, entry{2, 1, put("k", "2", RequestID{Session: id.Session, Sequence: 1})})
	again := apply(t, s, entry{3, 1, put("k", "1", id)})
	if first[0] != again[0] || first[0].Revision != 1 {
		t.Errorf("outcomes %+v and %+v", first, again)
	}
	if e, _ := s.View().Get("k"); string(e.Value) != "2" || e.Revision != 2 {
		t.Errorf("the repeated request had another effect: %+v", e)
	}
	// Twice in one entry, too.
	twice := put("x", "1", RequestID{Session: id.Session, Sequence: 2})
	twice.Txns = append(twice.Txns, twice.Txns[0])
	if out := apply(t, s, entry{4, 1, twice}); out[0] != out[1] || out[0].Status != Applied {
		t.Errorf("twice in one entry: %+v", out)
	}
	// A refusal is repeated as well, though it would succeed now.
	refusal := Command{Txns: []Txn{{
		Request: RequestID{Session: id.Session, Sequence: 3}, Require: []Precondition{{Check: CheckExists, Key: "late"}}, Ops: []Op{{Key: "r"}},
	}}}
	no := apply(t, s, entry{5, 1, refusal})
	apply(t, s, entry{6, 1, put("late", "", RequestID{})})
	if out := apply(t, s, entry{7, 1, refusal}); out[0] != no[0] || out[0].Status != Conflict {
		t.Errorf("a refusal was decided anew: %+v then %+v", no, out)
	}
}

func TestAnAnsweredRequestIsRefusedLater(t *testing.T) {
	s := New()
	ses := [16]byte{1}
	apply(t, s, entry{1, 1, put("k", "1", RequestID{Session: ses, Sequence: 0})})
	apply(t, s, entry{2, 1, put("k", "2", RequestID{Session: ses, Sequence: 5, Done: 5})})
	for i, seq := range []uint64{0, 3} {
		out := apply(t, s, entry{uint64(3 + i), 1, put("k", "late", RequestID{Session: ses, Sequence: seq})})
		if out[0].Status != SessionUnknown {
			t.Errorf("sequence %d below Done: %+v", seq, out)
		}
	}
	if e, _ := s.View().Get("k"); string(e.Value) != "2" {
		t.Errorf("a late request was applied: %q", e.Value)
	}
}

func TestAForgottenSessionIsRefused(t *testing.T) {
	s := New()
	ses := [16]byte{1}
	begin := put("k", "1", RequestID{Session: ses})
	apply(t, s, entry{1, 1, begin})
	apply(t, s, entry{SessionIdle, 1, Command{}})
	next := put("k", "2", RequestID{Session: ses, Sequence: 1, Done: 1})
	if out := apply(t, s, entry{SessionIdle + 1, 1, next}); out[0].Status != Applied {
		t.Fatalf("a session that is not idle longer than the limit: %+v", out)
	}
	apply(t, s, entry{2*SessionIdle + sweepEvery, 1, Command{}})
	next.Txns[0].Request.Sequence, next.Txns[0].Request.Done = 2, 2
	if out := apply(t, s, entry{3 * SessionIdle, 1, next}); out[0].Status != SessionUnknown {
		t.Errorf("a forgotten session: %+v", out)
	}
	if n := len(s.Snapshot().sessions); n != 0 {
		t.Errorf("%d sessions are kept", n)
	}
}

func TestASessionsWindowIsBounded(t *testing.T) {
	s := New()
	ses := [16]byte{1}
	var cmd Command
	index := uint64(0)
	for seq := range uint64(MaxSessionWindow) {
		cmd.Txns = append(cmd.Txns, Txn{Request: RequestID{Session: ses, Sequence: seq}})
		if len(cmd.Txns) == MaxPackTxns {
			index++
			apply(t, s, entry{index, 1, cmd})
			cmd.Txns = nil
		}
	}
	over := put("k", "", RequestID{Session: ses, Sequence: MaxSessionWindow})
	if out := apply(t, s, entry{index + 1, 1, over}); out[0].Status != SessionUnknown {
		t.Errorf("a request over the window: %+v", out)
	}
}

func TestOverlapIsNotDecided(t *testing.T) {
	s := New()
	a, b := RequestID{Session: [16]byte{1}}, RequestID{Session: [16]byte{2}}
	c := put("k", "1", a)
	c.Txns = append(c.Txns, put("k", "2", b).Txns...)
	out := apply(t, s, entry{1, 1, c})
	if out[0].Status != Applied || out[1].Status != Overlap {
		t.Fatalf("outcomes %+v", out)
	}
	if out := apply(t, s, entry{2, 1, put("k", "2", b)}); out[0].Status != Applied || out[0].Revision != 2 {
		t.Errorf("proposed again: %+v", out)
	}
	del := Command{Txns: []Txn{{Ops: []Op{{Key: "k", Delete: true}}}, {Ops: []Op{{Key: "k"}}}}}
	if out := apply(t, s, entry{3, 1, del}); out[1].Status != Overlap {
		t.Errorf("a deletion and a put: %+v", out)
	}
}

func TestApplyStopsAtWhatItDoesNotKnow(t *testing.T) {
	s := New()
	apply(t, s, entry{5, 1, put("k", "1", RequestID{})})
	before := snapshotOf(t, s)
	good := put("k", "2", RequestID{})
	later := append([]byte{newest + 1}, good.Encode()[1:]...)
	higher := put("k", "2", RequestID{})
	higher.Level = version.FeatureLevel + 1
	for name, c := range map[string]struct {
		index uint64
		data  []byte
		want  error
	}{
		"newer format":   {6, later, ErrUnknownFormat},
		"higher level":   {6, higher.Encode(), ErrUnknownFormat},
		"format 0":       {6, []byte{0}, ErrUnknownFormat},
		"empty":          {6, nil, ErrMalformed},
		"truncated":      {6, good.Encode()[:10], ErrMalformed},
		"trailing":       {6, append(good.Encode(), 0), ErrMalformed},
		"same index":     {5, good.Encode(), nil},
		"earlier index":  {4, good.Encode(), nil},
		"unknown change": {6, bytes.Replace(good.Encode(), []byte("\x00\x01k"), []byte("\x07\x01k"), 1), ErrMalformed},
	} {
		_, err := s.Apply(c.index, 1, c.data)
		if err == nil || (c.want != nil && !errors.Is(err, c.want)) {
			t.Errorf("%s: %v", name, err)
		}
		if !strings.Contains(fmt.Sprint(err), fmt.Sprint(c.index)) {
			t.Errorf("%s: %v does not name the entry", name, err)
		}
	}
	if !bytes.Equal(before, snapshotOf(t, s)) {
		t.Error("a refused entry changed the state")
	}
}

func TestSkipOnlyGoesForward(t *testing.T) {
	s := New()
	s.Skip(5, 2)
	s.Skip(3, 9)
	s.Skip(5, 9)
	if v := s.View(); v.Revision() != 5 || v.Term() != 2 {
		t.Errorf("revision %d, term %d", v.Revision(), v.Term())
	}
}
