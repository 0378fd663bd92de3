// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package backupfile

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/muster-vm/muster/api"
)

// sealOverhead is what sealing adds to a chunk: the tag of GCM.
const sealOverhead = 16

// ReadHeader reads only the header. Nothing of the file is checked.
func ReadHeader(r io.Reader) (*Header, error) {
	h, _, err := readHeader(r)
	return h, err
}

// Verify reads a file to its end and checks its form and its checksum, which
// needs no key. It returns the header and the size.
func Verify(r io.Reader) (*Header, int64, error) {
	f := newFrames(r)
	h, _, err := readHeader(f)
	if err != nil {
		return nil, f.size, err
	}
	chunks := 0
	for {
		b, err := f.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, f.size, err
		}
		if len(b) < sealOverhead {
			return nil, f.size, damaged("a chunk has only %d bytes", len(b))
		}
		chunks++
	}
	if chunks == 0 {
		return nil, f.size, damaged("it has no content")
	}
	return h, f.size, nil
}

// frames takes a file apart and hashes it.
type frames struct {
	in   io.Reader
	sum  hash.Hash
	size int64
	buf  []byte
}

func newFrames(r io.Reader) *frames {
	return &frames{in: r, sum: sha256.New(), buf: make([]byte, MaxChunk+sealOverhead)}
}

// Read implements io.Reader for the header.
func (f *frames) Read(p []byte) (int, error) {
	n, err := f.in.Read(p)
	f.sum.Write(p[:n])
	f.size += int64(n)
	return n, err
}

// next returns the next chunk, valid until the next call. At the end it checks
// the checksum, and that nothing follows, and returns io.EOF.
func (f *frames) next() ([]byte, error) {
	var head [lenBytes]byte
	if _, err := io.ReadFull(f, head[:]); err != nil {
		return nil, cut(err)
	}
	n := binary.BigEndian.Uint32(head[:])
	if n == 0 {
		return nil, f.end()
	}
	if n > uint32(len(f.buf)) {
		return nil, damaged("a chunk would have %d bytes", n)
	}
	if _, err := io.ReadFull(f, f.buf[:n]); err != nil {
		return nil, cut(err)
	}
	return f.buf[:n], nil
}

func (f *frames) end() error {
	want := f.sum.Sum(nil)
	got := make([]byte, sha256.Size)
	if _, err := io.ReadFull(f, got); err != nil {
		return cut(err)
	}
	if !bytes.Equal(got, want) {
		return damaged("its checksum does not match")
	}
	switch n, err := io.ReadFull(f, make([]byte, 1)); {
	case n > 0:
		return damaged("there is something after its end")
	case !errors.Is(err, io.EOF):
		return cut(err)
	}
	return io.EOF
}

// Reader returns the content of a backup.
type Reader struct {
	Header *Header
	frames *frames
	seal   *seal
	plain  []byte
	last   bool
	err    error
}

// NewReader reads the header and asks for the cluster key that opens the file.
func NewReader(r io.Reader, key func(*Header) ([]byte, error)) (*Reader, error) {
	f := newFrames(r)
	h, head, err := readHeader(f)
	if err != nil {
		return nil, err
	}
	clusterKey, err := key(h)
	if err != nil {
		return nil, err
	}
	s, err := newSeal(clusterKey, h.Salt, head)
	if err != nil {
		return nil, err
	}
	if id := KeyID(clusterKey); id != h.KeyID {
		return nil, api.Errorf(api.CodeInvalid, "%w: it needs the cluster key %s of cluster %s, this is key %s; give the file cluster.key of a node of that cluster", ErrKey, h.KeyID, h.Cluster, id)
	}
	return &Reader{Header: h, frames: f, seal: s}, nil
}

// Read implements io.Reader. It returns io.EOF only after the last chunk and
// the checksum were found to be right.
func (r *Reader) Read(p []byte) (int, error) {
	for len(r.plain) == 0 && r.err == nil {
		r.plain, r.err = r.open()
	}
	if len(r.plain) > 0 {
		n := copy(p, r.plain)
		r.plain = r.plain[n:]
		return n, nil
	}
	return 0, r.err
}

// open returns the next chunk.
func (r *Reader) open() ([]byte, error) {
	b, err := r.frames.next()
	if errors.Is(err, io.EOF) && !r.last {
		return nil, forged("its last part is missing")
	}
	if err != nil {
		return nil, err
	}
	if r.last {
		return nil, forged("there is a part after the last")
	}
	number := r.seal.number
	plain, err := r.seal.aead.Open(nil, r.seal.nonce(false), b, r.seal.bound)
	if err == nil {
		return plain, nil
	}
	r.seal.number = number
	if plain, err = r.seal.aead.Open(nil, r.seal.nonce(true), b, r.seal.bound); err != nil {
		return nil, forged(fmt.Sprintf("part %d does not open", number+1))
	}
	r.last = true
	return plain, nil
}

func forged(what string) error {
	return api.Errorf(api.CodeChecksum, "%w, or its bytes are damaged: %s; use another backup", ErrForged, what)
}
