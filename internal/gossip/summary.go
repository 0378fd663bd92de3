// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package gossip

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"unicode/utf8"
)

// Limits of a summary.
const (
	// MaxSummaryBytes is the longest encoding of a summary.
	MaxSummaryBytes = 512
	// maxVersionBytes is the longest version; a longer one is cut.
	maxVersionBytes = 64
	// summaryFormat is the first byte. Fields are added without changing it.
	summaryFormat = 1
)

// The fields on the wire: a tag, then a number (uvarint) or, from firstText on, a
// length and text. Tags ascend; those that are not known are skipped.
const (
	tagCPU         = 1 // tenths of a percent
	tagMemoryFree  = 2
	tagMemoryTotal = 3
	tagDiskFree    = 4
	tagDiskTotal   = 5
	tagDiskFull    = 6
	tagRevision    = 7
	tagVMs         = 8
	tagLevel       = 9
	firstText      = 64
	tagVersion     = 64
)

// Summary is what a node says of itself. What it did not measure is zero, but for
// the CPU.
type Summary struct {
	// CPUPercent is the busy share of all CPUs, 0 to 100; negative if not measured.
	CPUPercent float64
	// MemoryFree and MemoryTotal of the host, DiskFree and DiskTotal of the file
	// system of its data directory, in bytes.
	MemoryFree, MemoryTotal uint64
	DiskFree, DiskTotal     uint64
	// DiskFull says that the configuration database takes no entries there.
	DiskFull bool
	// Revision that the node has applied.
	Revision uint64
	// VMs that run there.
	VMs uint64
	// Version of the daemon and the feature level that it supports.
	Version      string
	FeatureLevel uint64
}

// encode returns at most MaxSummaryBytes.
func (s *Summary) encode() []byte {
	b := []byte{summaryFormat}
	number := func(tag byte, v uint64) {
		if v > 0 {
			b = binary.AppendUvarint(append(b, tag), v)
		}
	}
	if s.CPUPercent >= 0 { // zero is a measurement
		b = binary.AppendUvarint(append(b, tagCPU), uint64(math.Round(10*min(s.CPUPercent, 100))))
	}
	number(tagMemoryFree, s.MemoryFree)
	number(tagMemoryTotal, s.MemoryTotal)
	number(tagDiskFree, s.DiskFree)
	number(tagDiskTotal, s.DiskTotal)
	if s.DiskFull {
		number(tagDiskFull, 1)
	}
	number(tagRevision, s.Revision)
	number(tagVMs, s.VMs)
	number(tagLevel, s.FeatureLevel)
	if v := clipText(s.Version, maxVersionBytes); v != "" {
		b = binary.AppendUvarint(append(b, tagVersion), uint64(len(v)))
		b = append(b, v...)
	}
	return b
}

// clipText cuts text to a number of bytes, between characters.
func clipText(s string, most int) string {
	for len(s) > most {
		_, n := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-n]
	}
	return s
}

var (
	errMalformed = errors.New("malformed")
	errLater     = errors.New("of a later version")
)

// decodeSummary reads a summary of this or a later version.
func decodeSummary(b []byte) (Summary, error) {
	s := Summary{CPUPercent: -1}
	if len(b) == 0 || len(b) > MaxSummaryBytes {
		return s, fmt.Errorf("decode summary of %d bytes: %w", len(b), errMalformed)
	}
	if b[0] != summaryFormat {
		return s, fmt.Errorf("decode summary: format %d: %w", b[0], errLater)
	}
	b = b[1:]
	last := byte(0)
	for len(b) > 0 {
		tag := b[0]
		v, n := binary.Uvarint(b[1:])
		if tag <= last || n <= 0 {
			return s, fmt.Errorf("decode summary: field %d: %w", tag, errMalformed)
		}
		b, last = b[1+n:], tag
		var text []byte
		if tag >= firstText {
			if v > uint64(len(b)) {
				return s, fmt.Errorf("decode summary: field %d: %w", tag, errMalformed)
			}
			text, b = b[:v], b[v:]
		}
		if err := s.set(tag, v, text); err != nil {
			return s, err
		}
	}
	return s, nil
}

func (s *Summary) set(tag byte, v uint64, text []byte) error {
	switch tag {
	case tagCPU:
		s.CPUPercent = float64(min(v, 1000)) / 10
	case tagMemoryFree:
		s.MemoryFree = v
	case tagMemoryTotal:
		s.MemoryTotal = v
	case tagDiskFree:
		s.DiskFree = v
	case tagDiskTotal:
		s.DiskTotal = v
	case tagDiskFull:
		s.DiskFull = v != 0
	case tagRevision:
		s.Revision = v
	case tagVMs:
		s.VMs = v
	case tagLevel:
		s.FeatureLevel = v
	case tagVersion:
		if len(text) > maxVersionBytes || !utf8.Valid(text) {
			return fmt.Errorf("decode summary: version: %w", errMalformed)
		}
		s.Version = string(text)
	}
	return nil
}
