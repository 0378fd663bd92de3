// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"sync"
	"time"
)

// lag remembers the oldest revision of the leader that this node lacks.
type lag struct {
	mu       sync.Mutex
	revision uint64
	at       time.Time
	latest   uint64
	latestAt time.Time
}

// heard notes what the leader had.
func (l *lag) heard(revision uint64, at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.revision == 0 {
		l.revision, l.at = revision, at
	}
	if revision > l.latest {
		l.latest, l.latestAt = revision, at
	}
}

// since returns since when a node at an applied revision lacks something.
func (l *lag) since(applied uint64) (time.Time, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.revision <= applied { // it has that; go on with the latest known
		l.revision, l.at = l.latest, l.latestAt
	}
	if l.revision <= applied {
		l.revision, l.latest = 0, 0
		return time.Time{}, false
	}
	return l.at, true
}
