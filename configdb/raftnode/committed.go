// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/hashicorp/raft"
)

// What was committed. Raft forgets at its end how far its log was committed and
// learns it from the next leader. A node that starts while there is none would
// show the state of its last snapshot, which may be nothing at all: nobody could
// log in to the one node that is left and look. So each node notes now and then
// how far it had come, and applies that much of its log when it starts.
//
// The note is never ahead of what was committed; it may be late, since it is
// not synced. It names the term of the entry too: a log that has another entry
// in its place is not the log that it was written for.

const (
	committedFile  = "committed"
	committedPause = 250 * time.Millisecond
	committedMagic = "MUSTERC\x01"
	committedSize  = 28  // magic, index, term, CRC-32C
	committedSlot  = 512 // two slots are written in turns: one torn write leaves the other
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// committed is the note of a node.
type committed struct {
	file *os.File
	turn int64
	last uint64
}

// openCommitted opens the note in a directory and returns what it says, 0 if
// nothing.
func openCommitted(dir string) (c *committed, index, term uint64, err error) {
	path := filepath.Join(dir, committedFile)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, 0, 0, fmt.Errorf("open the note of what was committed: %w", err)
	}
	c = &committed{file: f}
	for turn := range int64(2) {
		b := make([]byte, committedSize)
		if _, err := f.ReadAt(b, turn*committedSlot); err != nil {
			if errors.Is(err, io.EOF) {
				continue
			}
			return nil, 0, 0, errors.Join(fmt.Errorf("read %s: %w", path, err), f.Close())
		}
		if i, t, ok := decodeCommitted(b); ok && i > index {
			index, term, c.turn = i, t, 1-turn
		}
	}
	return c, index, term, nil
}

func encodeCommitted(index, term uint64) []byte {
	b := append(make([]byte, 0, committedSize), committedMagic...)
	b = binary.LittleEndian.AppendUint64(b, index)
	b = binary.LittleEndian.AppendUint64(b, term)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func decodeCommitted(b []byte) (index, term uint64, ok bool) {
	if len(b) != committedSize || string(b[:8]) != committedMagic || binary.LittleEndian.Uint32(b[24:]) != crc32.Checksum(b[:24], castagnoli) {
		return 0, 0, false
	}
	return binary.LittleEndian.Uint64(b[8:]), binary.LittleEndian.Uint64(b[16:]), true
}

// note writes down an entry.
func (c *committed) note(index, term uint64) error {
	if index == c.last {
		return nil
	}
	if _, err := c.file.WriteAt(encodeCommitted(index, term), c.turn*committedSlot); err != nil {
		return fmt.Errorf("note what was committed: %w", err)
	}
	c.last, c.turn = index, 1-c.turn
	return nil
}

// noteCommitted keeps the note until the node closes.
func (n *Node) noteCommitted() {
	for {
		select {
		case <-n.fsm.advanced:
		case <-n.closing:
			return
		}
		select {
		case <-time.After(committedPause):
		case <-n.closing:
			return
		}
		n.noteApplied()
	}
}

// noteApplied notes the last entry that was applied, which was committed.
func (n *Node) noteApplied() {
	var e raft.Log
	index := n.raft.AppliedIndex()
	// Without the disk's verdict on a failure: nothing depends on this.
	if index == 0 || n.disk.log.GetLog(index, &e) != nil {
		return // a snapshot has it
	}
	if err := n.committed.note(index, e.Term); err != nil && !noSpace(err) {
		n.warnCommitted(err)
	}
}

// warnCommitted tells of a failure, which costs nothing but the knowledge that
// the note is for.
func (n *Node) warnCommitted(err error) {
	n.log.Warn("the configuration database cannot note what was committed", "err", err)
}

// applyCommitted lets Raft apply what was committed when this node ended: an
// AppendEntries without entries and without a leader says so, of an entry that
// the log has.
func (n *Node) applyCommitted(index, term uint64) {
	var e raft.Log
	if index <= n.raft.AppliedIndex() || n.disk.log.GetLog(index, &e) != nil || e.Term != term {
		return
	}
	_ = n.tell(context.Background(), &raft.AppendEntriesRequest{ // fails only when the node closes
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax},
		Term:      n.raft.CurrentTerm(), PrevLogEntry: index, PrevLogTerm: term, LeaderCommitIndex: index,
	})
}
