// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"
)

func TestAStandstillIsToldWithItsLength(t *testing.T) {
	var out bytes.Buffer
	var clock time.Duration
	lates := []time.Duration{0, 499 * time.Millisecond, 1200 * time.Millisecond, 0}
	s := &standstill{
		log: slog.New(slog.NewTextHandler(&out, nil)),
		now: func() time.Duration { return clock },
		wait: func(_ context.Context, d time.Duration) bool {
			if len(lates) == 0 {
				return false
			}
			clock += d + lates[0]
			lates = lates[1:]
			return true
		},
	}
	if err := s.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := out.String(); strings.Count(got, "stood still") != 1 || !strings.Contains(got, "for=1.2s") || !strings.Contains(got, "since_last.cpu=") {
		t.Fatalf("%s", got)
	}
}
