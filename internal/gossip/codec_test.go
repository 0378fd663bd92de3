// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package gossip

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

var fullSummary = Summary{
	CPUPercent: 99.9, MemoryFree: math.MaxUint64, MemoryTotal: math.MaxUint64, DiskFree: math.MaxUint64, DiskTotal: math.MaxUint64,
	DiskFull: true, Revision: math.MaxUint64, VMs: math.MaxUint64, Version: strings.Repeat("v", maxVersionBytes), FeatureLevel: math.MaxUint64,
}

func TestSummariesComeBack(t *testing.T) {
	t.Parallel()
	for name, s := range map[string]Summary{
		"nothing measured": {CPUPercent: -1},
		"an idle CPU":      {},
		"usual":            {CPUPercent: 12.3, MemoryFree: 5 << 30, MemoryTotal: 16 << 30, DiskFree: 1 << 40, DiskTotal: 2 << 40, Revision: 12345, VMs: 20, Version: "1.2.3", FeatureLevel: 4},
		"largest":          fullSummary,
	} {
		b := s.encode()
		if got, err := decodeSummary(b); err != nil || got != s {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		if len(b) > MaxSummaryBytes {
			t.Errorf("%s: %d bytes", name, len(b))
		}
		if name == "usual" {
			t.Logf("a usual summary has %d bytes, its record %d", len(b), len((&record{id: api.NewID(), number: uint64(time.Now().UnixMilli()), summary: b}).encode()))
		}
	}
	odd := Summary{CPUPercent: 250, Version: strings.Repeat("ä", 40) + "\xff"}
	got, err := decodeSummary(odd.encode())
	if err != nil || got.CPUPercent != 100 || got.Version != strings.Repeat("ä", 32) {
		t.Errorf("odd values: %+v, %v", got, err)
	}
}

// A later version may add fields; an older one skips them.
func TestSummaryOfALaterVersion(t *testing.T) {
	t.Parallel()
	s := Summary{CPUPercent: 5, Version: "2.0"}
	b := []byte{summaryFormat, tagCPU, 50, 33, 7, tagVersion, 3, '2', '.', '0', 200, 2, 'x', 'y'}
	if got, err := decodeSummary(b); err != nil || got != s {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := decodeSummary([]byte{2}); !errors.Is(err, errLater) {
		t.Errorf("another format: %v", err)
	}
}

func TestMalformedSummaries(t *testing.T) {
	t.Parallel()
	for name, b := range map[string][]byte{
		"empty":              {},
		"too long":           make([]byte, MaxSummaryBytes+1),
		"a tag alone":        {1, tagCPU},
		"an endless number":  append([]byte{1, tagCPU}, bytes.Repeat([]byte{0xff}, 11)...),
		"tags not ascending": {1, tagVMs, 1, tagVMs, 1},
		"text beyond":        {1, tagVersion, 4, 'a'},
		"text too long":      append([]byte{1, tagVersion, maxVersionBytes + 1}, bytes.Repeat([]byte{'a'}, maxVersionBytes+1)...),
		"no text":            {1, tagVersion, 1, 0xff},
		"tag zero":           {1, 0, 0},
	} {
		if s, err := decodeSummary(b); err == nil {
			t.Errorf("%s: taken as %+v", name, s)
		}
	}
}

func TestRecordsAndStatesComeBack(t *testing.T) {
	t.Parallel()
	r := record{id: strings.Repeat("i", maxIDBytes), number: math.MaxUint64, summary: fullSummary.encode()}
	got, err := decodeRecord(r.encode())
	if err != nil || !reflect.DeepEqual(got, r) {
		t.Errorf("%+v, %v", got, err)
	}
	list := []aged{{r, 1500 * time.Millisecond}, {record{id: "b", number: 1, summary: []byte{1}}, 0}}
	back, err := decodeState(encodeState(list))
	if err != nil || !reflect.DeepEqual(back, list) {
		t.Errorf("%+v, %v", back, err)
	}
	back, err = decodeState(encodeState([]aged{{r, -time.Hour}, {r, 100 * maxAge}}))
	if err != nil || back[0].age != 0 || back[1].age != maxAge {
		t.Errorf("odd ages: %v, %v", back, err)
	}
	// What a later version says of one node does not hide the others.
	b := append([]byte{stateFormat}, 0, 3, 9, 9, 9)
	b = append(b, encodeState(list)[1:]...)
	if back, err = decodeState(b); err != nil || len(back) != 2 {
		t.Errorf("with a later record: %d, %v", len(back), err)
	}
}

func TestMalformedRecords(t *testing.T) {
	t.Parallel()
	for name, b := range map[string][]byte{
		"empty": {}, "short": {1}, "another format": {2, 1, 'a', 1}, "no ID": {1, 0, 1, 1}, "ID beyond": {1, 9, 'a', 1},
		"long ID": append([]byte{1, maxIDBytes + 1}, make([]byte, maxIDBytes+5)...), "no number": {1, 1, 'a'}, "too long": make([]byte, maxRecordBytes+1),
	} {
		if r, err := decodeRecord(b); err == nil {
			t.Errorf("record, %s: taken as %+v", name, r)
		}
	}
	one := (&record{id: "a", number: 1, summary: []byte{1}}).encode()
	many := []byte{stateFormat}
	for range maxRecords + 1 {
		many = append(append(many, 0, byte(len(one))), one...)
	}
	for name, b := range map[string][]byte{
		"empty": {}, "another format": {2}, "age alone": {1, 5}, "length beyond": {1, 0, 200, 1, 1, 1}, "huge length": append([]byte{1, 0}, bytes.Repeat([]byte{0xff}, 9)...),
		"too old": binary.AppendUvarint([]byte{1}, math.MaxUint64), "bad record": {1, 0, 2, 1, 0}, "too many": many,
	} {
		if l, err := decodeState(b); err == nil {
			t.Errorf("state, %s: taken as %d records", name, len(l))
		}
	}
}

func FuzzSummary(f *testing.F) {
	f.Add(fullSummary.encode())
	f.Add((&Summary{}).encode())
	f.Add([]byte{1, 33, 7, 200, 2, 'x', 'y'})
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := decodeSummary(b)
		if err != nil {
			return
		}
		again, err := decodeSummary(s.encode())
		if err != nil || again != s {
			t.Errorf("%+v became %+v, %v", s, again, err)
		}
	})
}

