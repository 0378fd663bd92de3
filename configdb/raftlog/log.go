// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftlog

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/hashicorp/raft"
	"golang.org/x/sys/unix"
)

// DefaultSegmentBytes is the size of a segment file.
const DefaultSegmentBytes = 16 << 20

// Limits of the entries that are kept in memory for replication.
const (
	cacheEntries = 2048
	cacheBytes   = 8 << 20
)

// Errors that callers tell apart with errors.Is.
var (
	// ErrNoSpace: the disk is full; nothing was changed.
	ErrNoSpace = errors.New("no space for the log on this disk")
	// ErrFailed: a write could not be made durable. The log must be closed.
	ErrFailed = errors.New("the log could not be made durable")
	// ErrCorrupt: what is on the disk is not what was written.
	ErrCorrupt = errors.New("the log is damaged")
	errClosed  = errors.New("the log is closed")
)

// CorruptError names the damage.
type CorruptError struct {
	Path   string
	Offset int64
	Index  uint64 // of the first entry that is lost
	What   string
}

// Error implements error.
func (e *CorruptError) Error() string {
	return fmt.Sprintf("%s: %s, at offset %d, entry %d", e.Path, e.What, e.Offset, e.Index)
}

// Is makes errors.Is(err, ErrCorrupt) true.
func (e *CorruptError) Is(target error) bool { return target == ErrCorrupt }

// Log is a raft.LogStore on a directory of segment files.
type Log struct {
	dir  string
	size int64              // of a segment
	sync func(fd int) error // fdatasync(2)

	writeMu sync.Mutex // one writer; held around the disk
	failed  error
	spare   chan struct{} // asks for the next segment's file
	spareMu sync.Mutex    // guards that file; taken after writeMu
	done    chan struct{}
	wg      sync.WaitGroup
	buf     []byte
	durable uint64 // the last index that is known to be on the disk
	seq     uint64 // of the newest segment
	// partial, unless 0, is where a call began that stored a part of its entries
	// and failed. Its caller does not know of them, and may write others.
	partial uint64

	mu       sync.RWMutex // guards what follows
	segments []*segment   // in order, without gaps; all but the last are full
	cache    cache
	closed   bool
}

var (
	_ raft.LogStore          = (*Log)(nil)
	_ raft.MonotonicLogStore = (*Log)(nil)
)

// Open reads the log in a directory, which is made if it does not exist.
// segmentBytes is the size of new files; 0 means the default.
func Open(dir string, segmentBytes int64) (*Log, error) {
	if segmentBytes == 0 {
		segmentBytes = DefaultSegmentBytes
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("log directory: %w", err)
	}
	l := &Log{dir: dir, size: segmentBytes, sync: unix.Fdatasync, spare: make(chan struct{}, 1), done: make(chan struct{})}
	if err := l.load(); err != nil {
		return nil, errors.Join(err, l.closeFiles())
	}
	l.durable = l.lastIndex()
	l.wg.Go(l.makeSpares)
	return l, nil
}

// load opens the segments and checks that they follow each other.
func (l *Log) load() error {
	names, err := os.ReadDir(l.dir)
	if err != nil {
		return fmt.Errorf("log directory: %w", err)
	}
	var rest []byte           // behind the last record of the newest segment
	for _, n := range names { // in order of name, which is the sequence
		seq, ok := seqOf(n.Name())
		if !ok {
			continue
		}
		var s *segment
		if s, rest, err = openSegment(filepath.Join(l.dir, n.Name()), seq); err != nil {
			return err
		}
		if err := l.supersede(s); err != nil {
			return errors.Join(err, s.file.Close())
		}
		l.segments = append(l.segments, s)
		l.seq = seq
	}
	for i, s := range l.segments {
		if i+1 < len(l.segments) && s.last()+1 != l.segments[i+1].first {
			return &CorruptError{Path: s.path, Offset: s.end, Index: s.last() + 1, What: fmt.Sprintf("the entries up to %d are missing or damaged", l.segments[i+1].first-1)}
		}
	}
	if len(l.segments) == 0 {
		return nil
	}
	s := l.segments[len(l.segments)-1]
	left, proof := s.leftovers(rest)
	if proof {
		return &CorruptError{Path: s.path, Offset: s.end, Index: s.last() + 1, What: "the entry is damaged, and later ones show that it was acknowledged"}
	}
	if left {
		if err := s.wipe(rest); err != nil {
			return fmt.Errorf("cut off an unfinished write in %s: %w", s.path, err)
		}
	}
	return nil
}

// supersede takes away what a newer segment replaces: the end of the log from
// its first entry on.
func (l *Log) supersede(s *segment) error {
	for n := len(l.segments); n > 0 && l.segments[n-1].first >= s.first; n = len(l.segments) {
		if err := l.remove(n - 1); err != nil {
			return err
		}
	}
	if n := len(l.segments); n > 0 {
		l.mu.Lock()
		l.segments[n-1].trim(s.first)
		l.mu.Unlock()
		l.segments[n-1].shrink()
	}
	return nil
}

