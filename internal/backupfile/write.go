// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package backupfile

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/muster-vm/muster/internal/pki"
)

// seal is the state of the chunks' encryption, the same for writing and reading.
type seal struct {
	aead   cipher.AEAD
	bound  []byte // hash of magic and header
	number uint64
}

func newSeal(clusterKey, salt, head []byte) (*seal, error) {
	key, err := fileKey(clusterKey, salt)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(head)
	return &seal{aead: aead, bound: sum[:]}, nil
}

// nonce of the next chunk. It repeats for no other chunk under this key: the
// number rises, and there is one last chunk.
func (s *seal) nonce(last bool) []byte {
	n := make([]byte, s.aead.NonceSize())
	binary.BigEndian.PutUint64(n[3:], s.number)
	if last {
		n[len(n)-1] = 1
	}
	s.number++
	return n
}

// Writer makes a backup. Only after Close returned nil is it one.
type Writer struct {
	out    io.Writer
	sum    hash.Hash
	seal   *seal
	buf    []byte
	closed bool
}

// NewWriter writes the header and returns a writer for the content. It sets
// Salt and KeyID of the header.
func NewWriter(out io.Writer, h *Header, clusterKey []byte) (*Writer, error) {
	h.Salt, h.KeyID = pki.NewSecret(saltBytes), KeyID(clusterKey)
	return newWriter(out, h, clusterKey)
}

func newWriter(out io.Writer, h *Header, clusterKey []byte) (*Writer, error) {
	if err := h.check(); err != nil {
		return nil, err
	}
	head, err := h.encode()
	if err != nil {
		return nil, err
	}
	w := &Writer{sum: sha256.New(), buf: make([]byte, 0, MaxChunk)}
	if w.seal, err = newSeal(clusterKey, h.Salt, head); err != nil {
		return nil, err
	}
	w.out = io.MultiWriter(out, w.sum)
	if _, err := w.out.Write(head); err != nil {
		return nil, fmt.Errorf("write backup: %w", err)
	}
	return w, nil
}

// Write implements io.Writer.
func (w *Writer) Write(p []byte) (int, error) {
	if w.closed {
		return 0, errors.New("write backup: it is closed")
	}
	n := len(p)
	for len(p) > 0 {
		if len(w.buf) == MaxChunk { // there is more, so this is not the last
			if err := w.flush(false); err != nil {
				return n - len(p), err
			}
		}
		take := min(len(p), MaxChunk-len(w.buf))
		w.buf = append(w.buf, p[:take]...)
		p = p[take:]
	}
	return n, nil
}

func (w *Writer) flush(last bool) error {
	b := make([]byte, lenBytes, lenBytes+MaxChunk+w.seal.aead.Overhead())
	b = w.seal.aead.Seal(b, w.seal.nonce(last), w.buf, w.seal.bound)
	binary.BigEndian.PutUint32(b, uint32(len(b)-lenBytes))
	w.buf = w.buf[:0]
	if _, err := w.out.Write(b); err != nil {
		return fmt.Errorf("write backup: %w", err)
	}
	return nil
}

// Close writes the last chunk and the checksum. It does not close the file.
func (w *Writer) Close() error {
	if w.closed {
		return nil
	}
	w.closed = true
	if err := w.flush(true); err != nil {
		return err
	}
	if _, err := w.out.Write(make([]byte, lenBytes)); err != nil {
		return fmt.Errorf("write backup: %w", err)
	}
	if _, err := w.out.Write(w.sum.Sum(nil)); err != nil {
		return fmt.Errorf("write backup: %w", err)
	}
	return nil
}
