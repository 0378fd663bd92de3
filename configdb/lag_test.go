// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"testing"
	"time"
)

func TestLagCountsFromTheQuestion(t *testing.T) {
	at := func(s int) time.Time { return time.Unix(int64(1000+s), 0) }
	var l lag
	want := func(applied uint64, s int) {
		t.Helper()
		got, known := l.since(applied)
		if known != (s >= 0) || known && !got.Equal(at(s)) {
			t.Errorf("at revision %d: %v %v, want second %d", applied, got, known, s)
		}
	}
	want(100, -1) // nothing was asked yet
	l.heard(10, at(1))
	want(9, -1) // it lacks what was asked first
	want(10, 1)
	l.heard(20, at(2))
	l.heard(30, at(3))
	l.heard(40, at(4))
	want(15, 1)
	want(20, 2)
	want(30, 2) // of what is in between only the ends are kept
	want(40, 4)
	l.heard(40, at(3)) // an answer that took long
	want(40, 4)
	l.heard(41, at(9))
	want(40, 4)
	want(41, 9)
}
