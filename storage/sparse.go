// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/muster-vm/muster/api"
)

// Files of volumes are copied byte by byte, and what was never written is not: a
// copy takes the space of the original, and has its internal snapshots.

// seekData is SEEK_DATA of lseek(2).
const seekData = 3

// piece is a part of a file.
type piece struct {
	at int64
	b  []byte
}

// pieces calls do for what is in a file of a size, in order, in pieces of at most
// chunkBytes.
func pieces(ctx context.Context, l *lane, f *os.File, size int64, do func(piece) error) error {
	for at := int64(0); at < size; {
		p, err := call(ctx, l, callDeadline, func() (piece, error) { return nextPiece(f, at, size) })
		if err != nil {
			return err
		}
		if len(p.b) == 0 {
			return nil
		}
		if !allZero(p.b) {
			if err := do(p); err != nil {
				return err
			}
		}
		at = p.at + int64(len(p.b))
	}
	return nil
}

// nextPiece reads what comes at or behind an offset; nothing at the end.
func nextPiece(f *os.File, at, size int64) (piece, error) {
	next, err := f.Seek(at, seekData)
	switch {
	case errors.Is(err, syscall.ENXIO): // a hole up to the end
		return piece{at: size}, nil
	case err == nil:
		at = next
	case !errors.Is(err, syscall.EINVAL): // a file system that does not tell has no holes for us
		return piece{}, err
	}
	b := make([]byte, min(chunkBytes, size-at))
	n, err := f.ReadAt(b, at)
	if n == len(b) {
		return piece{at, b}, nil
	}
	return piece{}, fmt.Errorf("the file ended at byte %d of %d: %w", at+int64(n), size, err)
}

// The frames that a file travels in: where its bytes belong (8 bytes, big endian),
// how many there are (4), the bytes. The last frame has none, and the size of the
// file.
const frameHead = 12

// writeFrame sends one piece of a file.
func writeFrame(w io.Writer, p piece) error {
	head := binary.BigEndian.AppendUint64(make([]byte, 0, frameHead), uint64(p.at))
	if _, err := w.Write(binary.BigEndian.AppendUint32(head, uint32(len(p.b)))); err != nil {
		return err
	}
	_, err := w.Write(p.b)
	return err
}

// readFrames calls do for the pieces of a file of a size, in order, up to its last
// frame. What does not belong to such a file is refused.
func readFrames(r io.Reader, size int64, do func(piece) error) error {
	var head [frameHead]byte
	bad := func(format string, args ...any) error {
		return api.Errorf(api.CodeIncomplete, "what arrives is not the file: "+format, args...)
	}
	for end := int64(0); ; {
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return fmt.Errorf("the file ended early: %w", err)
		}
		at, n := binary.BigEndian.Uint64(head[:]), int64(binary.BigEndian.Uint32(head[8:]))
		switch {
		case n == 0 && at == uint64(size):
			return nil
		case n == 0:
			return bad("its end is at %d instead of %d", at, size)
		case n > chunkBytes:
			return bad("a piece has %d bytes", n)
		case at < uint64(end) || at > uint64(size) || n > size-int64(at):
			return bad("a piece of %d bytes is at %d, behind %d, of %d", n, at, end, size)
		}
		p := piece{at: int64(at), b: make([]byte, n)}
		if _, err := io.ReadFull(r, p.b); err != nil {
			return fmt.Errorf("the file ended early: %w", err)
		}
		if err := do(p); err != nil {
			return err
		}
		end = p.at + n
	}
}
