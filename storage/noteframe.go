// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"

	"github.com/muster-vm/muster/api"
)

// The frame of a note, in bytes; numbers are big-endian:
//
//	 0  8  magic
//	 8  2  version
//	10  2  zero
//	12  4  length of the note
//	16  8  sequence
//	24 36  ID of the pool
//	60 36  ID of the node that wrote it
//	96 32  HMAC-SHA256 of the 96 bytes before and of the note
//	128    the note
const (
	noteMagic   = "mustrNOT"
	noteVersion = 1
	noteMACAt   = 96
	noteHead    = noteMACAt + sha256.Size
	noteIDSize  = 36

	// noteSlot is what one node has in a pool; noteBlock is what a write is a multiple
	// of, as O_DIRECT wants it.
	noteSlot  = 16 << 10
	noteBlock = 4 << 10
)

// NoteSize is the most that a note may have, in bytes.
const NoteSize = 15 << 10

// noteFrame makes the frame of a note, padded to a multiple of noteBlock.
func noteFrame(key []byte, poolID, nodeID string, sequence uint64, note []byte) []byte {
	size := (noteHead + len(note) + noteBlock - 1) / noteBlock * noteBlock
	b := make([]byte, size)
	copy(b, noteMagic)
	binary.BigEndian.PutUint16(b[8:], noteVersion)
	binary.BigEndian.PutUint32(b[12:], uint32(len(note)))
	binary.BigEndian.PutUint64(b[16:], sequence)
	copy(b[24:24+noteIDSize], poolID)
	copy(b[60:60+noteIDSize], nodeID)
	copy(b[noteHead:], note)
	copy(b[noteMACAt:], noteMAC(key, b[:noteMACAt], note))
	return b
}

func noteMAC(key, head, note []byte) []byte {
	m := hmac.New(sha256.New, key)
	m.Write(head)
	m.Write(note)
	return m.Sum(nil)
}

// framed is a note as it was read.
type framed struct {
	poolID, nodeID string
	sequence       uint64
	note           []byte
}

// errNoteTorn is what is said of a frame that cannot be trusted: it is read while it is
// written, or was written by halves, or by who has not got the cluster's key.
var errNoteTorn = api.Errorf(api.CodeChecksum, "the note is torn, damaged, or made by who has not got the cluster's key")

// openFrame reads a frame; nil, nil if there was never one. Of what it returns the MAC
// was right, so the cluster made it.
func openFrame(key, b []byte) (*framed, error) {
	if len(b) == 0 || len(b) >= noteHead && len(bytes.TrimLeft(b[:noteHead], "\x00")) == 0 {
		return nil, nil
	}
	if len(b) < noteHead || !bytes.HasPrefix(b, []byte(noteMagic)) {
		return nil, errNoteTorn
	}
	if v := binary.BigEndian.Uint16(b[8:]); v != noteVersion {
		return nil, api.Errorf(api.CodeUnsupported, "the note has format %d, and this software knows %d; see that all nodes have the same version", v, noteVersion)
	}
	n := binary.BigEndian.Uint32(b[12:])
	if n > NoteSize || int(n) > len(b)-noteHead {
		return nil, errNoteTorn
	}
	note := b[noteHead : noteHead+int(n)]
	if !hmac.Equal(noteMAC(key, b[:noteMACAt], note), b[noteMACAt:noteHead]) {
		return nil, errNoteTorn
	}
	return &framed{
		poolID: string(b[24 : 24+noteIDSize]), nodeID: string(b[60 : 60+noteIDSize]),
		sequence: binary.BigEndian.Uint64(b[16:]), note: append([]byte{}, note...),
	}, nil
}

// of returns the note if it is that of a node in a pool.
func (f *framed) of(poolID, nodeID string) ([]byte, error) {
	switch {
	case f.poolID != poolID:
		return nil, api.Errorf(api.CodeChecksum, "the note in the place of node %s is of another pool (%s)", nodeID, f.poolID)
	case f.nodeID != nodeID:
		return nil, api.Errorf(api.CodeChecksum, "the note in the place of node %s is that of node %s", nodeID, f.nodeID)
	}
	return f.note, nil
}
