// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/raft"
)

// Whatever happened to a segment on the disk, opening it gives an error that
// names the file, or a log whose entries are those that were written; it never
// ends the process and never makes an entry up.
func FuzzOpen(f *testing.F) {
	const entries, size = 5, 4096
	f.Add(headerSize+recordHead, byte(1), size)
	f.Add(0, byte(0xff), size)
	f.Add(-1, byte(0), size-3)
	f.Add(-1, byte(0), headerSize+50)
	f.Add(-1, byte(0), 7)
	f.Add(-1, byte(0), 186) // within the padding of a record
	written := filepath.Join(f.TempDir(), "log")
	l, err := Open(written, size)
	if err != nil {
		f.Fatal(err)
	}
	for i := uint64(1); i <= entries; i++ {
		if err := l.StoreLog(entry(i, 1, strings.Repeat("d", int(i)))); err != nil {
			f.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		f.Fatal(err)
	}
	names, err := filepath.Glob(filepath.Join(written, "*"+suffix))
	if err != nil || len(names) == 0 {
		f.Fatalf("%v, %v", names, err)
	}
	whole, err := os.ReadFile(names[0])
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, at int, flip byte, length int) {
		b := bytes.Clone(whole)
		if at >= 0 && at < len(b) {
			b[at] ^= flip
		}
		b = b[:min(max(length, 0), len(b))]
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(names[0])), b, 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := Open(dir, size)
		if err != nil {
			if !strings.Contains(err.Error(), filepath.Base(names[0])) {
				t.Fatalf("the error does not name the file: %v", err)
			}
			return
		}
		defer func() { _ = l.Close() }()
		last, err := l.LastIndex()
		if err != nil || last > entries {
			t.Fatalf("the log ends at %d, %v", last, err)
		}
		for i := uint64(1); i <= last; i++ {
			var e raft.Log
			err := l.GetLog(i, &e)
			if err != nil && !errors.Is(err, raft.ErrLogNotFound) {
				t.Fatal(err)
			}
			if err == nil && (e.Index != i || string(e.Data) != strings.Repeat("d", int(i))) {
				t.Fatalf("entry %d is %+v", i, e)
			}
		}
	})
}

// FuzzPayload is FuzzParse with checksums that are right, or no payload would
// ever be looked at.
func FuzzPayload(f *testing.F) {
	whole := appendRecord(nil, 7, 3, entry(4, 2, "data"))
	f.Add(whole[recordHead:recordHead+payloadFixed+4], uint64(7))
	f.Add(bytes.Repeat([]byte{0xff}, payloadFixed), uint64(0))
	f.Fuzz(func(t *testing.T, payload []byte, seed uint64) {
		b := binary.LittleEndian.AppendUint32(nil, uint32(len(payload))) //nolint:gosec // of the fuzzer
		b = binary.LittleEndian.AppendUint32(b, checksum(seed, b, payload))
		b = append(b, payload...)
		r, ok := parse(b, seed)
		if !ok {
			return
		}
		var e raft.Log
		r.decode(&e)
		if again := appendRecord(nil, seed, r.durable, &e); !bytes.Equal(again[:len(b)], b) {
			t.Fatalf("record %x is encoded again as %x", b, again)
		}
	})
}
