// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/muster-vm/muster/configdb/fsm"
)

// entries stands in for Raft: it records what it is given and answers when the
// test lets it.
type entries struct {
	mu   sync.Mutex
	seen []*fsm.Command
	gate chan struct{} // nil: answer at once
	err  error
	size int
}

func (e *entries) apply(b []byte) ([]fsm.Outcome, error) {
	if e.gate != nil {
		<-e.gate
	}
	c, err := fsm.DecodeCommand(b)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.seen = append(e.seen, c)
	e.size = max(e.size, len(b))
	if e.err != nil {
		return nil, e.err
	}
	out := make([]fsm.Outcome, len(c.Txns))
	for i := range out {
		out[i] = fsm.Outcome{Status: fsm.Applied, Revision: uint64(len(e.seen)), Actual: c.Txns[i].Request.Sequence}
	}
	return out, nil
}

func write(seq uint64, keys ...string) *fsm.Txn {
	t := &fsm.Txn{Request: fsm.RequestID{Sequence: seq}}
	for _, k := range keys {
		t.Ops = append(t.Ops, fsm.Op{Key: k})
	}
	return t
}

func proposals(txns ...*fsm.Txn) []*proposal {
	var out []*proposal
	for _, t := range txns {
		out = append(out, &proposal{txn: t, done: make(chan answer, 1)})
	}
	return out
}

// packs gathers everything that waits, as run does.
func packs(b *batcher, all []*proposal) [][]*proposal {
	for _, p := range all {
		b.pending <- p
	}
	var out [][]*proposal
	var carry *proposal
	for {
		first := carry
		if first == nil {
			select {
			case first = <-b.pending:
				if !first.take() {
					continue
				}
			default:
				return out
			}
		}
		var pack []*proposal
		pack, carry = b.gather(first)
		out = append(out, pack)
	}
}

func sequences(packs [][]*proposal) string {
	var out [][]uint64
	for _, p := range packs {
		var s []uint64
		for _, x := range p {
			s = append(s, x.txn.Request.Sequence)
		}
		out = append(out, s)
	}
	return fmt.Sprint(out)
}

func TestTwoWritersOfAKeyAreNeverPacked(t *testing.T) {
	for name, c := range map[string]struct {
		txns []*fsm.Txn
		want string
	}{
		"different keys":        {[]*fsm.Txn{write(1, "a"), write(2, "b"), write(3, "c")}, "[[1 2 3]]"},
		"one key":               {[]*fsm.Txn{write(1, "a"), write(2, "a"), write(3, "a")}, "[[1] [2] [3]]"},
		"one key among others":  {[]*fsm.Txn{write(1, "a", "b"), write(2, "c"), write(3, "d", "b"), write(4, "e")}, "[[1 2] [3 4]]"},
		"carried and conflicts": {[]*fsm.Txn{write(1, "a"), write(2, "a", "b"), write(3, "b")}, "[[1] [2] [3]]"},
		"no changes":            {[]*fsm.Txn{write(1), write(2)}, "[[1 2]]"},
		"a key twice in one":    {[]*fsm.Txn{write(1, "a", "a"), write(2, "b")}, "[[1 2]]"},
	} {
		b := newBatcher(nil)
		if got := sequences(packs(b, proposals(c.txns...))); got != c.want {
			t.Errorf("%s: packed %s, want %s", name, got, c.want)
		}
	}
}

func TestPacksAreBounded(t *testing.T) {
	b := newBatcher(nil)
	var many []*fsm.Txn
	for i := range fsm.MaxPackTxns + 10 {
		many = append(many, write(uint64(i)))
	}
	if got := packs(b, proposals(many...)); len(got) != 2 || len(got[0]) != fsm.MaxPackTxns || len(got[1]) != 10 {
		t.Errorf("%d packs", len(got))
	}
	big := strings.Repeat("k", fsm.MaxKeyBytes)
	for name, fill := range map[string]func(*fsm.Txn, int){
		"values": func(x *fsm.Txn, i int) {
			x.Ops = append(x.Ops, fsm.Op{Key: fmt.Sprint(i), Value: make([]byte, fsm.MaxValueBytes)})
		},
		"preconditions": func(x *fsm.Txn, _ int) {
			x.Require = slices.Repeat([]fsm.Precondition{{Check: fsm.CheckExists, Key: big}}, fsm.MaxTxnOps)
		},
		"actors": func(x *fsm.Txn, _ int) { x.Actor = big },
	} {
		var txns []*fsm.Txn
		for i := range 40 {
			x := write(uint64(i))
			fill(x, i)
			if err := x.Validate(); err != nil {
				t.Fatal(err)
			}
			txns = append(txns, x)
		}
		e := &entries{}
		b := newBatcher(e.apply)
		n := 0
		for _, p := range packs(b, proposals(txns...)) {
			b.commit(p)
			n += len(p)
		}
		if n != len(txns) || e.size > fsm.MaxPackBytes {
			t.Errorf("%s: %d transactions, largest entry %d bytes of at most %d", name, n, e.size, fsm.MaxPackBytes)
		}
	}
}

