// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"time"
)

// NewID returns a UUID of version 7 (RFC 9562 section 5.7): the first 48 bits
// are milliseconds since 1970 and the next 12 the fraction of the millisecond
// (section 6.2, method 3), so that identifiers sort by time of creation, also
// those of one request after the other.
func NewID() string {
	var b [16]byte
	// crypto/rand.Read never returns an error (it aborts the program instead).
	_, _ = rand.Read(b[8:])
	now := time.Now()
	var ms [8]byte
	binary.BigEndian.PutUint64(ms[:], uint64(now.UnixMilli()))
	copy(b[:6], ms[2:])
	const perMilli = int(time.Millisecond)
	fraction := uint16(now.Nanosecond() % perMilli * 4096 / perMilli)
	binary.BigEndian.PutUint16(b[6:8], 0x7000|fraction)
	b[8] = b[8]&0x3f | 0x80
	return formatUUID(b)
}

func formatUUID(b [16]byte) string {
	var out [36]byte
	hex.Encode(out[0:8], b[0:4])
	hex.Encode(out[9:13], b[4:6])
	hex.Encode(out[14:18], b[6:8])
	hex.Encode(out[19:23], b[8:10])
	hex.Encode(out[24:36], b[10:16])
	out[8], out[13], out[18], out[23] = '-', '-', '-', '-'
	return string(out[:])
}

// IsID reports whether s has the form of an object ID (a lower-case UUID).
// Names are DNS labels of at most 63 characters; a name may look like an ID
// only if it is one, so lookups try the ID first.
func IsID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		switch i {
		case 8, 13, 18, 23:
			if c != '-' {
				return false
			}
		default:
			if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
				return false
			}
		}
	}
	return true
}
