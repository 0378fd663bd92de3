// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

// TestTheLastNodeSaysThatTheQuorumIsLost: what a person sees at the last of three.
func TestTheLastNodeSaysThatTheQuorumIsLost(t *testing.T) {
	f := newFlock(t, 3)
	f.up()
	a := f.nodes[0]
	for _, h := range f.nodes[1:] {
		a.run("node", "maintenance", "on", h.name)
	}
	a.run("vm", "create", "free", "--memory", "64M", "--disk", "64M", "--start")
	a.run("vm", "create", "kept", "--memory", "64M", "--disk", "64M", "--ha", "restart", "--start")
	if a.status().NoQuorum != nil {
		t.Error("a loss is told of while there is a quorum")
	}
	for _, h := range f.nodes[1:] {
		h.end()
	}
	f.eventually(60*time.Second, "the loss is told of, with what became of the guests", func() error {
		l := a.status().NoQuorum
		if l == nil {
			return errors.New("nothing is said")
		}
		got := map[string]api.LostOutcome{}
		for _, g := range l.Guests {
			got[g.VM] = g.Outcome
		}
		if l.Reachable != 1 || l.Needed != 2 || len(l.Missing) != 2 || got["free"] != api.LostRunsOn || got["kept"] != api.LostEnded {
			return fmt.Errorf("%+v", l)
		}
		return nil
	})
	for _, args := range [][]string{{"vm", "ls"}, {"vm", "ls", "-o", "json"}, {"vm", "show", "free"}, {"node", "ls"}, {"alert", "ls"}, {"event", "ls"}, {"vm", "console", "free", "--log"}} {
		r := a.try(args...)
		if r.code != 0 || strings.Count(r.stderr, "no quorum") != 1 || strings.Contains(r.stdout, "missing n2, n3") {
			t.Errorf("%v: exit %d, stdout %q, stderr %q", args, r.code, r.stdout, r.stderr)
		}
	}
	a.run("vm", "screenshot", "free", filepath.Join(f.dir, "free.png"))
	for _, args := range [][]string{{"cluster", "status"}, {"ha", "status"}} {
		r := a.try(args...)
		for _, words := range []string{"start 1 of the missing voters", "muster cluster recover", "runs-on"} {
			if r.code != 0 || !strings.Contains(r.stdout, words) {
				t.Errorf("%v: exit %d, %q is not in %s%s", args, r.code, words, r.stdout, r.stderr)
			}
		}
	}
	r := a.try("vm", "set", "free", "--cpu", "2")
	if r.code != 5 || !strings.Contains(r.stderr, "missing n2, n3") {
		t.Errorf("a change: exit %d, %s", r.code, r.stderr)
	}
}
