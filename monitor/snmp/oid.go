// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package snmp

import (
	"encoding/hex"
	"slices"
	"strconv"
	"strings"
)

// The numbers of MUSTER-MIB; see MUSTER-MIB.txt.
const (
	// Enterprise is a placeholder: RFC 5612 sets it aside for documentation.
	Enterprise = 32473
	root       = "1.3.6.1.4.1.32473.7600"
	cluster    = root + ".1.1"
	nodeEntry  = root + ".1.2.1"
	vmEntry    = root + ".1.3.1"
	alertEntry = root + ".1.4.1"

	// The notifications and what they carry.
	NotifyFiring   = root + ".0.1"
	NotifyResolved = root + ".0.2"
	ClusterName    = cluster + ".1.0"
	alertRule      = alertEntry + ".2"
	alertSeverity  = alertEntry + ".3"
	alertPhase     = alertEntry + ".4"
	alertTarget    = alertEntry + ".5"
	alertMessage   = alertEntry + ".6"
	alertSince     = alertEntry + ".7"

	// SysUpTime and TrapOID begin every notification (RFC 3416 section 4.2.6).
	SysUpTime = "1.3.6.1.2.1.1.3.0"
	TrapOID   = "1.3.6.1.6.3.1.1.4.1.0"

	sysDescr    = "1.3.6.1.2.1.1.1.0"
	sysObjectID = "1.3.6.1.2.1.1.2.0"
	sysName     = "1.3.6.1.2.1.1.5.0"

	// The counters that reports carry (RFC 3414 section 5).
	usmUnsupportedLevel = "1.3.6.1.6.3.15.1.1.1.0"
	usmNotInWindow      = "1.3.6.1.6.3.15.1.1.2.0"
	usmUnknownUser      = "1.3.6.1.6.3.15.1.1.3.0"
	usmUnknownEngine    = "1.3.6.1.6.3.15.1.1.4.0"
	usmWrongDigest      = "1.3.6.1.6.3.15.1.1.5.0"
)

// MaxText is the longest text in bytes (DisplayString, RFC 2579).
const MaxText = 255

// maxSubIDs is how many numbers a name may have (RFC 3416 section 4.1).
const maxSubIDs = 128

// oid is a name as numbers.
type oid []uint32

// parseOID reads "1.3.6" or ".1.3.6".
func parseOID(s string) (oid, bool) {
	parts := strings.Split(strings.TrimPrefix(s, "."), ".")
	if len(parts) > maxSubIDs {
		return nil, false
	}
	out := make(oid, 0, len(parts))
	for _, p := range parts {
		n, err := strconv.ParseUint(p, 10, 32)
		if err != nil {
			return nil, false
		}
		out = append(out, uint32(n))
	}
	return out, true
}

func compareOID(a, b oid) int { return slices.Compare(a, b) }

// index returns the 16 bytes of a UUID as the index of a row.
func index(id string) (string, bool) {
	b, err := hex.DecodeString(strings.ReplaceAll(id, "-", ""))
	if err != nil || len(b) != 16 {
		return "", false
	}
	var out strings.Builder
	for _, c := range b {
		out.WriteByte('.')
		out.WriteString(strconv.Itoa(int(c)))
	}
	return out.String(), true
}

// text makes a DisplayString: bytes that a terminal shows, at most MaxText.
func text(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		if r > 0x7e {
			return '?'
		}
		return r
	}, s)
	if len(s) > MaxText {
		s = s[:MaxText-3] + "..."
	}
	return s
}
