// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Size is a number of bytes. In JSON it is written as an integer of bytes and
// read as one, or as a string with a binary suffix: "512M" and "512MiB" are
// 512 × 1024² bytes, as in QEMU and qemu-img.
type Size int64

// Binary multiples.
const (
	KiB Size = 1 << 10
	MiB Size = 1 << 20
	GiB Size = 1 << 30
	TiB Size = 1 << 40
)

var sizeUnits = map[string]Size{
	"": 1, "b": 1,
	"k": KiB, "kb": KiB, "kib": KiB,
	"m": MiB, "mb": MiB, "mib": MiB,
	"g": GiB, "gb": GiB, "gib": GiB,
	"t": TiB, "tb": TiB, "tib": TiB,
}

// ParseSize reads "1048576", "512M", "1.5G" or "20GiB".
func ParseSize(s string) (Size, error) {
	in := strings.TrimSpace(s)
	cut := len(in)
	for i := range len(in) {
		if c := in[i]; (c < '0' || c > '9') && c != '.' {
			cut = i
			break
		}
	}
	unit, ok := sizeUnits[strings.ToLower(strings.TrimSpace(in[cut:]))]
	if !ok || cut == 0 {
		return 0, fmt.Errorf("%q is not a size; write bytes or a number with K, M, G or T, such as 512M", clip(s))
	}
	if n, err := strconv.ParseInt(in[:cut], 10, 64); err == nil {
		if n > math.MaxInt64/int64(unit) {
			return 0, fmt.Errorf("%q is too large; the limit is 8 EiB", clip(s))
		}
		return Size(n) * unit, nil
	}
	f, err := strconv.ParseFloat(in[:cut], 64)
	if err != nil {
		return 0, fmt.Errorf("%q is not a size; write bytes or a number with K, M, G or T, such as 512M", clip(s))
	}
	if f *= float64(unit); f >= math.MaxInt64 {
		return 0, fmt.Errorf("%q is too large; the limit is 8 EiB", clip(s))
	}
	return Size(f), nil
}

// String returns the size with the largest binary unit that keeps it exact to
// one decimal, such as "512 MiB".
func (s Size) String() string {
	for _, u := range []struct {
		unit Size
		name string
	}{{TiB, "TiB"}, {GiB, "GiB"}, {MiB, "MiB"}, {KiB, "KiB"}} {
		if s >= u.unit {
			if s%u.unit == 0 {
				return fmt.Sprintf("%d %s", s/u.unit, u.name)
			}
			return fmt.Sprintf("%.1f %s", float64(s)/float64(u.unit), u.name)
		}
	}
	return fmt.Sprintf("%d B", int64(s))
}

// UnmarshalJSON accepts an integer of bytes or a string with a suffix.
func (s *Size) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '"' {
		var str string
		if err := json.Unmarshal(b, &str); err != nil {
			return err
		}
		n, err := ParseSize(str)
		if err != nil {
			return err
		}
		*s = n
		return nil
	}
	var n int64
	if err := json.Unmarshal(b, &n); err != nil {
		return fmt.Errorf("a size is an integer of bytes or a string such as \"512M\"")
	}
	*s = Size(n)
	return nil
}
