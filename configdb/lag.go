// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"sync"
	"time"
)

// lag knows when this node last had everything. What the leader says of itself
// in passing is no proof: its heartbeats reach a node that it does not send
// entries to yet, and who was stopped for a while still believes to lead. Only
// an answer to a question counts, and from when the question was asked.
type lag struct {
	mu sync.Mutex
	// asked is the latest question whose answer this node has reached.
	asked time.Time
	// waiting are answers that it has not: the oldest, and the latest.
	oldest, latest heard
}

// heard is an answer: what was acknowledged before at, anywhere, is in revision.
type heard struct {
	revision uint64
	at       time.Time
}

// heard notes an answer of a leader that a majority confirmed after at.
func (l *lag) heard(revision uint64, at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := heard{revision, at}
	switch {
	case l.oldest.at.IsZero():
		l.oldest = h
	case at.After(l.latest.at):
		l.latest = h
	}
}

// since returns from when this node, at an applied revision, may lack
// something; known is false if it cannot know.
func (l *lag) since(applied uint64) (at time.Time, known bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for !l.oldest.at.IsZero() && l.oldest.revision <= applied {
		if l.oldest.at.After(l.asked) {
			l.asked = l.oldest.at
		}
		l.oldest, l.latest = l.latest, heard{}
	}
	return l.asked, !l.asked.IsZero()
}
