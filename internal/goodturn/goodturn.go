// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package goodturn is for tests of what has a bound on time, on machines that stand still
// now and then.
package goodturn

import "testing"

const most = 10

// Take takes turns, numbered from 1, until one keeps the bound: it returns no error then.
// A machine that stands still spoils some, and what takes too long does so in all of them.
func Take(tb testing.TB, turn func(n int) error) {
	tb.Helper()
	var err error
	for n := range most {
		if err = turn(n + 1); err == nil {
			return
		}
		tb.Logf("turn %d: %v", n+1, err)
	}
	tb.Fatalf("%d turns: %v", most, err)
}