// start runs a batcher until the test ends.
func start(t *testing.T, b *batcher) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); b.run(ctx) }()
	stop = func() { cancel(); <-done }
	t.Cleanup(stop)
	return stop
}

func TestEveryProposalGetsItsOwnAnswer(t *testing.T) {
	e := &entries{}
	b := newBatcher(e.apply)
	start(t, b)
	var wg sync.WaitGroup
	for i := range uint64(500) {
		wg.Go(func() {
			out, err := b.propose(t.Context(), write(i, fmt.Sprint("k", i%7)))
			if err != nil || out.Actual != i {
				t.Errorf("%d got the answer of %d (%v)", i, out.Actual, err)
			}
		})
	}
	wg.Wait()
	for _, c := range e.seen {
		keys := map[string]bool{}
		for _, x := range c.Txns {
			if keys[x.Ops[0].Key] {
				t.Fatalf("an entry has two writers of %s", x.Ops[0].Key)
			}
			keys[x.Ops[0].Key] = true
		}
	}
}

func TestWritesGatherWhileTheDisksAreBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &entries{gate: make(chan struct{})}
		b := newBatcher(e.apply)
		stop := start(t, b)
		var wg sync.WaitGroup
		for i := range uint64(100) {
			wg.Go(func() {
				if _, err := b.propose(t.Context(), write(i, fmt.Sprint(i))); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		close(e.gate)
		wg.Wait()
		stop()
		synctest.Wait()
		if n := len(e.seen); n != packsInFlight+1 {
			t.Errorf("%d entries for 100 writes, want %d", n, packsInFlight+1)
		}
	})
}

func TestAFailedEntryIsToldToAllInIt(t *testing.T) {
	broken := errors.New("disk")
	b := newBatcher((&entries{err: broken}).apply)
	for _, p := range proposals(write(1, "a"), write(2, "b")) {
		defer func() {
			if a := <-p.done; !errors.Is(a.err, broken) {
				t.Errorf("answer %+v", a)
			}
		}()
		b.pending <- p
	}
	pack, _ := b.gather(<-b.pending)
	b.commit(pack)
}

// After the end nobody waits in vain, and nobody is told "not proposed" whose
// transaction was.
func TestStopLosesNoAnswer(t *testing.T) {
	for round := range 30 {
		e := &entries{}
		b := newBatcher(e.apply)
		stop := start(t, b)
		var applied atomic.Int64
		var wg sync.WaitGroup
		for i := range uint64(64) {
			wg.Go(func() {
				_, err := b.propose(t.Context(), write(i, fmt.Sprint(i)))
				switch {
				case err == nil:
					applied.Add(1)
				case !errors.Is(err, errNotLeader):
					t.Errorf("round %d: %v", round, err)
				}
			})
		}
		stop()
		wg.Wait() // a lost answer would hang here
		n := 0
		for _, c := range e.seen {
			n += len(c.Txns)
		}
		if int64(n) != applied.Load() {
			t.Fatalf("round %d: %d applied, %d were told so", round, n, applied.Load())
		}
		if _, err := b.propose(t.Context(), write(0)); !errors.Is(err, errNotLeader) {
			t.Fatalf("after the end: %v", err)
		}
	}
}

// Who gives up before the transaction was proposed knows that it never will be.
func TestAWithdrawnTransactionIsNeverProposed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &entries{gate: make(chan struct{})}
		b := newBatcher(e.apply)
		stop := start(t, b)
		var wg sync.WaitGroup
		for i := range uint64(packsInFlight) {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				if _, err := b.propose(ctx, write(i, fmt.Sprint(i))); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("proposed without an answer: %v", err)
				}
			})
			synctest.Wait()
		}
		late, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := b.propose(late, write(99, "late")); !errors.Is(err, errNotLeader) {
			t.Errorf("never proposed: %v", err)
		}
		wg.Wait()
		close(e.gate)
		if _, err := b.propose(t.Context(), write(100, "next")); err != nil {
			t.Error(err)
		}
		stop()
		synctest.Wait()
		for _, c := range e.seen {
			for _, x := range c.Txns {
				if x.Request.Sequence == 99 {
					t.Error("a withdrawn transaction was proposed")
				}
			}
		}
	})
}

func TestAWithdrawnTransactionIsNotPacked(t *testing.T) {
	all := proposals(write(1, "a"), write(2, "b"), write(3, "c"), write(4, "d"))
	all[0].take()
	all[2].take()
	if got := sequences(packs(newBatcher(nil), all)); got != "[[2 4]]" {
		t.Errorf("packed %s", got)
	}
}

func TestAFullQueueWaitsNoLongerThanItsCaller(t *testing.T) {
	b := newBatcher(nil) // nobody runs it
	for range pendingTxns {
		b.pending <- nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.propose(ctx, write(1)); !errors.Is(err, errNotLeader) {
		t.Errorf("%v", err)
	}
}
