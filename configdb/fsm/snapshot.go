// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package fsm

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc64"
	"io"
	"maps"

	"github.com/tidwall/btree"
)

// snapshotMagic begins every snapshot; the format follows, as in log entries.
const snapshotMagic = "MUSTERS"

var crcTable = crc64.MakeTable(crc64.ECMA)

// ErrCorrupt is returned for a snapshot whose checksum or form is wrong.
var ErrCorrupt = errors.New("snapshot is corrupt")

// Snapshot is a consistent copy of the state that can be written while the
// state machine goes on.
type Snapshot struct {
	view     *View
	sessions map[[16]byte]*session
}

// Snapshot takes a copy: one pointer for the keys, and the small session table.
func (s *State) Snapshot() *Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	sessions := make(map[[16]byte]*session, len(s.sessions))
	for id, ses := range s.sessions {
		sessions[id] = &session{seen: ses.seen, done: ses.done, results: maps.Clone(ses.results)}
	}
	return &Snapshot{view: s.current.Load(), sessions: sessions}
}

// View returns the keys of the snapshot.
func (p *Snapshot) View() *View { return p.view }

// WriteTo writes the snapshot with a CRC-64 (ECMA) of everything before it.
func (p *Snapshot) WriteTo(w io.Writer) (int64, error) {
	sum := crc64.New(crcTable)
	cw := &countWriter{w: w}
	bw := bufio.NewWriterSize(io.MultiWriter(cw, sum), 1<<16)
	b := appendLevel([]byte(snapshotMagic), p.view.level)
	b = binary.AppendUvarint(b, p.view.revision)
	b = binary.AppendUvarint(b, p.view.term)
	b = binary.AppendVarint(b, p.view.time)
	b = binary.AppendUvarint(b, uint64(len(p.sessions)))
	for _, id := range sortedSessions(p.sessions) {
		b = appendSession(b, id, p.sessions[id])
	}
	b = binary.AppendUvarint(b, uint64(p.view.tree.Len()))
	if _, err := bw.Write(b); err != nil {
		return cw.n, err
	}
	var werr error
	p.view.tree.Scan(func(key string, it item) bool {
		b = appendString(b[:0], key)
		b = binary.AppendUvarint(b, uint64(len(it.value)))
		b = append(b, it.value...)
		b = binary.AppendUvarint(b, it.revision)
		b = binary.AppendUvarint(b, it.created)
		_, werr = bw.Write(b)
		return werr == nil
	})
	if werr != nil {
		return cw.n, werr
	}
	if err := bw.Flush(); err != nil {
		return cw.n, err
	}
	_, err := cw.Write(binary.BigEndian.AppendUint64(nil, sum.Sum64()))
	return cw.n, err
}

type countWriter struct {
	w io.Writer
	n int64
}

func (c *countWriter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	return n, err
}

func appendSession(b []byte, id [16]byte, ses *session) []byte {
	b = append(b, id[:]...)
	b = binary.AppendUvarint(b, ses.seen)
	b = binary.AppendUvarint(b, ses.done)
	b = binary.AppendUvarint(b, uint64(len(ses.results)))
	for _, seq := range sortedKeys(ses.results) {
		o := ses.results[seq]
		b = binary.AppendUvarint(b, seq)
		b = binary.AppendUvarint(b, o.Revision)
		b = append(b, byte(o.Status))
		b = binary.AppendUvarint(b, uint64(o.Failed))
		b = binary.AppendUvarint(b, o.Actual)
	}
	return b
}

// Restore replaces the whole state by a snapshot. The old state stays in force
// when the snapshot is corrupt.
func (s *State) Restore(r io.Reader) error {
	data, err := io.ReadAll(r)
	if err != nil {
		return fmt.Errorf("read snapshot: %w", err)
	}
	head := len(snapshotMagic) + 1 // with the format
	if len(data) < head+8 || string(data[:head-1]) != snapshotMagic {
		return fmt.Errorf("%w: no snapshot", ErrCorrupt)
	}
	if f := data[head-1]; f < Format || f > newest {
		return fmt.Errorf("%w: snapshot format %d", ErrUnknownFormat, f)
	}
	body, tail := data[:len(data)-8], data[len(data)-8:]
	if crc64.Checksum(body, crcTable) != binary.BigEndian.Uint64(tail) {
		return fmt.Errorf("%w: checksum does not match", ErrCorrupt)
	}
	d := decoder{b: body[head:]}
	level, err := d.level(data[head-1])
	if err != nil {
		return fmt.Errorf("read snapshot: %w", err)
	}
	v := &View{tree: new(btree.Map[string, item]), revision: d.uvarint(), term: d.uvarint(), time: d.varint()}
	sessions := d.sessions()
	last := ""
	for i := range d.count(1 << 30) {
		key := string(d.bytes(MaxKeyBytes))
		if i > 0 && key <= last {
			d.fail("keys out of order")
		}
		last = key
		it := item{value: bytes.Clone(d.bytes(MaxValueBytes)), revision: d.uvarint(), created: d.uvarint()}
		if d.err != nil {
			break
		}
		v.tree.Set(key, it)
		v.bytes += int64(len(key) + len(it.value))
	}
	if err := d.finish(); err != nil {
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tree, s.sessions, s.time, s.bytes, s.level = v.tree, sessions, v.time, v.bytes, level
	s.feed.reset(v.revision)
	s.publish(v.revision, v.term)
	s.feed.notifyAll()
	return nil
}

func (d *decoder) sessions() map[[16]byte]*session {
	out := map[[16]byte]*session{}
	for range d.count(1 << 24) {
		id := d.session()
		ses := &session{seen: d.uvarint(), done: d.uvarint(), results: map[uint64]Outcome{}}
		for range d.count(MaxSessionWindow) {
			seq := d.uvarint()
			o := Outcome{Revision: d.uvarint(), Status: OutcomeStatus(d.byte()), Failed: d.count(MaxTxnOps), Actual: d.uvarint()}
			if d.err != nil {
				return out
			}
			ses.results[seq] = o
		}
		if d.err != nil {
			return out
		}
		out[id] = ses
	}
	return out
}
