// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"github.com/muster-vm/muster/configdb/fsm"
)

// leads returns a leader on a bare state machine.
func leads(f *testing.F) (*Store, *fsm.State) {
	f.Helper()
	state, index := fsm.New(), uint64(0)
	s := &Store{state: state, leading: newLeaderTracker(), notify: func(string) {}}
	s.leading.set(&Leadership{Term: 3})
	s.batch = newBatcher(func(entry []byte) ([]fsm.Outcome, error) {
		index++ // one entry at a time: the fuzzer calls one after the other
		return state.Apply(index, 3, entry)
	})
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.batch.run(ctx)
	}()
	f.Cleanup(func() {
		stop()
		<-ended
	})
	return s, state
}

// Whatever a peer sends as a transaction, the leader refuses it or decides it;
// it never proposes an entry that nodes cannot apply.
func FuzzServeTxn(f *testing.F) {
	id := fsm.RequestID{Session: [16]byte{1}, Sequence: 2}
	for _, t := range []fsm.Txn{
		{Ops: []fsm.Op{{Key: "k", Value: []byte("v")}}},
		{Request: id, Actor: "a", Require: []fsm.Precondition{{Check: fsm.CheckRevision, Key: "k", Revision: 7}}, Ops: []fsm.Op{{Key: "k", Delete: true}}},
		{Request: id, Require: []fsm.Precondition{{Check: fsm.CheckTerm, Revision: 3}, {Check: fsm.CheckEmpty, Key: "x/"}, {Check: fsm.CheckExists, Key: "k"}}},
	} {
		f.Add(fsm.AppendTxn(nil, &t))
	}
	f.Add([]byte{})
	f.Add(bytes.Repeat([]byte{0xff}, 64))
	s, state := leads(f)
	f.Fuzz(func(t *testing.T, request []byte) {
		before := state.View().Revision()
		call := append(binary.AppendUvarint([]byte{1}, uint64(len(request))), request...)
		reply, err := s.serveTxns(t.Context(), call)
		var answers []answer
		if err == nil {
			if answers, err = decodeVerdicts(reply, 1); err != nil {
				t.Fatalf("the answer %x: %v", reply, err)
			}
			err = answers[0].err
		}
		if err != nil {
			if now := state.View().Revision(); now != before {
				t.Fatalf("refused (%v), but revision %d became %d", err, before, now)
			}
			return
		}
		if o := answers[0].outcome; o.Revision == 0 || o.Revision > state.View().Revision() {
			t.Fatalf("outcome %+v; revision %d", o, state.View().Revision())
		}
	})
}

// FuzzOutcome: what decodes encodes to what decodes to the same.
func FuzzOutcome(f *testing.F) {
	f.Add(appendOutcome(nil, fsm.Outcome{Revision: 300, Status: fsm.Conflict, Failed: 1, Actual: 9}))
	f.Add(binary.AppendUvarint(nil, 1<<63))
	f.Fuzz(func(t *testing.T, b []byte) {
		o, _, err := decodeOutcome(b)
		if err != nil {
			return
		}
		if back, _, err := decodeOutcome(appendOutcome(nil, o)); err != nil || back != o {
			t.Fatalf("%+v came back as %+v, %v", o, back, err)
		}
	})
}

// FuzzForward: a call that comes apart is put together again as it was.
func FuzzForward(f *testing.F) {
	call := func(txns ...fsm.Txn) []byte {
		b := binary.AppendUvarint(nil, uint64(len(txns)))
		for i := range txns {
			t := fsm.AppendTxn(nil, &txns[i])
			b = append(binary.AppendUvarint(b, uint64(len(t))), t...)
		}
		return b
	}
	f.Add(call(*txnFor("k"), *txnFor("l")))
	f.Add(call())
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0x0f})
	f.Fuzz(func(t *testing.T, b []byte) {
		txns, err := splitForward(b)
		if err != nil {
			return
		}
		again, err := splitForward(call(txns...))
		if err != nil || !bytes.Equal(call(again...), call(txns...)) {
			t.Fatalf("%+v came back as %+v, %v", txns, again, err)
		}
	})
}

// FuzzVerdicts: whatever a leader answers, each caller gets an outcome or an
// error, and what decodes encodes to what decodes to the same.
func FuzzVerdicts(f *testing.F) {
	answers := []answer{
		{outcome: fsm.Outcome{Revision: 300, Status: fsm.Conflict, Failed: 1, Actual: 9}},
		{err: errNotLeader}, {err: errors.New("leadership lost")}, {err: ErrTooLarge},
	}
	var all []byte
	for _, a := range answers {
		f.Add(appendVerdict(nil, a), 1)
		all = appendVerdict(all, a)
	}
	f.Add(all, len(answers))
	f.Add([]byte{byte(failed), 0xff, 0xff, 0xff, 0xff, 0x0f}, 1)
	f.Fuzz(func(t *testing.T, b []byte, n int) {
		if n < 0 || n > maxForwardTxns {
			return
		}
		got, err := decodeVerdicts(b, n)
		if err != nil {
			return
		}
		var again []byte
		for _, a := range got {
			again = appendVerdict(again, a)
		}
		back, err := decodeVerdicts(again, n)
		if err != nil || len(back) != n {
			t.Fatalf("%d verdicts came back as %d, %v", n, len(back), err)
		}
		for i, a := range got {
			o := back[i]
			if o.outcome != a.outcome || wasNotProposed(o.err) != wasNotProposed(a.err) || errors.Is(o.err, ErrTooLarge) != errors.Is(a.err, ErrTooLarge) || (o.err == nil) != (a.err == nil) {
				t.Fatalf("%+v came back as %+v", a, o)
			}
		}
	})
}

// FuzzNumber: the answers of rounds, a revision or a term.
func FuzzNumber(f *testing.F) {
	f.Add(binary.AppendUvarint(nil, 1<<40))
	f.Add([]byte{})
	f.Add(bytes.Repeat([]byte{0xff}, 11))
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := decodeNumber(methodTerm, b)
		if err != nil {
			return
		}
		if again, err := decodeNumber(methodTerm, binary.AppendUvarint(nil, n)); err != nil || again != n {
			t.Fatalf("%d came back as %d, %v", n, again, err)
		}
	})
}

// FuzzConfirmed: what a voter answers of earlier leaders.
func FuzzConfirmed(f *testing.F) {
	f.Add(append(binary.AppendUvarint(nil, uint64(time.Second)), "0190"...))
	f.Add([]byte{})
	f.Add(bytes.Repeat([]byte{0xff}, 11))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := decodeConfirmed(b)
		if err != nil {
			return
		}
		if again, err := decodeConfirmed(encodeConfirmed(c)); err != nil || again != c || c.Ago < 0 {
			t.Fatalf("%+v came back as %+v, %v", c, again, err)
		}
	})
}

// FuzzHistoryKey: what comes apart was a key of the history.
func FuzzHistoryKey(f *testing.F) {
	f.Add(HistoryKey("vm", "0190", 7))
	f.Add(HistoryRoot + "vm//0000000000000000")
	f.Add(HistoryRoot + "vm/x/+000000000000001")
	f.Fuzz(func(t *testing.T, key string) {
		kind, id, ok := SplitHistoryKey(key)
		if ok && key[:len(key)-16] != HistoryRoot+string(kind)+"/"+id+"/" {
			t.Fatalf("%q became %q and %q", key, kind, id)
		}
	})
}