// Close releases the files. It is not called while another method runs.
func (l *Log) Close() error {
	l.mu.Lock()
	was := l.closed
	l.closed = true
	l.mu.Unlock()
	if was {
		return nil
	}
	close(l.done)
	l.wg.Wait()
	return l.closeFiles()
}

func (l *Log) closeFiles() error {
	var errs []error
	for _, s := range l.segments {
		errs = append(errs, s.file.Close())
	}
	return errors.Join(errs...)
}

// makeSpares makes the file of the next segment in advance, so that a full disk
// is met, and the time spent, outside an append. A failure shows when the
// segment is needed.
func (l *Log) makeSpares() {
	for {
		select {
		case <-l.spare:
			l.spareMu.Lock()
			_ = makeSpare(l.dir, l.size)
			l.spareMu.Unlock()
		case <-l.done:
			return
		}
	}
}

// IsMonotonic implements raft.MonotonicLogStore: gaps are not kept.
func (l *Log) IsMonotonic() bool { return true }

// FirstIndex implements raft.LogStore. It may be lower than what DeleteRange
// left: space is given back in whole segments.
func (l *Log) FirstIndex() (uint64, error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if len(l.segments) == 0 || l.segments[0].empty() {
		return 0, nil
	}
	return l.segments[0].first, nil
}

// LastIndex implements raft.LogStore.
func (l *Log) LastIndex() (uint64, error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.lastIndex(), nil
}

func (l *Log) lastIndex() uint64 {
	for i := len(l.segments) - 1; i >= 0; i-- {
		if s := l.segments[i]; !s.empty() {
			return s.last()
		}
	}
	return 0
}

// GetLog implements raft.LogStore.
func (l *Log) GetLog(index uint64, out *raft.Log) error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.closed {
		return errClosed
	}
	if e := l.cache.get(index); e != nil {
		*out = *e
		return nil
	}
	i, found := slices.BinarySearchFunc(l.segments, index, func(s *segment, index uint64) int {
		switch {
		case index < s.first:
			return 1
		case index >= s.first+uint64(len(s.offsets)):
			return -1
		}
		return 0
	})
	if !found {
		return raft.ErrLogNotFound
	}
	s := l.segments[i]
	at := s.offsets[index-s.first]
	b := make([]byte, s.limit(index)-at)
	if _, err := s.file.ReadAt(b, at); err != nil {
		return fmt.Errorf("read entry %d from %s: %w", index, s.path, err)
	}
	r, ok := parse(b, s.seed)
	if !ok || r.index != index {
		return &CorruptError{Path: s.path, Offset: at, Index: index, What: "the entry's checksum does not match"}
	}
	r.decode(out)
	return nil
}

// StoreLog implements raft.LogStore.
func (l *Log) StoreLog(e *raft.Log) error { return l.StoreLogs([]*raft.Log{e}) }

// StoreLogs implements raft.LogStore.
func (l *Log) StoreLogs(entries []*raft.Log) error {
	l.writeMu.Lock()
	defer l.writeMu.Unlock()
	if l.failed != nil {
		return l.failed
	}
	if len(entries) == 0 {
		return nil
	}
	for i, e := range entries {
		if len(e.Data)+len(e.Extensions) > maxRecordData {
			return fmt.Errorf("entry %d has %d bytes, at most %d", e.Index, len(e.Data)+len(e.Extensions), maxRecordData)
		}
		if e.Index != entries[0].Index+uint64(i) {
			return fmt.Errorf("entry %d follows entry %d", e.Index, entries[i-1].Index)
		}
	}
	l.mu.RLock()
	last, n := l.lastIndex(), len(l.segments)
	l.mu.RUnlock()
	switch next := entries[0].Index; {
	case n == 0 || next == last+1:
	case next > last+1:
		// Raft leaves a gap only behind a snapshot that covers it.
		if err := l.dropAll(); err != nil {
			return l.note(err)
		}
	case l.partial != 0 && next >= l.partial:
		if err := l.cutFrom(next); err != nil {
			return l.note(err)
		}
	default:
		return fmt.Errorf("entry %d is in the log, which ends with %d", next, last)
	}
	first := entries[0].Index
	for len(entries) > 0 {
		n, err := l.append(entries)
		if err != nil {
			if l.partial == 0 {
				l.partial = first
			}
			return l.note(err)
		}
		entries = entries[n:]
	}
	l.partial = 0
	return nil
}