func FuzzState(f *testing.F) {
	r := record{id: "node", number: 77, summary: fullSummary.encode()}
	f.Add(r.encode())
	f.Add(encodeState([]aged{{r, time.Second}, {r, 0}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := decodeRecord(b); err == nil {
			if again, err := decodeRecord(r.encode()); err != nil || !reflect.DeepEqual(again, r) {
				t.Errorf("%+v became %+v, %v", r, again, err)
			}
		}
		if l, err := decodeState(b); err == nil {
			if again, err := decodeState(encodeState(l)); err != nil || !reflect.DeepEqual(again, l) {
				t.Errorf("%+v became %+v, %v", l, again, err)
			}
		}
	})
}

func TestOutbox(t *testing.T) {
	t.Parallel()
	members := 3
	o := &outbox{members: func() int { return members }}
	if got := o.take(2, 1000); got != nil {
		t.Errorf("an empty one gave %q", got)
	}
	// Of the same length, and put while the other is on its way.
	o.put("a", []byte("aaaa"))
	counts := map[string]int{}
	count := func(limit int) (n int) {
		for _, m := range o.take(2, limit) {
			counts[string(m)]++
			n++
		}
		return n
	}
	count(1000)
	o.put("b", []byte("bbbb"))
	o.put("a", []byte("AAAA"))
	if n := count(6); n != 1 {
		t.Errorf("%d messages of 4+2 bytes in 6", n)
	}
	for count(1000) > 0 {
	}
	want := timesPassedOn(members)
	if counts["AAAA"] != want || counts["bbbb"] != want || counts["aaaa"] != 1 {
		t.Errorf("sent %v, want %d each", counts, want)
	}
	// With little room the one that was sent least often goes first.
	members = 200
	for _, id := range []string{"c", "d", "e"} {
		o.put(id, []byte(id))
	}
	var order []string
	for range 6 {
		for _, m := range o.take(0, 1) {
			order = append(order, string(m))
		}
	}
	if got := strings.Join(order, ""); got != "edccde" {
		t.Errorf("order %s", got)
	}
}
