// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"time"

	"github.com/muster-vm/muster/internal/clusternet"
)

// methodTerm asks a node for its Raft term, and names the one in which the asking node leads.
const methodTerm = "configdb.term"

// askVoters returns nil when a majority of the voters, asked after the call,
// have not gone beyond this leader's term. A voter takes on a higher term, on
// disk, before it votes in it; so by the time of the call no later leader had
// been elected, since its voters and these would have one in common.
//
// Raft's own VerifyLeader promises less: it counts the answers of members
// without a vote, and answers to messages that were sent before it was asked.
func (s *Store) askVoters(ctx context.Context) error {
	l, ok := s.Leadership()
	if !ok {
		return errNotLeader
	}
	term := s.node.TellTerm(l.Term, s.cfg.NodeID) // its own voice counts
	members, err := s.node.Members()
	if err != nil {
		return err
	}
	_, err = askMajority(ctx, s, term, members, func(ctx context.Context, m Member) (uint64, error) {
		t, err := s.callTerm(ctx, m, term)
		if err == nil && t > term {
			err = fmt.Errorf("it is in term %d", t)
		}
		return t, err
	})
	return err
}

// askMajority asks the voters among the members until a majority has answered, with this
// node, which leads in the term. It returns the others' answers.
func askMajority[T any](ctx context.Context, s *Store, term uint64, members []Member, ask func(context.Context, Member) (T, error)) ([]T, error) {
	l, changed := s.leading.get()
	if l == nil || l.Term != term {
		return nil, errNotLeader
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // the rest need not answer
	type reply struct {
		answer T
		err    error
	}
	voters, agree, asked := 0, 0, 0
	replies := make(chan reply, len(members))
	for _, m := range members {
		switch {
		case !m.Voter:
			continue
		case m.NodeID == s.cfg.NodeID:
			agree++
		default:
			asked++
			go func() {
				a, err := ask(ctx, m)
				replies <- reply{a, err}
			}()
		}
		voters++
	}
	var answers []T
	var last error
	for agree <= voters/2 {
		if asked == 0 {
			return nil, fmt.Errorf("leadership of term %d: %d of %d voters agree: %w", term, agree, voters, last)
		}
		select {
		case r := <-replies:
			asked--
			if r.err != nil {
				last = r.err
				continue
			}
			agree++
			answers = append(answers, r.answer)
		case <-changed:
			return nil, errNotLeader
		case <-ctx.Done():
			return nil, fmt.Errorf("leadership of term %d: %w", term, ctx.Err())
		}
	}
	return answers, nil
}

func (s *Store) callTerm(ctx context.Context, m Member, leads uint64) (uint64, error) {
	b, err := s.cfg.Client.Call(ctx, m.NodeID, m.Address, methodTerm, binary.AppendUvarint(nil, leads))
	if err != nil {
		return 0, err
	}
	return decodeNumber(methodTerm, b)
}

func (s *Store) serveTerm(ctx context.Context, request []byte) ([]byte, error) {
	leads, _ := binary.Uvarint(request) // 0: an older leader names no term
	return binary.AppendUvarint(nil, s.node.TellTerm(leads, clusternet.CallerOf(ctx))), nil
}

// methodTold asks a voter when it last told a term before that of the leader who asks.
const methodTold = "configdb.told"

// Confirmed is when an earlier leader was confirmed for the last time, at the latest.
type Confirmed struct {
	Ago time.Duration // by the clock of a voter
	By  string        // who led then; empty if that is not known
}

// LastConfirmed asks the voters, as the leader of a term, for the last moment at which an
// earlier leader can have been confirmed, or a majority have said that nobody leads. It
// takes a majority of them. See ha/DESIGN.md, "What the voters remember".
func (s *Store) LastConfirmed(ctx context.Context, term uint64) (Confirmed, error) {
	members, err := s.node.Members()
	if err != nil {
		return Confirmed{}, err
	}
	last, err := s.toldBefore(term) // after that: it knows when that membership was stored
	if err != nil {
		return Confirmed{}, err
	}
	answers, err := askMajority(ctx, s, term, members, func(ctx context.Context, m Member) (Confirmed, error) {
		return s.callTold(ctx, m, term)
	})
	for _, a := range answers {
		if a.Ago < last.Ago {
			last = a
		}
	}
	return last, err
}

func (s *Store) toldBefore(term uint64) (Confirmed, error) {
	ago, by, err := s.node.ToldBefore(term)
	return Confirmed{Ago: ago, By: by}, err
}

func (s *Store) callTold(ctx context.Context, m Member, term uint64) (Confirmed, error) {
	b, err := s.cfg.Client.Call(ctx, m.NodeID, m.Address, methodTold, binary.AppendUvarint(nil, term))
	if err != nil {
		return Confirmed{}, err
	}
	return decodeConfirmed(b)
}

// serveTold answers with how long ago it was, in nanoseconds (uvarint), and the node's ID.
func (s *Store) serveTold(_ context.Context, request []byte) ([]byte, error) {
	term, err := decodeNumber(methodTold, request)
	if err != nil {
		return nil, err
	}
	c, err := s.toldBefore(term)
	if err != nil {
		return nil, err
	}
	return encodeConfirmed(c), nil
}

func encodeConfirmed(c Confirmed) []byte {
	return append(binary.AppendUvarint(nil, uint64(c.Ago)), c.By...) //nolint:gosec // not negative
}

func decodeConfirmed(b []byte) (Confirmed, error) {
	ago, n := binary.Uvarint(b)
	if n <= 0 || ago > math.MaxInt64 {
		return Confirmed{}, fmt.Errorf("%s: malformed answer", methodTold)
	}
	return Confirmed{Ago: time.Duration(ago), By: string(b[n:])}, nil
}
