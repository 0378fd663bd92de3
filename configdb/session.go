// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"crypto/rand"
	"sync"

	"github.com/muster-vm/muster/configdb/fsm"
)

// sessions gives every transaction of this process an identity, so that the
// state machine applies it once however often it is proposed.
type sessions struct {
	mu          sync.Mutex
	id          [16]byte
	next        uint64
	inFlight    map[uint64]bool
	established bool // the state machine has answered a request of this session
}

func newSessions() *sessions {
	s := &sessions{}
	s.renew()
	return s
}

func (s *sessions) renew() {
	_, _ = rand.Read(s.id[:]) // never fails
	s.next, s.inFlight, s.established = 0, map[uint64]bool{}, false
}

// begin returns the identity of a new request.
func (s *sessions) begin() fsm.RequestID {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := fsm.RequestID{Session: s.id, Sequence: s.next}
	s.inFlight[s.next] = true
	s.next++
	if s.established {
		r.Done = s.lowest()
	}
	return r
}

// lowest returns the oldest sequence that is still unanswered.
func (s *sessions) lowest() uint64 {
	low := s.next
	for seq := range s.inFlight {
		low = min(low, seq)
	}
	return low
}

// end marks a request as answered or given up. Whatever of it is still under
// way is then refused by the state machine once a later request has told it.
func (s *sessions) end(r fsm.RequestID, answered bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.Session != s.id {
		return
	}
	delete(s.inFlight, r.Sequence)
	s.established = s.established || answered
}

// forgotten begins a new session after the state machine forgot this one.
func (s *sessions) forgotten(r fsm.RequestID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.Session == s.id {
		s.renew()
	}
}
