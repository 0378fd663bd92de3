// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/muster-vm/muster/configdb/fsm"
)

func txnFor(key string) *fsm.Txn {
	return &fsm.Txn{Actor: "a", Ops: []fsm.Op{{Key: key, Value: []byte("v")}}}
}

// While calls are under way, the transactions that come gather into few more,
// and each caller gets its own answer.
func TestForwardedTransactionsShareCalls(t *testing.T) {
	const callers = 400
	var mu sync.Mutex
	calls, taken := 0, 0
	gate := make(chan struct{})
	f := newForwarder(make(chan struct{}), func(_ target, body []byte) ([]byte, error) {
		txns, err := splitForward(body)
		if err != nil {
			return nil, err
		}
		mu.Lock()
		calls, taken = calls+1, taken+len(txns)
		mu.Unlock()
		<-gate
		var out []byte
		for _, x := range txns {
			var n uint64
			if _, err := fmt.Sscanf(x.Ops[0].Key, "k%d", &n); err != nil {
				return nil, err
			}
			out = appendVerdict(out, answer{outcome: fsm.Outcome{Revision: n, Status: fsm.Applied}})
		}
		return out, nil
	})
	ctx, cancel := context.WithCancel(context.Background())
	var run, wg sync.WaitGroup
	run.Go(func() { f.run(ctx) })
	for i := range callers {
		wg.Go(func() {
			out, err := f.do(ctx, target{nodeID: "n"}, txnFor(fmt.Sprintf("k%d", i)))
			if err != nil || out.Revision != uint64(i) {
				t.Errorf("transaction %d: %+v, %v", i, out, err)
			}
		})
	}
	waiting := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(f.pending) + taken
	}
	for deadline := time.Now().Add(20 * time.Second); waiting() < callers-1; time.Sleep(time.Millisecond) { // one may be in run's hand
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d transactions wait or are under way", waiting(), callers)
		}
	}
	close(gate)
	wg.Wait()
	cancel()
	run.Wait()
	if calls >= callers/2 {
		t.Errorf("%d transactions took %d calls", callers, calls)
	}
}

func TestOneLeaderACall(t *testing.T) {
	f := newForwarder(nil, nil)
	a := &forward{leader: target{nodeID: "a"}}
	for _, id := range []string{"a", "b", "a"} {
		f.pending <- &forward{leader: target{nodeID: id}}
	}
	pack, carry := f.gather(a)
	if len(pack) != 2 || carry == nil || carry.leader.nodeID != "b" {
		t.Errorf("%d in one call, %+v is left", len(pack), carry)
	}
}

func TestVerdictsSurviveTheCall(t *testing.T) {
	in := []answer{
		{outcome: fsm.Outcome{Revision: 7, Status: fsm.Conflict, Failed: 1, Actual: 3}},
		{err: errNotLeader},
		{err: errors.New("disk on fire")},
		{err: fmt.Errorf("%w: value", ErrTooLarge)},
	}
	var b []byte
	for _, a := range in {
		b = appendVerdict(b, a)
	}
	out, err := decodeVerdicts(b, len(in))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(out[0], in[0]) || !errors.Is(out[1].err, errNotLeader) || out[2].err.Error() != "disk on fire" || !errors.Is(out[3].err, ErrTooLarge) {
		t.Errorf("%+v", out)
	}
	for i := range b {
		if _, err := decodeVerdicts(b[:i], len(in)); err == nil {
			t.Errorf("the first %d bytes pass", i)
		}
	}
}
