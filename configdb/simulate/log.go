// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"bytes"
	"fmt"
	"sync"

	"github.com/hashicorp/raft"
)

// library keeps the entries of all nodes' logs, each once. Raft promises that
// no two nodes have different entries of one index and term; it is checked.
type library struct {
	mu      sync.RWMutex
	entries map[position]*raft.Log
	bytes   int64
}

type position struct{ index, term uint64 }

func newLibrary() *library { return &library{entries: map[position]*raft.Log{}} }

// keep returns the library's copy of an entry.
func (b *library) keep(l *raft.Log) (*raft.Log, error) {
	at := position{l.Index, l.Term}
	b.mu.Lock()
	defer b.mu.Unlock()
	have := b.entries[at]
	if have == nil {
		have = &raft.Log{Index: l.Index, Term: l.Term, Type: l.Type, Data: bytes.Clone(l.Data), Extensions: bytes.Clone(l.Extensions), AppendedAt: l.AppendedAt}
		b.entries[at] = have
		b.bytes += int64(len(have.Data))
	}
	if have.Type != l.Type || !bytes.Equal(have.Data, l.Data) {
		return nil, fmt.Errorf("two nodes have different entries %d of term %d", l.Index, l.Term)
	}
	return have, nil
}

// size is how many entries there are, and their bytes.
func (b *library) size() (entries int, bytes int64) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return len(b.entries), b.bytes
}

// shelf is the log of one node. It implements raft.LogStore.
type shelf struct {
	library *library
	broken  func(error)

	mu    sync.RWMutex
	first uint64 // index of logs[0]
	logs  []*raft.Log
}

// FirstIndex implements raft.LogStore.
func (s *shelf) FirstIndex() (uint64, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.first, nil
}

// LastIndex implements raft.LogStore.
func (s *shelf) LastIndex() (uint64, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.last(), nil
}

func (s *shelf) last() uint64 {
	if len(s.logs) == 0 {
		return 0
	}
	return s.first + uint64(len(s.logs)) - 1
}

// GetLog implements raft.LogStore.
func (s *shelf) GetLog(index uint64, l *raft.Log) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if index < s.first || index > s.last() || len(s.logs) == 0 {
		return raft.ErrLogNotFound
	}
	*l = *s.logs[index-s.first]
	return nil
}

// StoreLog implements raft.LogStore.
func (s *shelf) StoreLog(l *raft.Log) error { return s.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore.
func (s *shelf) StoreLogs(logs []*raft.Log) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range logs {
		kept, err := s.library.keep(l)
		if err != nil {
			s.broken(err)
			return err
		}
		switch last := s.last(); {
		case len(s.logs) == 0:
			s.first, s.logs = l.Index, append(s.logs, kept)
		case l.Index == last+1:
			s.logs = append(s.logs, kept)
		case l.Index >= s.first && l.Index <= last:
			s.logs[l.Index-s.first] = kept
		default:
			return fmt.Errorf("entry %d does not follow %d", l.Index, last)
		}
	}
	return nil
}

// DeleteRange implements raft.LogStore: a beginning or an end.
func (s *shelf) DeleteRange(from, to uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	last := s.last()
	switch {
	case len(s.logs) == 0 || to < s.first || from > last:
	case from <= s.first && to >= last:
		s.first, s.logs = 0, nil
	case from <= s.first:
		s.logs = append([]*raft.Log(nil), s.logs[to+1-s.first:]...)
		s.first = to + 1
	case to >= last:
		s.logs = s.logs[:from-s.first]
	default:
		return fmt.Errorf("entries %d to %d are in the middle of %d to %d", from, to, s.first, last)
	}
	return nil
}