// append writes as many entries as go into one segment and returns their number.
func (l *Log) append(entries []*raft.Log) (int, error) {
	s, err := l.tail(entries[0])
	if err != nil {
		return 0, err
	}
	l.buf = l.buf[:0]
	var offsets []int64
	for _, e := range entries {
		at := s.end + int64(len(l.buf))
		if at+recordSize(e) > s.size {
			break
		}
		offsets = append(offsets, at)
		l.buf = appendRecord(l.buf, s.seed, l.durable, e)
	}
	end := s.end + int64(len(l.buf))
	if over := s.dirty - end; over > 0 { // what an unfinished write left
		l.buf = append(l.buf, make([]byte, over)...)
	}
	s.dirty = max(s.dirty, end)
	if _, err := s.file.WriteAt(l.buf, s.end); err != nil {
		return 0, fmt.Errorf("write %s: %w", s.path, err)
	}
	if err := l.sync(int(s.file.Fd())); err != nil {
		return 0, fmt.Errorf("%w: fdatasync of %s: %w", ErrFailed, s.path, err)
	}
	if cap(l.buf) > cacheBytes {
		l.buf = nil
	}
	n := len(offsets)
	l.mu.Lock()
	s.offsets, s.end, s.dirty = append(s.offsets, offsets...), end, 0
	for _, e := range entries[:n] {
		l.cache.add(e)
	}
	l.mu.Unlock()
	l.durable = s.last()
	if s.end > s.size/2 {
		select {
		case l.spare <- struct{}{}:
		default:
		}
	}
	return n, nil
}

// tail returns the segment that takes an entry; it makes one if need be.
func (l *Log) tail(e *raft.Log) (*segment, error) {
	if n := len(l.segments); n > 0 {
		s := l.segments[n-1]
		if s.empty() && s.first != e.Index { // of an interrupted beginning
			if err := l.dropAll(); err != nil {
				return nil, err
			}
		} else if s.end+recordSize(e) <= s.size {
			return s, nil
		}
	}
	return l.begin(e.Index, max(l.size, headerSize+recordSize(e)))
}

// begin makes a segment whose first entry will have an index. It replaces what
// the log had from there on.
func (l *Log) begin(index uint64, size int64) (*segment, error) {
	l.spareMu.Lock()
	s, err := createSegment(l.dir, l.seq+1, index, size)
	l.spareMu.Unlock()
	if err != nil {
		return nil, fmt.Errorf("make a segment in %s: %w", l.dir, err)
	}
	l.seq++
	if err := l.supersede(s); err != nil {
		return nil, errors.Join(err, s.file.Close())
	}
	l.mu.Lock()
	l.segments = append(l.segments, s)
	l.mu.Unlock()
	return s, nil
}

// note classifies an error of the disk and remembers one that is final.
func (l *Log) note(err error) error {
	switch {
	case errors.Is(err, ErrFailed):
		l.failed = err
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	case errors.Is(err, unix.EIO):
		l.failed = fmt.Errorf("%w: %w", ErrFailed, err)
		return l.failed
	}
	return err
}

// DeleteRange implements raft.LogStore for a beginning or an end of the log.
func (l *Log) DeleteRange(low, high uint64) error {
	l.writeMu.Lock()
	defer l.writeMu.Unlock()
	if l.failed != nil {
		return l.failed
	}
	first, last := uint64(0), uint64(0)
	if len(l.segments) > 0 {
		first, last = l.segments[0].first, l.lastIndex()
	}
	switch {
	case low > high || last == 0 || high < first || low > last:
		return nil
	case low <= first && high >= last:
		return l.note(l.dropAll())
	case low <= first:
		return l.note(l.dropBelow(high + 1))
	case high >= last:
		return l.note(l.cutFrom(low))
	}
	return fmt.Errorf("delete entries %d to %d of %d to %d: neither the beginning nor the end", low, high, first, last)
}

// dropBelow removes the segments that lie wholly below an index, the oldest
// first, so that an interruption leaves no gap.
func (l *Log) dropBelow(index uint64) error {
	for len(l.segments) > 1 && l.segments[1].first <= index {
		if err := l.remove(0); err != nil {
			return err
		}
	}
	return syncDir(l.dir)
}

func (l *Log) dropAll() error {
	for len(l.segments) > 0 {
		if err := l.remove(0); err != nil {
			return err
		}
	}
	l.durable = 0
	return syncDir(l.dir)
}

// remove takes a segment away; its file becomes the spare one if there is none.
func (l *Log) remove(i int) error {
	s := l.segments[i]
	spare := filepath.Join(l.dir, spareName)
	var err error
	l.spareMu.Lock()
	if _, serr := os.Stat(spare); os.IsNotExist(serr) && s.size == l.size {
		err = os.Rename(s.path, spare)
	} else {
		err = os.Remove(s.path)
	}
	l.spareMu.Unlock()
	if err != nil && !os.IsNotExist(err) {
		return fmt.Errorf("remove %s: %w", s.path, err)
	}
	l.mu.Lock()
	l.segments = slices.Delete(l.segments, i, i+1)
	l.cache.drop(s.first, s.first+uint64(len(s.offsets)))
	l.mu.Unlock()
	return s.file.Close()
}

// cutFrom removes the entries from an index on: a new segment begins there.
func (l *Log) cutFrom(index uint64) error {
	l.mu.Lock()
	l.cache.drop(index, l.lastIndex()+1)
	l.mu.Unlock()
	if _, err := l.begin(index, l.size); err != nil {
		return err
	}
	l.durable = min(l.durable, index-1)
	return syncDir(l.dir)
}
