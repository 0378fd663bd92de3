// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package fsm

import (
	"maps"
	"slices"
	"sort"
	"strings"
	"sync"
)

// feed remembers which keys changed at which revision, in one bounded ring for
// all watchers. A watcher keeps only its revision, so that a stalled one costs
// nothing and never slows Apply; one that falls behind the ring lists again.
type feed struct {
	mu      sync.Mutex
	ring    []change // ordered by revision
	first   uint64   // changes at or below this revision are gone
	changed chan struct{}
	// prefixes has who waits for some keys only.
	prefixes prefixes
}

type change struct {
	revision uint64
	key      string
}

func (f *feed) init() {
	f.changed = make(chan struct{})
	f.prefixes.init()
}

func (f *feed) add(revision uint64, keys map[string]bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, k := range slices.Sorted(maps.Keys(keys)) {
		f.ring = append(f.ring, change{revision, k})
	}
	if len(f.ring) > 2*HistoryLength {
		cut := len(f.ring) - HistoryLength
		f.first = f.ring[cut-1].revision
		f.ring = slices.Clone(f.ring[cut:])
	}
}

// notify wakes the watchers. It comes after the view was published: a watcher
// that finds the new revision must find its changes in the ring, and one that
// was woken must find the new revision.
func (f *feed) notify(keys map[string]bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	close(f.changed)
	f.changed = make(chan struct{})
	f.prefixes.wake(keys)
}

// notifyAll wakes the watchers after the whole state was replaced.
func (f *feed) notifyAll() {
	f.mu.Lock()
	defer f.mu.Unlock()
	close(f.changed)
	f.changed = make(chan struct{})
	f.prefixes.wakeAll()
}

func (f *feed) reset(revision uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ring, f.first = nil, revision
}

// Changed returns a channel that is closed with the next applied entry.
func (s *State) Changed() <-chan struct{} {
	s.feed.mu.Lock()
	defer s.feed.mu.Unlock()
	return s.feed.changed
}

// ChangedKeys returns the keys below prefix that changed after revision from
// and up to revision to, each once, in order of their last change. It fails
// with ErrCompacted when some of these changes are no longer kept.
func (s *State) ChangedKeys(prefix string, from, to uint64) ([]string, error) {
	f := &s.feed
	f.mu.Lock()
	ring, first := f.ring, f.first // what is in the ring never changes, it is only added to or replaced
	f.mu.Unlock()
	if from < first {
		return nil, ErrCompacted
	}
	i := sort.Search(len(ring), func(i int) bool { return ring[i].revision > from })
	last := map[string]int{}
	var keys []string
	for ; i < len(ring) && ring[i].revision <= to; i++ {
		k := ring[i].key
		if !strings.HasPrefix(k, prefix) {
			continue
		}
		if at, ok := last[k]; ok {
			keys[at] = ""
		}
		last[k] = len(keys)
		keys = append(keys, k)
	}
	return slices.DeleteFunc(keys, func(k string) bool { return k == "" }), nil
}
