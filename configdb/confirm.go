// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"context"
	"encoding/binary"
	"fmt"
)

// methodTerm asks a node for its Raft term.
const methodTerm = "configdb.term"

// askVoters returns nil when a majority of the voters, asked after the call,
// have not gone beyond this leader's term. A voter takes on a higher term, on
// disk, before it votes in it; so by the time of the call no later leader had
// been elected, since its voters and these would have one in common.
//
// Raft's own VerifyLeader promises less: it counts the answers of members
// without a vote, and answers to messages that were sent before it was asked.
func (s *Store) askVoters(ctx context.Context) error {
	term := s.node.Term()
	l, changed := s.leading.get()
	if l == nil || l.Term != term {
		return errNotLeader
	}
	members, err := s.node.Members()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // the rest need not answer
	voters, yes, asked := 0, 0, 0
	answers := make(chan bool, len(members))
	for _, m := range members {
		switch {
		case !m.Voter:
			continue
		case m.NodeID == s.cfg.NodeID:
			yes++
		default:
			asked++
			go func() {
				t, err := s.callTerm(ctx, m)
				answers <- err == nil && t <= term
			}()
		}
		voters++
	}
	for yes <= voters/2 {
		if asked == 0 {
			return fmt.Errorf("confirm leadership of term %d: %d of %d voters agree", term, yes, voters)
		}
		select {
		case ok := <-answers:
			asked--
			if ok {
				yes++
			}
		case <-changed:
			return errNotLeader
		case <-ctx.Done():
			return fmt.Errorf("confirm leadership of term %d: %w", term, ctx.Err())
		}
	}
	return nil
}

func (s *Store) callTerm(ctx context.Context, m Member) (uint64, error) {
	b, err := s.cfg.Client.Call(ctx, m.NodeID, m.Address, methodTerm, nil)
	if err != nil {
		return 0, err
	}
	return decodeNumber(methodTerm, b)
}

func (s *Store) serveTerm(context.Context, []byte) ([]byte, error) {
	return binary.AppendUvarint(nil, s.node.Term()), nil
}
