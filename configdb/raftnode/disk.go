// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/muster-vm/muster/configdb/raftlog"
)

// The log stores; see ADR 6.
const (
	// LogSegments is our own log of segment files, the default.
	LogSegments = "segments"
	// LogBolt keeps the log in bbolt (raft-boltdb), with the votes.
	LogBolt = "boltdb"
)

// Files and pauses of the disk.
const (
	stableFile = "raft.db" // votes; with LogBolt the log too
	segmentDir = "log"
	// spacePause is the wait between two tries to store a vote on a full disk.
	spacePause = 200 * time.Millisecond
	// spaceCheck is how often a node without space looks whether there is some.
	spaceCheck = 500 * time.Millisecond
	// spaceNeeded is how much must be free before a node takes entries again.
	spaceNeeded = 2 * raftlog.DefaultSegmentBytes
	// moveBatch is how many entries are moved at once to another log store.
	moveBatch = 256
)

// disk is everything that a node keeps on its disk for Raft. It decides what a
// failure of the disk means: a full one makes the node wait, with its log and
// votes as they were; every other failure is final, since what was written
// last is then unknown.
type disk struct {
	dir    string
	stable raft.StableStore
	log    raft.LogStore
	// monotonic: the log has no gaps.
	monotonic bool
	snapshots raft.SnapshotStore
	closers   []io.Closer

	onFatal func(error)
	onSpace func(full bool)
	closing <-chan struct{}

	// cut: the end of the log was removed and nothing stored since. Raft does not
	// know what its log ends with until the entries that replace it are stored.
	// Only Raft's main goroutine uses it.
	cut bool

	mu     sync.Mutex
	full   error
	filled chan struct{} // closed while full is set
}

// openDisk opens log and votes. Entries that an earlier start kept in the other
// log store are moved.
func openDisk(cfg Config, closing <-chan struct{}, logger hclog.Logger) (*disk, error) {
	d := &disk{dir: cfg.Dir, onFatal: cfg.OnFatal, closing: closing, filled: make(chan struct{})}
	if s := cfg.Storage; s != nil {
		d.stable, d.log, d.snapshots = s.Stable, s.Log, s.Snapshots
		if m, ok := s.Log.(raft.MonotonicLogStore); ok {
			d.monotonic = m.IsMonotonic()
		}
		return d, nil
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("raft directory: %w", err)
	}
	path := filepath.Join(cfg.Dir, stableFile)
	stable, err := raftboltdb.New(raftboltdb.Options{
		Path:        path,
		BoltOptions: &bbolt.Options{Timeout: boltOpenTimeout, FreelistType: bbolt.FreelistMapType},
	})
	if err != nil {
		return nil, fmt.Errorf("open raft votes %s: %w", path, err)
	}
	d.stable, d.closers = stable, []io.Closer{stable}
	if err := d.openLog(cfg, stable); err != nil {
		return nil, errors.Join(err, d.close())
	}
	if d.snapshots, err = raft.NewFileSnapshotStoreWithLogger(cfg.Dir, snapshotsKept, logger); err != nil {
		return nil, errors.Join(fmt.Errorf("open snapshots in %s: %w", cfg.Dir, err), d.close())
	}
	return d, nil
}

func (d *disk) openLog(cfg Config, bolt *raftboltdb.BoltStore) error {
	dir := filepath.Join(cfg.Dir, segmentDir)
	switch cfg.LogStore {
	case "", LogSegments:
		files, err := raftlog.Open(dir, 0)
		if err != nil {
			return fmt.Errorf("open raft log: %w%s", err, remedy(err))
		}
		d.log, d.monotonic, d.closers = files, true, append(d.closers, files)
		return move(bolt, files)
	case LogBolt:
		d.log = bolt
		if _, err := os.Stat(dir); os.IsNotExist(err) {
			return nil
		}
		files, err := raftlog.Open(dir, 0)
		if err != nil {
			return fmt.Errorf("open raft log: %w%s", err, remedy(err))
		}
		return errors.Join(move(files, bolt), files.Close())
	}
	return fmt.Errorf("logStore: %q is not known; use %s or %s", cfg.LogStore, LogSegments, LogBolt)
}

// remedy says what to do about a damaged log.
func remedy(err error) string {
	if !errors.Is(err, raftlog.ErrCorrupt) {
		return ""
	}
	return "; the other nodes have these entries: remove this node (muster node remove), empty its data directory and join it again"
}

// move copies a log that an earlier start kept elsewhere, and only then removes
// it there; interrupted, it begins again.
func move(from, to raft.LogStore) error {
	first, err1 := from.FirstIndex()
	last, err2 := from.LastIndex()
	have, err3 := to.LastIndex()
	if err := errors.Join(err1, err2, err3); err != nil {
		return fmt.Errorf("move the raft log: %w", err)
	}
	if last == 0 {
		return nil
	}
	for at := max(first, have+1); at <= last; {
		var batch []*raft.Log
		for ; at <= last && len(batch) < moveBatch; at++ {
			l := new(raft.Log)
			if err := from.GetLog(at, l); err != nil {
				return fmt.Errorf("move entry %d of the raft log: %w", at, err)
			}
			batch = append(batch, l)
		}
		if err := to.StoreLogs(batch); err != nil {
			return fmt.Errorf("move the raft log: %w", err)
		}
	}
	if err := from.DeleteRange(first, last); err != nil {
		return fmt.Errorf("move the raft log: %w", err)
	}
	return nil
}

