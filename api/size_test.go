// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"encoding/json"
	"math"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestParseSize(t *testing.T) {
	for in, want := range map[string]Size{
		"0": 0, "1": 1, "1048576": MiB, "512M": 512 * MiB, "512m": 512 * MiB, "512MB": 512 * MiB, "512 MiB": 512 * MiB,
		"1.5G": 3 * GiB / 2, " 20GiB ": 20 * GiB, "2T": 2 * TiB, "3k": 3 * KiB, "7b": 7, "007": 7, "0.5K": 512,
		"9223372036854775807": math.MaxInt64, "8191P": -1, "8388607T": 8388607 * TiB,
	} {
		got, err := ParseSize(in)
		if want < 0 {
			if err == nil {
				t.Errorf("%q: read as %d", in, got)
			}
			continue
		}
		if err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", in, got, err, want)
		}
	}
	for _, bad := range []string{
		"", " ", "M", "-1", "-1M", "+1", "1e3", "1e999", "0x10", "1.2.3", ".", ".M", "1..", "NaN", "Inf", "1 2", "1M2", "1Mi", "1MM",
		"9223372036854775808", "8388608T", "9e18", "99999999999999999999999999", "8589934592.0G", "١", "1\u00a0M\x00",
		strings.Repeat("9", 1<<16), strings.Repeat("z", 1<<16),
	} {
		got, err := ParseSize(bad)
		if err == nil {
			t.Errorf("%.20q: read as %d", bad, got)
		} else if len(err.Error()) > 300 {
			t.Errorf("the error repeats %d bytes of input", len(err.Error()))
		}
	}
}

func TestSizeString(t *testing.T) {
	for in, want := range map[Size]string{
		0: "0 B", 1: "1 B", 1023: "1023 B", KiB: "1 KiB", 1536: "1.5 KiB", 512 * MiB: "512 MiB", 3 * GiB / 2: "1.5 GiB",
		8 * TiB: "8 TiB", -5: "-5 B", math.MinInt64: "-9223372036854775808 B", math.MaxInt64: "8388608.0 TiB",
	} {
		if got := in.String(); got != want {
			t.Errorf("%d: %q, want %q", int64(in), got, want)
		}
	}
}

func TestSizeInJSON(t *testing.T) {
	for in, want := range map[string]Size{`1`: 1, `"1"`: 1, `"1.5K"`: 1536, `-7`: -7, `null`: 0, `9223372036854775807`: math.MaxInt64} {
		s := Size(99)
		if err := json.Unmarshal([]byte(in), &s); err != nil || s != want {
			t.Errorf("%s: %d, %v", in, s, err)
		}
	}
	for _, bad := range []string{`1.5`, `1e3`, `"x"`, `true`, `[]`, `{}`, `9223372036854775808`, `""`, `"-1"`} {
		s := Size(99)
		if err := json.Unmarshal([]byte(bad), &s); err == nil {
			t.Errorf("%s: read as %d", bad, s)
		} else if s != 99 {
			t.Errorf("%s: a refused size was set to %d", bad, s)
		}
	}
	for _, s := range []Size{0, 1, -1, math.MaxInt64, math.MinInt64} {
		b, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		var back Size
		if err := json.Unmarshal(b, &back); err != nil || back != s {
			t.Errorf("%d came back as %d (%v)", s, back, err)
		}
	}
}

// What a person reads in a reply may be typed again, within the rounding of
// one decimal.
func TestSizeStringReadsBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := Size(rapid.Int64Range(0, math.MaxInt64-int64(TiB)).Draw(t, "size"))
		back, err := ParseSize(s.String())
		if err != nil {
			t.Fatalf("%q: %v", s.String(), err)
		}
		if diff := math.Abs(float64(back - s)); diff > float64(s)*0.06 {
			t.Fatalf("%d reads back as %d", s, back)
		}
	})
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"", "1", "1.5G", "9223372036854775807", "8EiB", "0.000001T", "1.", ".5K", " 1 M "} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := ParseSize(s)
		if err != nil {
			return
		}
		if n < 0 {
			t.Fatalf("%q is %d", s, n)
		}
		if back, err := ParseSize(n.String()); n < 1<<52 && err != nil {
			t.Fatalf("%q is %d, shown as %q, not read again: %v %d", s, n, n.String(), err, back)
		}
	})
}
