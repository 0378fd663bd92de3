// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"testing"
	"time"
)

func TestDrillSchedules(t *testing.T) {
	now := time.Date(2026, 3, 4, 3, 0, 0, 0, time.UTC) // a Wednesday
	for text, want := range map[string]struct{ last, next string }{
		"daily 03:00":      {"03-04T03:00", "03-05T03:00"},
		"daily 03:01":      {"03-03T03:01", "03-04T03:01"},
		"daily 23:59":      {"03-03T23:59", "03-04T23:59"},
		"weekly wed 02:00": {"03-04T02:00", "03-11T02:00"},
		"weekly wed 04:00": {"02-25T04:00", "03-04T04:00"},
		"weekly thu 00:00": {"02-26T00:00", "03-05T00:00"},
		"weekly sun 12:30": {"03-01T12:30", "03-08T12:30"},
	} {
		s, ok, err := ParseDrill(text)
		if !ok || err != nil {
			t.Errorf("%q: %v, %v", text, ok, err)
			continue
		}
		const layout = "01-02T15:04"
		if last, next := s.Last(now).Format(layout), s.Next(now).Format(layout); last != want.last || next != want.next {
			t.Errorf("%q: %s and %s, want %s and %s", text, last, next, want.last, want.next)
		}
		// Another time zone changes nothing.
		if there := now.In(time.FixedZone("there", 9*3600)); !s.Last(there).Equal(s.Last(now)) {
			t.Errorf("%q: %v", text, s.Last(there))
		}
	}
	for _, text := range []string{"", DrillManual} {
		if _, ok, err := ParseDrill(text); ok || err != nil {
			t.Errorf("%q: %v, %v", text, ok, err)
		}
	}
	for _, text := range []string{"daily", "daily 3:00", "daily 24:00", "daily 03:60", "weekly 03:00", "weekly so 03:00", "hourly", "daily  03:00", "03:00", "weekly sun 03:00 "} {
		if _, _, err := ParseDrill(text); CodeOf(err) != CodeInvalid {
			t.Errorf("%q: %v", text, err)
		}
	}
}
