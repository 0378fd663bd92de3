// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storetest

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
)

// The steps of a disk, at each of which a node may crash.
const (
	stepLogWrite    = "log write"    // nothing of the entries is there yet
	stepLogSync     = "log sync"     // some of them are
	stepLogDone     = "log done"     // all of them are, and nobody knows
	stepLogCut      = "log cut"      // before entries are removed
	stepLogCutDone  = "log cut done" // after
	stepVote        = "vote"         // before a term or vote is there
	stepVoteDone    = "vote done"
	stepSnapBegin   = "snapshot begin"
	stepSnapWrite   = "snapshot write"
	stepSnapEnd     = "snapshot end" // all is written, nothing is there yet
	stepSnapDone    = "snapshot done"
	stepSnapRestore = "snapshot restore" // while it is read
)

// diskSteps are all of them.
var diskSteps = []string{
	stepLogWrite, stepLogSync, stepLogDone, stepLogCut, stepLogCutDone, stepVote, stepVoteDone,
	stepSnapBegin, stepSnapWrite, stepSnapEnd, stepSnapDone, stepSnapRestore,
}

// memDisk is what a node has on its disk. It outlives the node's crashes, but
// for what was not synced.
type memDisk struct {
	mu       sync.Mutex
	rng      *rand.Rand
	life     int
	dead     bool // crashed, and not yet begun anew
	full     bool
	logs     map[uint64]*raft.Log
	stable   map[string][]byte
	snaps    []*memSnapshot // oldest first
	snapSeq  int
	unsynced []*raft.Log
	counts   map[string]int
	// crashAt and crashIn: at that step, the node crashes the crashIn-th time.
	crashAt string
	crashIn int
	crashed chan<- int // told the life that ended
}

// Times that a disk takes.
const (
	syncFast, syncSlow = 500 * time.Microsecond, 4 * time.Millisecond
	snapChunk          = 512 // bytes between two steps of a snapshot
	snapsKept          = 2
	fullPause          = 50 * time.Millisecond
)

var (
	errNoSpace = fmt.Errorf("memory disk: %w", syscall.ENOSPC)
	errCrashed = errors.New("memory disk: the node has crashed")
)

type memSnapshot struct {
	meta raft.SnapshotMeta
	data []byte
}

func newMemDisk(rng *rand.Rand, crashed chan<- int) *memDisk {
	return &memDisk{
		rng: rng, logs: map[uint64]*raft.Log{}, stable: map[string][]byte{}, counts: map[string]int{}, crashed: crashed,
	}
}

// diskLife is the disk as one start of a node sees it. Once the node has
// crashed, whatever still calls is stopped where it is, and ends when the node
// is closed.
type diskLife struct {
	d       *memDisk
	life    int
	closing chan struct{}
	opened  bool // guarded by d.mu: crashes are for running nodes
}

// begin starts another life.
func (d *memDisk) begin() *diskLife {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.life++
	d.dead, d.unsynced = false, nil
	return &diskLife{d: d, life: d.life, closing: make(chan struct{})}
}

func (l *diskLife) running() {
	l.d.mu.Lock()
	defer l.d.mu.Unlock()
	l.opened = true
}

// arm makes the node crash the n-th time that it is at a step.
func (d *memDisk) arm(step string, n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.crashAt, d.crashIn = step, n
}

// setFull fills the disk, or makes room.
func (d *memDisk) setFull(full bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.full = full
}

// crash loses what was not synced, but for some of it.
func (d *memDisk) crash() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.die()
}

func (d *memDisk) die() {
	if d.dead {
		return
	}
	d.dead, d.crashAt = true, ""
	if len(d.unsynced) > 0 {
		for _, e := range d.unsynced[:d.rng.IntN(len(d.unsynced)+1)] {
			d.logs[e.Index] = e
		}
		d.unsynced = nil
	}
	d.crashed <- d.life // has room
}

// at passes a step, or ends there. It is called without the lock, and returns
// with it.
func (l *diskLife) at(step string) {
	if l.try(step) != nil {
		runtime.Goexit()
	}
}

