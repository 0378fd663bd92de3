// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"fmt"
	"testing"
	"time"
)

// When a daemon is back its consoles first say what they said before. A guest that ended
// meanwhile counts only when it has booted.
func TestWhatAConsoleSaysFirstIsNotEnough(t *testing.T) {
	g := &guest{name: "g1"}
	c := &campaign{guests: []*guest{g}}
	say := func(boot, counter int, at time.Duration) {
		for _, wrong := range g.hear(fmt.Appendf(nil, "muster-guest name=g1 boot=%d counter=%d\n", boot, counter), at) {
			t.Error(wrong)
		}
	}
	say(1, 10, 5*time.Second)
	counts := c.allCount(10 * time.Second)
	ok := func() bool { return counts(t.Context()) == nil }
	if ok() {
		t.Error("it has not counted")
	}
	say(1, 20, 15*time.Second) // of before
	for range 2 {
		if ok() {
			t.Error("heard once")
		}
	}
	say(2, 21, 19*time.Second)
	if !ok() {
		t.Error("it counts")
	}
}
