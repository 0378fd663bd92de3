// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/internal/clusternet"
)

// Limits of the calls that carry transactions to the leader.
const (
	// forwardsInFlight is how many calls may be under way at once; while they
	// are, later transactions gather into one call.
	forwardsInFlight = 4
	maxForwardTxns   = 512
	maxForwardBytes  = 8 << 20
	// pendingForwards bounds the transactions that wait for a call.
	pendingForwards = 8192
)

// methodTxns hands transactions to the leader: a count, then the length and the
// encoding of each. The answer has for each a verdict.
const methodTxns = "configdb.txns"

// verdict begins what became of one transaction of such a call.
type verdict byte

const (
	decided     verdict = 1 // an outcome follows
	notProposed verdict = 2 // this node does not lead
	failed      verdict = 3 // a text follows; the outcome is not known
	refused     verdict = 4 // a text follows; nothing was proposed, nor will be
)

// forwarder packs concurrent transactions of this node into calls to the leader.
type forwarder struct {
	pending chan *forward
	call    func(leader target, body []byte) ([]byte, error)
	closed  <-chan struct{}
}

type forward struct {
	leader target
	body   []byte
	done   chan answer // has room, so that nobody waits to give it
}

func newForwarder(closed <-chan struct{}, call func(target, []byte) ([]byte, error)) *forwarder {
	return &forwarder{pending: make(chan *forward, pendingForwards), call: call, closed: closed}
}

// do hands a transaction to a leader. An error other than errNotLeader leaves
// it open whether it takes effect.
func (f *forwarder) do(ctx context.Context, leader target, t *fsm.Txn) (fsm.Outcome, error) {
	w := &forward{leader: leader, body: fsm.AppendTxn(nil, t), done: make(chan answer, 1)}
	select {
	case f.pending <- w:
	case <-ctx.Done():
		return fsm.Outcome{}, errNotLeader // it was never sent
	case <-f.closed:
		return fsm.Outcome{}, ErrClosed
	}
	select {
	case a := <-w.done:
		return a.outcome, a.err
	case <-ctx.Done():
		return fsm.Outcome{}, ctx.Err()
	case <-f.closed:
		return fsm.Outcome{}, ErrClosed
	}
}

// run packs until the context ends.
func (f *forwarder) run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, forwardsInFlight)
	var carry *forward
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		if carry == nil {
			select {
			case carry = <-f.pending:
			case <-ctx.Done():
				return
			}
		}
		var pack []*forward
		pack, carry = f.gather(carry)
		wg.Go(func() {
			defer func() { <-slots }()
			f.send(pack)
		})
	}
}

// gather takes what waits for the same leader, up to the limits.
func (f *forwarder) gather(first *forward) (pack []*forward, carry *forward) {
	pack, size := append(pack, first), len(first.body)
	for len(pack) < maxForwardTxns {
		select {
		case w := <-f.pending:
			if size += len(w.body); w.leader != first.leader || size > maxForwardBytes {
				return pack, w
			}
			pack = append(pack, w)
		default:
			return pack, nil
		}
	}
	return pack, nil
}

func (f *forwarder) send(pack []*forward) {
	body := binary.AppendUvarint(nil, uint64(len(pack)))
	for _, w := range pack {
		body = binary.AppendUvarint(body, uint64(len(w.body)))
		body = append(body, w.body...)
	}
	reply, err := f.call(pack[0].leader, body)
	var answers []answer
	if err == nil {
		answers, err = decodeVerdicts(reply, len(pack))
	}
	for i, w := range pack {
		if err != nil {
			w.done <- answer{err: err}
			continue
		}
		w.done <- answers[i]
	}
}

// splitForward takes a call's body apart.
func splitForward(b []byte) ([]fsm.Txn, error) {
	malformed := fmt.Errorf("%s: malformed request", methodTxns)
	n, k := binary.Uvarint(b)
	if k <= 0 || n > maxForwardTxns {
		return nil, malformed
	}
	b = b[k:]
	txns := make([]fsm.Txn, 0, n)
	for range n {
		size, k := binary.Uvarint(b)
		if k <= 0 || size > uint64(len(b)-k) {
			return nil, malformed
		}
		t, err := fsm.DecodeTxn(b[k : k+int(size)]) //nolint:gosec // at most the length of b
		if err != nil {
			return nil, err
		}
		txns, b = append(txns, t), b[k+int(size):] //nolint:gosec // as above
	}
	if len(b) > 0 {
		return nil, malformed
	}
	return txns, nil
}

// serveTxns proposes the transactions of another node's call.
func (s *Store) serveTxns(ctx context.Context, b []byte) ([]byte, error) {
	txns, err := splitForward(b)
	if err != nil {
		return nil, err
	}
	answers := make([]answer, len(txns))
	leads, _ := s.leading.get()
	var wg sync.WaitGroup
	for i := range txns {
		if leads == nil {
			answers[i].err = errNotLeader
			continue
		}
		if err := txns[i].Validate(); err != nil {
			answers[i].err = err
			continue
		}
		p, err := s.batch.enqueue(ctx, &txns[i])
		if err != nil {
			answers[i].err = err
			continue
		}
		wg.Go(func() { answers[i].outcome, answers[i].err = s.batch.wait(ctx, p) })
	}
	wg.Wait()
	s.notify(clusternet.CallerOf(ctx)) // it waits until it has applied them
	var out []byte
	for _, a := range answers {
		out = appendVerdict(out, a)
	}
	return out, nil
}

func appendVerdict(b []byte, a answer) []byte {
	v, text := failed, ""
	switch {
	case a.err == nil:
		return appendOutcome(append(b, byte(decided)), a.outcome)
	case wasNotProposed(a.err):
		return append(b, byte(notProposed))
	case errors.Is(a.err, ErrTooLarge), errors.Is(a.err, fsm.ErrMalformed):
		v = refused
	}
	text = a.err.Error()
	b = binary.AppendUvarint(append(b, byte(v)), uint64(len(text)))
	return append(b, text...)
}

func decodeVerdicts(b []byte, n int) ([]answer, error) {
	malformed := fmt.Errorf("%s: malformed answer", methodTxns)
	out := make([]answer, n)
	for i := range out {
		if len(b) == 0 {
			return nil, malformed
		}
		v := verdict(b[0])
		b = b[1:]
		switch v {
		case decided:
			var err error
			if out[i].outcome, b, err = decodeOutcome(b); err != nil {
				return nil, err
			}
		case notProposed:
			out[i].err = errNotLeader
		case failed, refused:
			size, k := binary.Uvarint(b)
			if k <= 0 || size > uint64(len(b)-k) {
				return nil, malformed
			}
			text := string(b[k : k+int(size)]) //nolint:gosec // at most the length of b
			b = b[k+int(size):]                //nolint:gosec // as above
			out[i].err = errors.New(text)
			if v == refused {
				out[i].err = fmt.Errorf("%w: %s", ErrTooLarge, text)
			}
		default:
			return nil, malformed
		}
	}
	if len(b) > 0 {
		return nil, malformed
	}
	return out, nil
}
