// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"sync"
	"time"
)

// lastSeen remembers when each other node was last heard of, in this life of
// the daemon.
type lastSeen struct {
	since time.Time
	mu    sync.Mutex
	at    map[string]time.Time // by node ID
}

func newLastSeen() *lastSeen { return &lastSeen{since: time.Now(), at: map[string]time.Time{}} }

func (s *lastSeen) note(nodeID string) {
	if s == nil {
		return // in tests of parts
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at[nodeID] = time.Now()
}

// when returns nil for a node that was not heard of.
func (s *lastSeen) when(nodeID string) *time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	t, ok := s.at[nodeID]
	if !ok {
		return nil
	}
	t = t.UTC()
	return &t
}
