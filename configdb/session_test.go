// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"errors"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"github.com/muster-vm/muster/configdb/fsm"
)

func TestSessionsTellWhatMayBeForgotten(t *testing.T) {
	s := newSessions()
	a, b := s.begin(), s.begin()
	if a.Session == [16]byte{} || a.Session != b.Session || a.Sequence != 0 || b.Sequence != 1 || a.Done != 0 || b.Done != 0 {
		t.Fatalf("first requests %+v %+v", a, b)
	}
	s.end(b, true)
	if c := s.begin(); c.Done != 0 || c.Sequence != 2 {
		t.Errorf("while the first is unanswered: %+v", c)
	}
	s.end(a, true)
	if d := s.begin(); d.Done != 2 {
		t.Errorf("two are answered: %+v", d)
	}
}

// A session that the state machine never answered must be able to begin: all
// its requests carry Done 0.
func TestASessionWithoutAnswersCanStillBegin(t *testing.T) {
	s := newSessions()
	for range 3 {
		r := s.begin()
		if r.Done != 0 {
			t.Fatalf("request %+v of a session that nobody knows", r)
		}
		s.end(r, false)
	}
}

func TestAForgottenSessionIsReplacedOnce(t *testing.T) {
	s := newSessions()
	a, b := s.begin(), s.begin()
	s.forgotten(a)
	c := s.begin()
	if c.Session == a.Session || c.Sequence != 0 || c.Done != 0 {
		t.Fatalf("new session begins with %+v", c)
	}
	s.forgotten(b) // the old one, again
	s.end(a, true) // must not touch the new one
	if d := s.begin(); d.Session != c.Session || d.Done != 0 || d.Sequence != 1 {
		t.Errorf("after a late word about the old session: %+v", d)
	}
}

// Together with the state machine: whatever is retried, however late, takes
// effect at most once, and a retry of an unanswered request is never refused.
func TestSessionsAndStateMachineAgree(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s, state := newSessions(), fsm.New()
		index := uint64(0)
		send := func(r fsm.RequestID) fsm.Outcome {
			index++
			c := fsm.Command{Txns: []fsm.Txn{{Request: r, Ops: []fsm.Op{{Key: "k"}}}}}
			out, err := state.Apply(index, 1, c.Encode())
			if err != nil {
				t.Fatal(err)
			}
			return out[0]
		}
		type flight struct {
			id   fsm.RequestID
			sent bool
			rev  uint64
		}
		var open, past []*flight
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			switch rapid.IntRange(0, 4).Draw(t, "step") {
			case 0:
				open = append(open, &flight{id: s.begin()})
			case 1, 2: // send, or send again
				if len(open) == 0 {
					continue
				}
				f := rapid.SampledFrom(open).Draw(t, "request")
				out := send(f.id)
				if out.Status != fsm.Applied || (f.sent && out.Revision != f.rev) {
					t.Fatalf("an unanswered request %+v: %+v, first at %d", f.id, out, f.rev)
				}
				f.sent, f.rev = true, out.Revision
			case 3: // answered, or given up
				if len(open) == 0 {
					continue
				}
				i := rapid.IntRange(0, len(open)-1).Draw(t, "request")
				f := open[i]
				s.end(f.id, f.sent)
				open = append(open[:i], open[i+1:]...)
				past = append(past, f)
			case 4: // an old packet arrives late
				if len(past) == 0 {
					continue
				}
				f := rapid.SampledFrom(past).Draw(t, "request")
				if out := send(f.id); f.sent && out.Status == fsm.Applied && out.Revision != f.rev {
					t.Fatalf("%+v was applied at %d and again at %d", f.id, f.rev, out.Revision)
				} else if out.Status == fsm.Applied {
					f.sent, f.rev = true, out.Revision
				}
			}
		}
	})
}

func TestSessionsMayBeUsedByMany(t *testing.T) {
	s := newSessions()
	var mu sync.Mutex
	seen := map[fsm.RequestID]bool{}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				r := s.begin()
				id := fsm.RequestID{Session: r.Session, Sequence: r.Sequence}
				mu.Lock()
				if seen[id] {
					t.Errorf("%+v was given twice", id)
				}
				seen[id] = true
				mu.Unlock()
				s.end(r, true)
			}
		})
	}
	wg.Wait()
	if len(s.inFlight) != 0 {
		t.Errorf("%d are remembered", len(s.inFlight))
	}
}

