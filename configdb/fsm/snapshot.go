// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package fsm

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
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
// when the snapshot is corrupt. It reads piece by piece: a copy of the whole beside
// the state would cost as much memory again, at the worst moment.
func (s *State) Restore(r io.Reader) error {
	v, sessions, _, err := readSnapshot(r, nil)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tree, s.sessions, s.time, s.bytes, s.level = v.tree, sessions, v.time, v.bytes, v.level
	s.feed.reset(v.revision)
	s.publish(v.revision, v.term)
	s.feed.notifyAll()
	return nil
}

// Content is what a snapshot has.
type Content struct {
	// Keys and Bytes count all keys, as View.Len and View.Bytes do.
	Keys  int
	Bytes int64
}

// Survey reads a snapshot to its end and checks all of it, as Restore does, but
// keeps only the keys that are wished for.
func Survey(r io.Reader, keep func(key []byte) bool) (*View, Content, error) {
	v, _, c, err := readSnapshot(r, keep)
	return v, c, err
}

// readSnapshot decodes a snapshot; keep chooses keys, nil all.
func readSnapshot(r io.Reader, keep func(key []byte) bool) (*View, map[[16]byte]*session, Content, error) {
	w := &window{r: r, sum: crc64.New(crcTable)}
	v, sessions, c, err := w.snapshot(keep)
	if err != nil {
		return nil, nil, Content{}, err
	}
	return v, sessions, c, nil
}

func (w *window) snapshot(keep func(key []byte) bool) (v *View, sessions map[[16]byte]*session, c Content, err error) {
	if err := w.fill(); err != nil {
		return nil, nil, c, err
	}
	head := len(snapshotMagic) + 1 // with the format
	if len(w.d.b) < head || string(w.d.b[:head-1]) != snapshotMagic {
		return nil, nil, c, fmt.Errorf("%w: no snapshot", ErrCorrupt)
	}
	format := w.d.b[head-1]
	w.d.b = w.d.b[head:]
	if format < Format || format > newest {
		return nil, nil, c, fmt.Errorf("%w: snapshot format %d", ErrUnknownFormat, format)
	}
	level, err := w.d.level(format)
	if err != nil {
		return nil, nil, c, w.close(fmt.Errorf("read snapshot: %w", err))
	}
	v = &View{tree: new(btree.Map[string, item]), level: level, revision: w.d.uvarint(), term: w.d.uvarint(), time: w.d.varint()}
	if sessions, err = w.sessions(); err != nil {
		return nil, nil, c, err
	}
	var last []byte
	for i := range w.d.count(1 << 30) {
		if err := w.fill(); err != nil {
			return nil, nil, c, err
		}
		key := w.d.bytes(MaxKeyBytes)
		if i > 0 && bytes.Compare(key, last) <= 0 {
			w.d.fail("keys out of order")
		}
		last = append(last[:0], key...)
		value := w.d.bytes(MaxValueBytes)
		it := item{revision: w.d.uvarint(), created: w.d.uvarint()}
		if w.d.err != nil {
			break
		}
		c.Keys, c.Bytes = c.Keys+1, c.Bytes+int64(len(key)+len(value))
		if keep != nil && !keep(key) {
			continue
		}
		it.value = bytes.Clone(value) // the window moves on
		v.tree.Set(string(key), it)
		v.bytes += int64(len(key) + len(value))
	}
	return v, sessions, c, w.close(nil)
}

// Sizes of a window, in bytes. An entry is a key with its value, or a session
// with its results.
const (
	entryMost   = MaxKeyBytes + MaxValueBytes + 1<<10
	windowFirst = 16 << 10
	windowFull  = 2 * entryMost
	sealBytes   = crc64.Size
)

// window is a decoder over a part of a stream. The last bytes of the stream are
// the seal and not shown to it.
type window struct {
	r     io.Reader
	sum   hash.Hash64 // of what was shown
	d     decoder
	buf   []byte
	end   int // of what was read into buf
	held  int // of these, not shown
	ended bool
}

// fill shows the decoder at least one whole entry, unless the stream ends.
func (w *window) fill() error {
	for !w.ended && len(w.d.b) < entryMost && w.d.err == nil {
		left := len(w.d.b)
		rest := w.buf[w.end-w.held-left : w.end]
		switch {
		case w.buf == nil:
			w.buf = make([]byte, windowFirst)
		case len(w.buf) < windowFull:
			w.buf = make([]byte, windowFull)
		}
		n := copy(w.buf, rest)
		m, err := io.ReadFull(w.r, w.buf[n:])
		w.ended = errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !w.ended {
			return fmt.Errorf("read snapshot: %w", err)
		}
		w.end = n + m
		w.held = min(sealBytes, w.end)
		shown := w.buf[:w.end-w.held]
		_, _ = w.sum.Write(shown[min(left, len(shown)):]) // a hash never fails
		w.d.b = shown
	}
	return nil
}

// close reads to the end and says whether all was well: what is worst comes
// first, a broken seal, then what was found wrong, then what the decoder met.
func (w *window) close(wrong error) error {
	if wrong == nil {
		if err := w.fill(); err != nil {
			return err
		}
		if err := w.d.finish(); err != nil {
			wrong = fmt.Errorf("%w: %w", ErrCorrupt, err)
		}
	}
	for w.d.b, w.d.err = nil, nil; !w.ended; w.d.b = nil {
		if err := w.fill(); err != nil {
			return err
		}
	}
	if w.held < sealBytes || w.sum.Sum64() != binary.BigEndian.Uint64(w.buf[w.end-sealBytes:w.end]) {
		return fmt.Errorf("%w: checksum does not match", ErrCorrupt)
	}
	return wrong
}

func (w *window) sessions() (map[[16]byte]*session, error) {
	out := map[[16]byte]*session{}
	for range w.d.count(1 << 24) {
		if err := w.fill(); err != nil {
			return nil, err
		}
		id, ses := w.d.sessionEntry()
		if w.d.err != nil {
			break // close says so
		}
		out[id] = ses
	}
	return out, nil
}

func (d *decoder) sessionEntry() ([16]byte, *session) {
	id := d.session()
	ses := &session{seen: d.uvarint(), done: d.uvarint(), results: map[uint64]Outcome{}}
	for range d.count(MaxSessionWindow) {
		seq := d.uvarint()
		o := Outcome{Revision: d.uvarint(), Status: OutcomeStatus(d.byte()), Failed: d.count(MaxTxnOps), Actual: d.uvarint()}
		if d.err != nil {
			break
		}
		ses.results[seq] = o
	}
	return id, ses
}
