// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"bytes"
	"context"
	"encoding/binary"
	"testing"

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