// try is at for a goroutine that must clean up: it gets an error once the node
// is closed.
func (l *diskLife) try(step string) error {
	d := l.d
	d.mu.Lock()
	if d.life == l.life && !d.dead && l.opened {
		d.counts[step]++
		if d.crashAt == step {
			if d.crashIn--; d.crashIn <= 0 {
				d.die()
			}
		}
	}
	if d.life == l.life && !d.dead {
		return nil
	}
	d.mu.Unlock()
	<-l.closing
	return errCrashed
}

// pass is at for a step that needs no lock.
func (l *diskLife) pass(step string) {
	l.at(step)
	l.d.mu.Unlock()
}

// FirstIndex implements raft.LogStore.
func (l *diskLife) FirstIndex() (uint64, error) {
	return l.edge(func(a, b uint64) bool { return a < b })
}

// LastIndex implements raft.LogStore.
func (l *diskLife) LastIndex() (uint64, error) {
	return l.edge(func(a, b uint64) bool { return a > b })
}

func (l *diskLife) edge(better func(a, b uint64) bool) (uint64, error) {
	l.d.mu.Lock()
	defer l.d.mu.Unlock()
	out := uint64(0)
	for i := range l.d.logs {
		if out == 0 || better(i, out) {
			out = i
		}
	}
	return out, nil
}

// GetLog implements raft.LogStore.
func (l *diskLife) GetLog(index uint64, out *raft.Log) error {
	l.d.mu.Lock()
	defer l.d.mu.Unlock()
	e := l.d.logs[index]
	if e == nil {
		return raft.ErrLogNotFound
	}
	*out = *e
	return nil
}

// StoreLog implements raft.LogStore.
func (l *diskLife) StoreLog(e *raft.Log) error { return l.StoreLogs([]*raft.Log{e}) }

// StoreLogs implements raft.LogStore: the entries are there after a sync, which
// takes a while, and of which any part may have happened at a crash.
func (l *diskLife) StoreLogs(entries []*raft.Log) error {
	l.at(stepLogWrite)
	d := l.d
	if d.full {
		d.mu.Unlock()
		return errNoSpace
	}
	for _, e := range entries {
		copied := *e
		copied.Data = bytes.Clone(e.Data)
		d.unsynced = append(d.unsynced, &copied)
	}
	if first := entries[0].Index; len(d.logs) > 0 && d.logs[first-1] == nil {
		d.mu.Unlock()
		panic(fmt.Sprintf("entry %d is written behind a gap", first))
	}
	took := syncFast + time.Duration(d.rng.Int64N(int64(syncSlow-syncFast)))
	d.mu.Unlock()
	time.Sleep(took)
	l.at(stepLogSync)
	for _, e := range d.unsynced {
		d.logs[e.Index] = e
	}
	d.unsynced = nil
	d.mu.Unlock()
	l.pass(stepLogDone)
	return nil
}

// DeleteRange implements raft.LogStore.
func (l *diskLife) DeleteRange(low, high uint64) error {
	l.at(stepLogCut)
	for i := range l.d.logs {
		if i >= low && i <= high {
			delete(l.d.logs, i)
		}
	}
	l.d.mu.Unlock()
	l.pass(stepLogCutDone)
	return nil
}

// Set implements raft.StableStore.
//
// On a full disk it waits, as raftnode does: a node must not vote without
// remembering it.
func (l *diskLife) Set(key, value []byte) error {
	l.pass(stepVote)
	time.Sleep(syncFast)
	l.at(stepVote)
	for l.d.full {
		l.d.mu.Unlock()
		time.Sleep(fullPause)
		l.at(stepVote)
	}
	l.d.stable[string(key)] = bytes.Clone(value)
	l.d.mu.Unlock()
	l.pass(stepVoteDone)
	return nil
}

// Get implements raft.StableStore.
func (l *diskLife) Get(key []byte) ([]byte, error) {
	l.d.mu.Lock()
	defer l.d.mu.Unlock()
	return bytes.Clone(l.d.stable[string(key)]), nil
}

// SetUint64 implements raft.StableStore.
func (l *diskLife) SetUint64(key []byte, v uint64) error { return l.Set(key, fmt.Append(nil, v)) }

