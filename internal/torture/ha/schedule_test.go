// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"testing"
	"time"
)

func TestASeedsScheduleHasEveryKind(t *testing.T) {
	for seed := range uint64(50) {
		s, again := newSchedule(seed, 5, false), newSchedule(seed, 5, false)
		seen, steps := map[kind]int{}, map[bool]int{}
		for range 4 * (len(kinds) + len(kinds)/2) { // rounds
			e := s.next()
			if e.String() != again.next().String() {
				t.Fatalf("seed %d: two schedules", seed)
			}
			if e.whole() && (e.rushed || len(e.faults) > 1) {
				t.Errorf("seed %d: %s", seed, e)
			}
			for _, f := range e.faults {
				seen[f.kind]++
				if clock := f.kind.clock() || f.kind == clockBoot; clock != (f.step != 0) || f.step.Abs() > stepMost {
					t.Errorf("seed %d: %s", seed, e)
				}
				if f.step != 0 {
					steps[f.step > 0]++
				}
				if f.kind == clockBack && f.step != -time.Hour || f.kind == clockAhead && f.step != time.Hour {
					t.Errorf("seed %d: %s", seed, e)
				}
			}
		}
		for _, k := range kinds {
			if k != oldBackup && seen[k] < 4 {
				t.Errorf("seed %d: %s %d times in four rounds", seed, k, seen[k])
			}
		}
		if seen[oldBackup]+seen[oldBeside] != 4 || steps[true] == 0 || steps[false] == 0 {
			t.Errorf("seed %d: %v, %v", seed, seen, steps)
		}
	}
}
