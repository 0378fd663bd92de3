// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"errors"
	"testing"
	"time"
)

// Two attempts an hour apart that failed, such as of a node that led, and leads again,
// are no trouble that has lasted for 30 s.
func TestAFailureOfLongAgoIsNotTheBeginningOfOneNow(t *testing.T) {
	_, pool, m1, m2 := noteKit(t)
	m1.stop()
	m2.stop()
	now := time.Now()
	m1.cfg.Now = func() time.Time { return now }
	box := m1.local(pool).notes
	a := noteAccess{"read", m2.id}
	_ = m1.noted(box, a, errors.New("torn"))
	now = now.Add(time.Hour)
	if said := box.trouble(now); said != "" {
		t.Errorf("long after: %q", said)
	}
	_ = m1.noted(box, a, errors.New("torn"))
	if said := box.trouble(now.Add(time.Second)); said != "" {
		t.Errorf("one read failed a second ago, and the pool says of a trouble of 30 s: %q", said)
	}
}