// GetUint64 implements raft.StableStore.
func (l *diskLife) GetUint64(key []byte) (uint64, error) {
	b, err := l.Get(key)
	if err != nil || len(b) == 0 {
		return 0, err
	}
	var v uint64
	_, err = fmt.Sscan(string(b), &v)
	return v, err
}

// memSink receives a snapshot.
type memSink struct {
	l    *diskLife
	snap *memSnapshot
	done bool
}

// Create implements raft.SnapshotStore.
func (l *diskLife) Create(version raft.SnapshotVersion, index, term uint64, c raft.Configuration, cIndex uint64, _ raft.Transport) (raft.SnapshotSink, error) {
	l.at(stepSnapBegin)
	defer l.d.mu.Unlock()
	if l.d.full {
		return nil, errNoSpace
	}
	l.d.snapSeq++
	return &memSink{l: l, snap: &memSnapshot{meta: raft.SnapshotMeta{
		Version: version, ID: fmt.Sprintf("%d-%d-%d", term, index, l.d.snapSeq), Index: index, Term: term, Configuration: c.Clone(), ConfigurationIndex: cIndex,
	}}}, nil
}

// Write implements io.Writer.
func (s *memSink) Write(b []byte) (int, error) {
	for rest := b; len(rest) > 0; {
		if err := s.l.try(stepSnapWrite); err != nil {
			return 0, err
		}
		s.l.d.mu.Unlock()
		k := min(len(rest), snapChunk)
		s.snap.data = append(s.snap.data, rest[:k]...)
		rest = rest[k:]
		time.Sleep(syncFast)
	}
	return len(b), nil
}

// ID implements raft.SnapshotSink.
func (s *memSink) ID() string { return s.snap.meta.ID }

// Cancel implements raft.SnapshotSink.
func (s *memSink) Cancel() error {
	s.done = true
	return nil
}

// Close implements raft.SnapshotSink: the snapshot is there, or it is not.
func (s *memSink) Close() error {
	if s.done {
		return nil
	}
	s.done = true
	s.l.pass(stepSnapEnd)
	time.Sleep(syncFast)
	s.l.at(stepSnapEnd)
	d := s.l.d
	s.snap.meta.Size = int64(len(s.snap.data))
	d.snaps = append(d.snaps, s.snap)
	slices.SortStableFunc(d.snaps, func(a, b *memSnapshot) int {
		return cmp.Or(cmp.Compare(a.meta.Term, b.meta.Term), cmp.Compare(a.meta.Index, b.meta.Index))
	})
	if extra := len(d.snaps) - snapsKept; extra > 0 {
		d.snaps = d.snaps[extra:]
	}
	d.mu.Unlock()
	s.l.pass(stepSnapDone)
	return nil
}

// List implements raft.SnapshotStore, newest first.
func (l *diskLife) List() ([]*raft.SnapshotMeta, error) {
	l.d.mu.Lock()
	defer l.d.mu.Unlock()
	var out []*raft.SnapshotMeta
	for _, s := range l.d.snaps {
		meta := s.meta
		out = append(out, &meta)
	}
	slices.Reverse(out)
	return out, nil
}

// Open implements raft.SnapshotStore.
func (l *diskLife) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	l.d.mu.Lock()
	defer l.d.mu.Unlock()
	for _, s := range l.d.snaps {
		if s.meta.ID == id {
			meta := s.meta
			return &meta, &restoring{l: l, r: bytes.NewReader(s.data)}, nil
		}
	}
	return nil, nil, fmt.Errorf("snapshot %s: %w", id, io.ErrUnexpectedEOF)
}

// restoring reads a snapshot; each read is a step.
type restoring struct {
	l *diskLife
	r *bytes.Reader
}

// Read implements io.Reader.
func (r *restoring) Read(b []byte) (int, error) {
	if err := r.l.try(stepSnapRestore); err != nil {
		return 0, err
	}
	r.l.d.mu.Unlock()
	return r.r.Read(b[:min(len(b), snapChunk)])
}

// Close implements io.Closer.
func (r *restoring) Close() error { return nil }
