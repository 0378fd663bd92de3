// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import (
	"strings"
	"sync/atomic"
	"testing"
)

// The shell says above the prompt when the quorum is lost, when the loss changes and
// when it is over, each once.
func TestTheShellTellsOfALostQuorumAndOfItsEnd(t *testing.T) {
	var lost atomic.Value
	lost.Store("")
	f := newFixture(t, func(c *Config) { c.NoQuorum = func() string { return lost.Load().(string) } })
	s := f.shell(login{})
	// again runs a command and returns all up to the next prompt.
	again := func() string {
		t.Helper()
		s.send("vm show web1 -o name\r")
		return s.expect(`(?s)^.*?vm/web1\r\n.*?` + prompt)
	}
	if out := again(); strings.Contains(out, "***") {
		t.Errorf("with a quorum: %q", out)
	}
	for _, c := range []struct{ now, says string }{
		{"no quorum, missing m2", "*** no quorum, missing m2\r\n"},
		{"no quorum, missing m2, m3", "*** no quorum, missing m2, m3\r\n"},
		{"", "*** this node has its quorum again\r\n"},
	} {
		lost.Store(c.now)
		if out := again(); strings.Count(out, c.says) != 1 {
			t.Errorf("%q is not said: %q", c.says, out)
		}
		if out := again(); strings.Contains(out, "***") {
			t.Errorf("%q is said twice: %q", c.says, out)
		}
	}
}
