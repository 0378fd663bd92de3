// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/muster-vm/muster/configdb/fsm"
)

// Limits of the group commit.
const (
	// packsInFlight is how many log entries may wait for the disks at once;
	// while they do, later transactions gather into one entry.
	packsInFlight = 4
	// pendingTxns bounds the transactions that wait for a place in an entry.
	pendingTxns = 8192
)

// errNotLeader tells the caller that nothing was proposed: ask the leader.
var errNotLeader = errors.New("not the leader")

// batcher packs concurrent transactions into one log entry, so that they share
// its fsync and its round trip.
type batcher struct {
	pending chan *proposal
	apply   func([]byte) ([]fsm.Outcome, error)
	now     func() time.Time
	level   func() int    // the feature level in force
	stopped chan struct{} // closed when run takes nothing more
}

type proposal struct {
	txn   *fsm.Txn
	done  chan answer // has room for the answer, so that nobody waits to give it
	taken atomic.Bool // by run, which will answer, or back by its caller
}

// take decides who has the proposal: run, to propose it, or its caller, who
// then knows for certain that it never was.
func (p *proposal) take() bool { return p.taken.CompareAndSwap(false, true) }

// bytes is about how much of a log entry the proposal needs.
func (p *proposal) bytes() int {
	n := len(p.txn.Actor) + 64
	for _, r := range p.txn.Require {
		n += len(r.Key) + 16
	}
	for _, op := range p.txn.Ops {
		n += len(op.Key) + len(op.Value) + 16
	}
	return n
}

type answer struct {
	outcome fsm.Outcome
	err     error
}

func newBatcher(apply func([]byte) ([]fsm.Outcome, error)) *batcher {
	return &batcher{pending: make(chan *proposal, pendingTxns), apply: apply, now: time.Now, level: func() int { return 1 }, stopped: make(chan struct{})}
}

// propose waits until the transaction was decided.
func (b *batcher) propose(ctx context.Context, t *fsm.Txn) (fsm.Outcome, error) {
	p, err := b.enqueue(ctx, t)
	if err != nil {
		return fsm.Outcome{}, err
	}
	return b.wait(ctx, p)
}

// enqueue hands a transaction over; errNotLeader means that it never was.
func (b *batcher) enqueue(ctx context.Context, t *fsm.Txn) (*proposal, error) {
	p := &proposal{txn: t, done: make(chan answer, 1)}
	select {
	case b.pending <- p:
		return p, nil
	case <-b.stopped:
	case <-ctx.Done():
	}
	return nil, errNotLeader
}

// wait returns what became of a proposal.
func (b *batcher) wait(ctx context.Context, p *proposal) (fsm.Outcome, error) {
	select {
	case a := <-p.done:
		return a.outcome, a.err
	case <-b.stopped:
	case <-ctx.Done():
	}
	if p.take() {
		return fsm.Outcome{}, errNotLeader
	}
	select {
	case a := <-p.done:
		return a.outcome, a.err
	case <-ctx.Done():
		return fsm.Outcome{}, ctx.Err()
	}
}

// run packs until the context ends. What was not proposed by then is refused.
func (b *batcher) run(ctx context.Context) {
	defer close(b.stopped)
	slots := make(chan struct{}, packsInFlight)
	var carry *proposal
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			if carry != nil {
				carry.done <- answer{err: errNotLeader}
			}
			return
		}
		first := carry
		for first == nil {
			select {
			case p := <-b.pending:
				if p.take() {
					first = p
				}
			case <-ctx.Done():
				return
			}
		}
		var pack []*proposal
		pack, carry = b.gather(first)
		go func() {
			defer func() { <-slots }()
			b.commit(pack)
		}()
	}
}

// gather takes what waits, up to the limits. Two transactions that change the
// same key are never packed together: they would share a revision, and the
// revision could not tell the two values apart. The first that does not fit is
// carried to the next entry.
func (b *batcher) gather(first *proposal) (pack []*proposal, carry *proposal) {
	written := map[string]bool{}
	size := 0
	add := func(p *proposal) bool {
		for _, op := range p.txn.Ops {
			if written[op.Key] {
				return false
			}
		}
		n := p.bytes()
		if len(pack) > 0 && size+n > fsm.MaxPackBytes/2 {
			return false
		}
		size += n
		for _, op := range p.txn.Ops {
			written[op.Key] = true
		}
		pack = append(pack, p)
		return true
	}
	add(first)
	for len(pack) < fsm.MaxPackTxns {
		select {
		case p := <-b.pending:
			if !p.take() {
				continue // its caller gave up
			}
			if !add(p) {
				return pack, p
			}
		default:
			return pack, nil
		}
	}
	return pack, nil
}

func (b *batcher) commit(pack []*proposal) {
	cmd := fsm.Command{Time: b.now().UnixNano(), Level: b.level(), Txns: make([]fsm.Txn, len(pack))}
	for i, p := range pack {
		cmd.Txns[i] = *p.txn
	}
	outcomes, err := b.apply(cmd.Encode())
	for i, p := range pack {
		if err != nil {
			p.done <- answer{err: err}
			continue
		}
		p.done <- answer{outcome: outcomes[i]}
	}
}