func TestProposeTurnsOutcomesIntoErrors(t *testing.T) {
	broken := errors.New("broken")
	for name, c := range map[string]struct {
		out  fsm.Outcome
		err  error
		want error
	}{
		"applied":                  {fsm.Outcome{Status: fsm.Applied, Revision: 7}, nil, nil},
		"conflict":                 {fsm.Outcome{Status: fsm.Conflict, Failed: 0, Actual: 3}, nil, ErrConflict},
		"unknown session":          {fsm.Outcome{Status: fsm.SessionUnknown}, nil, ErrUncertain},
		"failed":                   {fsm.Outcome{}, broken, broken},
		"conflict out of range":    {fsm.Outcome{Status: fsm.Conflict, Failed: 99}, nil, errAny},
		"conflict below the range": {fsm.Outcome{Status: fsm.Conflict, Failed: -1}, nil, errAny},
		"no known status":          {fsm.Outcome{Status: 77}, nil, errAny},
		"no status":                {fsm.Outcome{}, nil, errAny},
	} {
		tx := &Txn{Actor: "me"}
		tx.RequireExists("k")
		tx.Put("k", nil)
		told := uint64(0)
		tx.onCommit(func(rev uint64) { told = rev })
		rev, err := Propose(tx, func(ft *fsm.Txn) (fsm.Outcome, error) {
			if ft.Actor != "me" {
				t.Errorf("actor %q", ft.Actor)
			}
			return c.out, c.err
		})
		switch {
		case c.want == errAny && err == nil, c.want != errAny && !errors.Is(err, c.want):
			t.Errorf("%s: %v, want %v", name, err, c.want)
		case err == nil && (rev != 7 || told != 7), err != nil && (rev != 0 || told != 0):
			t.Errorf("%s: revision %d, told %d", name, rev, told)
		}
	}
	tx := &Txn{}
	tx.Put("", nil)
	if _, err := Propose(tx, nil); !errors.Is(err, ErrTooLarge) {
		t.Errorf("an invalid transaction was handed on: %v", err)
	}
}

var errAny = errors.New("some error")

func TestOutcomesSurviveTheCall(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		o := fsm.Outcome{
			Revision: rapid.Uint64().Draw(t, "revision"), Status: fsm.OutcomeStatus(rapid.Byte().Draw(t, "status")),
			Failed: rapid.IntRange(0, fsm.MaxTxnOps).Draw(t, "failed"), Actual: rapid.Uint64().Draw(t, "actual"),
		}
		b := appendOutcome(nil, o)
		if back, rest, err := decodeOutcome(b); err != nil || back != o || len(rest) > 0 {
			t.Fatalf("%+v came back as %+v, %v", o, back, err)
		}
		for i := range b {
			if _, _, err := decodeOutcome(b[:i]); err == nil {
				t.Fatalf("the first %d bytes of %x pass", i, b)
			}
		}
	})
}

func FuzzDecodeOutcome(f *testing.F) {
	f.Add(appendOutcome(nil, fsm.Outcome{Revision: 300, Status: 2, Failed: 1, Actual: 9}))
	f.Fuzz(func(t *testing.T, b []byte) {
		o, _, err := decodeOutcome(b)
		if err != nil {
			return
		}
		// Whatever a peer answers, the caller gets an error or a revision.
		tx := &Txn{}
		tx.RequireExists("k")
		_, _ = Propose(tx, func(*fsm.Txn) (fsm.Outcome, error) { return o, nil })
	})
}

func TestTheLastChangeOfAKeyWins(t *testing.T) {
	tx := &Txn{}
	if !tx.Empty() {
		t.Error("a new transaction changes something")
	}
	tx.Put("a", []byte("1"))
	tx.Put("b", []byte("1"))
	tx.Delete("a")
	tx.Put("b", []byte("2"))
	if len(tx.t.Ops) != 2 || !tx.t.Ops[0].Delete || string(tx.t.Ops[1].Value) != "2" || tx.Empty() {
		t.Errorf("changes %+v", tx.t.Ops)
	}
}
