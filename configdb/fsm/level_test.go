// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package fsm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc64"
	"testing"

	"github.com/muster-vm/muster/internal/version"
)

// at is a command of a level.
func at(level int) Command {
	c := put("k", "v", RequestID{})
	c.Level = level
	return c
}

// Level 1 is written as it always was, so that software which never heard of
// levels reads it.
func TestLevelOneHasTheFormatOfOld(t *testing.T) {
	zero, one := at(0), at(1)
	if b := one.Encode(); b[0] != 1 || !bytes.Equal(b, zero.Encode()) {
		t.Errorf("an entry of level 1 is %x, one of level 0 %x", b, zero.Encode())
	}
	s := New()
	apply(t, s, entry{5, 1, one})
	if b := snapshotOf(t, s); b[len(snapshotMagic)] != 1 || s.View().LogLevel() != 1 {
		t.Errorf("a snapshot of level %d has format %d", s.View().LogLevel(), b[len(snapshotMagic)])
	}
	c, err := DecodeCommand(one.Encode())
	if err != nil || c.Level != 1 {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestTheLevelStaysInTheState(t *testing.T) {
	if version.FeatureLevel < 2 {
		two := at(2)
		if _, err := DecodeCommand(two.Encode()); !errors.Is(err, ErrUnknownFormat) || errors.Is(err, ErrNewerLevel) {
			t.Errorf("software of level 1 has an opinion about formats that it cannot know: %v", err)
		}
		return
	}
	one := at(1)
	for _, level := range []byte{0, 1} { // no version writes them
		if _, err := DecodeCommand(append([]byte{FormatLevel, level}, one.Encode()[1:]...)); !errors.Is(err, ErrMalformed) {
			t.Errorf("level %d in the later format: %v", level, err)
		}
	}
	s := New()
	apply(t, s, entry{5, 1, at(2)})
	apply(t, s, entry{6, 1, at(1)}) // was proposed before the raise was applied
	if l := s.View().LogLevel(); l != 2 {
		t.Fatalf("level %d", l)
	}
	b := snapshotOf(t, s)
	if b[len(snapshotMagic)] != FormatLevel {
		t.Fatalf("the snapshot has format %d", b[len(snapshotMagic)])
	}
	r := New()
	if err := r.Restore(bytes.NewReader(b)); err != nil || r.View().LogLevel() != 2 || !bytes.Equal(snapshotOf(t, r), b) {
		t.Errorf("restored with level %d, %v", r.View().LogLevel(), err)
	}
	r.Skip(7, 1)
	if l := r.View().LogLevel(); l != 2 {
		t.Errorf("level %d after an entry without changes", l)
	}
}

// A snapshot of a level that is not supported changes nothing.
func TestASnapshotOfAHigherLevelIsRefused(t *testing.T) {
	s := New()
	apply(t, s, entry{5, 1, at(1)})
	before := snapshotOf(t, s)
	for _, level := range []byte{version.FeatureLevel + 1, 0, 1} {
		b := append([]byte(snapshotMagic), FormatLevel, level, 9, 9, 0, 0, 0)
		b = binary.BigEndian.AppendUint64(b, crc64.Checksum(b, crcTable))
		want := ErrMalformed
		if level > 1 || version.FeatureLevel < 2 {
			want = ErrUnknownFormat
		}
		if err := s.Restore(bytes.NewReader(b)); !errors.Is(err, want) || !bytes.Equal(snapshotOf(t, s), before) {
			t.Errorf("level %d: %v", level, err)
		}
	}
}