func (d *disk) close() error {
	var errs []error
	for _, c := range d.closers {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// cached returns the log as Raft reads it.
func (d *disk) cached() (raft.LogStore, error) {
	if _, bolt := d.log.(*raftboltdb.BoltStore); !bolt {
		return d, nil
	}
	return raft.NewLogCache(logCache, d)
}

// noSpace reports whether an error says that the disk is full.
func noSpace(err error) bool {
	return errors.Is(err, raftlog.ErrNoSpace) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}

// Full returns why this node takes no entries, or nil, and a channel that is
// closed when, or because, it takes none.
func (d *disk) Full() (error, <-chan struct{}) { //nolint:staticcheck // the error is the value here
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.full, d.filled
}

func (d *disk) note(err error) {
	d.mu.Lock()
	was := d.full
	d.full = err
	switch {
	case was == nil && err != nil:
		close(d.filled)
	case was != nil && err == nil:
		d.filled = make(chan struct{})
	}
	d.mu.Unlock()
	if (was == nil) != (err == nil) && d.onSpace != nil {
		d.onSpace(err != nil)
	}
}

// free returns how many bytes may be written.
func (d *disk) free() (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(d.dir, &st); err != nil {
		return 0, err
	}
	return st.Bavail * uint64(st.Bsize), nil //nolint:gosec // a block has a positive size
}

// check settles what a failed call means. A failure that is final ends this
// goroutine, which is Raft's: it must neither go on nor bring the process down
// before the daemon has said why.
func (d *disk) check(what string, err error) error {
	switch {
	case err == nil:
		return nil
	case noSpace(err):
		d.note(err)
		return err
	}
	err = fmt.Errorf("%s: %w%s", what, err, remedy(err))
	d.onFatal(err)
	<-d.closing
	runtime.Goexit()
	return err
}

// FirstIndex implements raft.LogStore.
func (d *disk) FirstIndex() (uint64, error) { return d.log.FirstIndex() }

// LastIndex implements raft.LogStore.
func (d *disk) LastIndex() (uint64, error) { return d.log.LastIndex() }

// IsMonotonic implements raft.MonotonicLogStore.
func (d *disk) IsMonotonic() bool { return d.monotonic }

// GetLog implements raft.LogStore.
func (d *disk) GetLog(index uint64, l *raft.Log) error {
	err := d.log.GetLog(index, l)
	if errors.Is(err, raft.ErrLogNotFound) {
		return err
	}
	return d.check("read the raft log", err)
}

// StoreLog implements raft.LogStore.
func (d *disk) StoreLog(l *raft.Log) error { return d.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore.
func (d *disk) StoreLogs(logs []*raft.Log) error {
	write := func() error { return d.log.StoreLogs(logs) }
	var err error
	if d.cut {
		err = d.store("write the raft log", write)
	} else {
		err = d.check("write the raft log", write())
	}
	if err == nil {
		d.cut = false
	}
	if full, _ := d.Full(); err == nil && full != nil {
		d.note(nil)
	}
	return err
}

// DeleteRange implements raft.LogStore.
func (d *disk) DeleteRange(low, high uint64) error {
	last, err := d.log.LastIndex()
	if err != nil {
		return err
	}
	suffix := high >= last
	err = d.check("cut the raft log", d.log.DeleteRange(low, high))
	if first, ferr := d.log.FirstIndex(); err == nil && ferr == nil && suffix && first > 0 {
		d.cut = true
	}
	return err
}

// store keeps trying while the disk is full: Raft would end the process, and a
// node that cannot remember its vote must not give it. To the others it is
// silent meanwhile.
func (d *disk) store(what string, f func() error) error {
	for {
		err := d.check(what, f())
		if err == nil {
			return nil
		}
		select {
		case <-time.After(spacePause):
		case <-d.closing:
			runtime.Goexit()
		}
	}
}

// Set implements raft.StableStore.
func (d *disk) Set(key, value []byte) error {
	return d.store("write raft's votes", func() error { return d.stable.Set(key, value) })
}

// SetUint64 implements raft.StableStore.
func (d *disk) SetUint64(key []byte, value uint64) error {
	return d.store("write raft's term", func() error { return d.stable.SetUint64(key, value) })
}

// Get implements raft.StableStore.
func (d *disk) Get(key []byte) ([]byte, error) { return d.stable.Get(key) }

// GetUint64 implements raft.StableStore.
func (d *disk) GetUint64(key []byte) (uint64, error) { return d.stable.GetUint64(key) }
