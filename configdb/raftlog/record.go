// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftlog

import (
	"encoding/binary"
	"hash/crc32"
	"time"

	"github.com/hashicorp/raft"
)

// A record is:
//
//	length  uint32  of the payload
//	crc     uint32  CRC-32C of seed, length and payload
//	payload index, durable, term uint64 · type uint8 · appended int64 (Unix ns) ·
//	        extensions (uint32 length, bytes) · data
//	padding to 8 bytes
//
// The seed is the segment's own, so that what an earlier use of the file left
// behind is never taken for a record. Durable is the last index that was known
// to be on the disk when the record was written: it proves that what is
// missing before it was acknowledged.
const (
	recordHead    = 8
	payloadFixed  = 8 + 8 + 8 + 1 + 8 + 4
	recordAlign   = 8
	maxRecordData = 64 << 20 // of data and extensions; far beyond what configdb proposes
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func align(n int64) int64 { return (n + recordAlign - 1) &^ (recordAlign - 1) }

// recordSize is the space that an entry needs.
func recordSize(l *raft.Log) int64 {
	return align(recordHead + payloadFixed + int64(len(l.Extensions)) + int64(len(l.Data)))
}

// appendRecord appends the record of an entry.
func appendRecord(b []byte, seed uint64, durable uint64, l *raft.Log) []byte {
	start := len(b)
	n := payloadFixed + len(l.Extensions) + len(l.Data)
	b = binary.LittleEndian.AppendUint32(b, uint32(n)) //nolint:gosec // bounded by maxRecordData
	b = append(b, 0, 0, 0, 0)
	b = binary.LittleEndian.AppendUint64(b, l.Index)
	b = binary.LittleEndian.AppendUint64(b, durable)
	b = binary.LittleEndian.AppendUint64(b, l.Term)
	b = append(b, byte(l.Type))
	var at int64
	if !l.AppendedAt.IsZero() {
		at = l.AppendedAt.UnixNano()
	}
	b = binary.LittleEndian.AppendUint64(b, uint64(at))                //nolint:gosec // the same bits
	b = binary.LittleEndian.AppendUint32(b, uint32(len(l.Extensions))) //nolint:gosec // bounded by maxRecordData
	b = append(b, l.Extensions...)
	b = append(b, l.Data...)
	binary.LittleEndian.PutUint32(b[start+4:], checksum(seed, b[start:start+4], b[start+recordHead:]))
	for len(b)%recordAlign != 0 {
		b = append(b, 0)
	}
	return b
}

func checksum(seed uint64, length, payload []byte) uint32 {
	var s [8]byte
	binary.LittleEndian.PutUint64(s[:], seed)
	c := crc32.Update(0, castagnoli, s[:])
	c = crc32.Update(c, castagnoli, length)
	return crc32.Update(c, castagnoli, payload)
}

// record is what parse finds at the beginning of some bytes.
type record struct {
	index, durable, term uint64
	payload              []byte
	size                 int64 // with head and padding
}

// parse reads the record at the beginning of b; ok is false if there is none
// whose checksum is right.
func parse(b []byte, seed uint64) (r record, ok bool) {
	if len(b) < recordHead+payloadFixed {
		return r, false
	}
	n := int64(binary.LittleEndian.Uint32(b))
	if n < payloadFixed || n > int64(len(b))-recordHead {
		return r, false
	}
	payload := b[recordHead : recordHead+n]
	if binary.LittleEndian.Uint32(b[4:]) != checksum(seed, b[:4], payload) {
		return r, false
	}
	if ext := int64(binary.LittleEndian.Uint32(payload[payloadFixed-4:])); ext > n-payloadFixed {
		return r, false
	}
	return record{
		index:   binary.LittleEndian.Uint64(payload),
		durable: binary.LittleEndian.Uint64(payload[8:]),
		term:    binary.LittleEndian.Uint64(payload[16:]),
		payload: payload, size: align(recordHead + n),
	}, true
}

// decode fills an entry from a record. The entry shares the record's bytes.
func (r record) decode(l *raft.Log) {
	p := r.payload
	l.Index, l.Term, l.Type = r.index, r.term, raft.LogType(p[24])
	l.AppendedAt = time.Time{}
	if at := int64(binary.LittleEndian.Uint64(p[25:])); at != 0 { //nolint:gosec // the same bits
		l.AppendedAt = time.Unix(0, at)
	}
	ext := binary.LittleEndian.Uint32(p[33:])
	rest := p[payloadFixed:]
	l.Extensions, l.Data = nil, nil
	if ext > 0 {
		l.Extensions = rest[:ext:ext]
	}
	if int(ext) < len(rest) {
		l.Data = rest[ext:]
	}
}
