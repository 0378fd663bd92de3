// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftlog

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The header of a segment: magic with the format in its last byte, sequence,
// index of the first entry, seed, and the CRC-32C of these. A segment with a
// higher sequence replaces all that the earlier ones have from its first index
// on: so the end of the log is cut in one step.
const (
	headerSize = 40
	magic      = "MUSTERL\x01"
	suffix     = ".log"
	spareName  = "spare.tmp"
	zeroChunk  = 1 << 20
	// shrinkPart: a segment of which less than this part is free is full.
	shrinkPart = 8
)

// segment is one file of the log. Its offsets are guarded by Log.mu.
type segment struct {
	file    *os.File
	path    string
	seq     uint64
	first   uint64 // index of the first entry
	seed    uint64
	size    int64
	offsets []int64 // of the entries first, first+1, …
	end     int64   // of the last record
	dirty   int64   // beyond end: how far an unfinished write may have come
}

func (s *segment) last() uint64 { return s.first + uint64(len(s.offsets)) - 1 }

func (s *segment) empty() bool { return len(s.offsets) == 0 }

// limit is where the record of an entry ends.
func (s *segment) limit(index uint64) int64 {
	if i := index - s.first + 1; i < uint64(len(s.offsets)) {
		return s.offsets[i]
	}
	return s.end
}

// trim takes away, in memory, the entries from an index on.
func (s *segment) trim(index uint64) {
	if index <= s.last() && index >= s.first {
		s.end = s.offsets[index-s.first]
		s.offsets = s.offsets[:index-s.first]
	}
}

// shrink gives back the space behind the last entry of a segment that takes no
// more, because a newer one on the disk follows it. Without this every change of
// leader that cuts the log would cost a whole segment until the next snapshot. A
// segment that is merely full stays as it is: its file is used again.
func (s *segment) shrink() {
	if s.size-s.end < s.size/shrinkPart {
		return
	}
	if err := s.file.Truncate(s.end); err == nil { // else it is tried at the next opening
		s.size = s.end
	}
}

func segmentName(seq uint64) string { return fmt.Sprintf("%016x%s", seq, suffix) }

func seqOf(name string) (uint64, bool) {
	hex, ok := strings.CutSuffix(name, suffix)
	if !ok || len(hex) != 16 {
		return 0, false
	}
	seq, err := strconv.ParseUint(hex, 16, 64)
	return seq, err == nil
}

// makeSpare makes a file of zeros of a segment's size, whose space is thereby
// taken, under a name that is no segment's.
func makeSpare(dir string, size int64) error {
	path := filepath.Join(dir, spareName)
	if st, err := os.Stat(path); err == nil && st.Size() == size {
		return nil
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	zeros := make([]byte, zeroChunk)
	for at := int64(0); at < size && err == nil; at += zeroChunk {
		_, err = f.WriteAt(zeros[:min(zeroChunk, size-at)], at)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(path)
	}
	return err
}

// createSegment turns the spare file into the segment that begins with an entry.
func createSegment(dir string, seq, first uint64, size int64) (*segment, error) {
	if err := makeSpare(dir, size); err != nil {
		return nil, err
	}
	spare, path := filepath.Join(dir, spareName), filepath.Join(dir, segmentName(seq))
	f, err := os.OpenFile(spare, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	s := &segment{file: f, path: path, seq: seq, first: first, seed: newSeed(), size: size, end: headerSize}
	_, err = f.WriteAt(s.header(), 0)
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = os.Rename(spare, path)
	}
	if err == nil {
		err = syncDir(dir)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return s, nil
}

func newSeed() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return binary.LittleEndian.Uint64(b[:])
}

func (s *segment) header() []byte {
	b := append(make([]byte, 0, headerSize), magic...)
	b = binary.LittleEndian.AppendUint64(b, s.seq)
	b = binary.LittleEndian.AppendUint64(b, s.first)
	b = binary.LittleEndian.AppendUint64(b, s.seed)
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	return append(b, make([]byte, headerSize-len(b))...)
}

// openSegment reads a segment. What follows its last good record is the end of
// the log, or damage; only the caller can tell, by the rest that it gets.
func openSegment(path string, seq uint64) (s *segment, rest []byte, err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
		}
	}()
	data, err := io.ReadAll(f)
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", path, err)
	}
	s = &segment{file: f, path: path, seq: seq, size: int64(len(data)), end: headerSize}
	if len(data) < headerSize || !bytes.HasPrefix(data, []byte(magic[:len(magic)-1])) {
		return nil, nil, &CorruptError{Path: path, What: "the header is not that of a log segment"}
	}
	if data[len(magic)-1] != magic[len(magic)-1] {
		return nil, nil, fmt.Errorf("%s has format %d, which this version does not know; upgrade this node", path, data[len(magic)-1])
	}
	s.first, s.seed = binary.LittleEndian.Uint64(data[16:]), binary.LittleEndian.Uint64(data[24:])
	if !bytes.Equal(data[:headerSize], s.header()) {
		return nil, nil, &CorruptError{Path: path, What: "the header's checksum or sequence does not match"}
	}
	for {
		r, ok := parse(data[s.end:], s.seed)
		if !ok || r.index != s.first+uint64(len(s.offsets)) {
			return s, data[s.end:], nil
		}
		s.offsets = append(s.offsets, s.end)
		s.end = min(s.end+r.size, s.size) // of a file that was cut short, the padding may be missing
	}
}

// leftovers looks at what stands behind the last good record. Records of a torn
// write are left; if one proves that the missing ones had been acknowledged,
// they were damaged later.
func (s *segment) leftovers(rest []byte) (left, proof bool) {
	missing := s.first + uint64(len(s.offsets))
	for at := int64(0); at+recordHead <= int64(len(rest)); at += recordAlign {
		r, ok := parse(rest[at:], s.seed)
		left = left || ok
		if ok && r.durable >= missing && r.index > missing {
			return true, true
		}
	}
	return left, false
}

// wipe makes sure that no record stands behind the last one: after the next
// append it could seem to follow.
func (s *segment) wipe(rest []byte) error {
	if _, err := s.file.WriteAt(make([]byte, len(rest)), s.end); err != nil {
		return err
	}
	return unix.Fdatasync(int(s.file.Fd()))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
