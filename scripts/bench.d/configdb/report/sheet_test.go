// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package report

import (
	"encoding/json"
	"strings"
	"testing"
)

func sheet() *Sheet {
	s := &Sheet{Ours: "muster"}
	for _, v := range []float64{10, 30, 20} {
		s.Add("etcd", "writes_1", PerSecond, v)
	}
	s.Add("muster", "writes_1", PerSecond, 30)
	s.Add("muster", "writes_1", PerSecond, 50)
	s.Add("rqlite", "writes_1_p99", Millis, 4)
	s.Add("muster", "idle_written", Bytes, 0)
	return s
}

func TestRowsCompareMedians(t *testing.T) {
	rows := sheet().Rows()
	if len(rows) != 2 {
		t.Fatalf("%d rows, want the two that ours has: %+v", len(rows), rows)
	}
	r := rows[0]
	if r.Name != "writes_1" || r.Ours != 40 || r.Peer != "etcd" || *r.Theirs != 20 || *r.Ratio != 2 || r.Runs != 2 || r.Better != "higher" {
		t.Errorf("row %+v", r)
	}
	if r = rows[1]; r.Peer != "" || r.Theirs != nil || r.Ratio != nil || r.Better != "lower" {
		t.Errorf("a row without a peer: %+v", r)
	}
}

func TestLineIsOneLineOfJSON(t *testing.T) {
	var b strings.Builder
	if err := sheet().Line(&b, "configdb", "quick", 1.23456); err != nil {
		t.Fatal(err)
	}
	if strings.Count(b.String(), "\n") != 1 {
		t.Errorf("not one line: %q", b.String())
	}
	var got struct {
		Bench string
		Rows  []map[string]any
	}
	if err := json.Unmarshal([]byte(b.String()), &got); err != nil {
		t.Fatal(err)
	}
	for _, k := range []string{"name", "unit", "ours", "peer", "theirs", "ratio", "runs"} {
		if _, ok := got.Rows[0][k]; !ok {
			t.Errorf("row has no %q: %v", k, got.Rows[0])
		}
	}
}

func TestTableHasOursFirst(t *testing.T) {
	var b strings.Builder
	if err := sheet().Table(&b); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(b.String(), "\n")
	if got := strings.Fields(lines[0]); strings.Join(got, " ") != "metric unit better muster etcd rqlite" {
		t.Errorf("head %q", got)
	}
	if got := strings.Fields(lines[2]); strings.Join(got, " ") != "writes_1_p99 ms lower - - 4.00" {
		t.Errorf("line %q", got)
	}
}

func TestShortKeepsThreeDigits(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.01234: "0.0123", 1.5: "1.50", 99.94: "99.9", 1234.5: "1234"} {
		if got := short(v); got != want {
			t.Errorf("short(%v) = %q, want %q", v, got, want)
		}
	}
}
