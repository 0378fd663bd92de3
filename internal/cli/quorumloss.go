// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"fmt"
	"time"

	"github.com/muster-vm/muster/api"
)

// noQuorum prints, once per command, what a node says that has no quorum.
func (a *app) noQuorum(banner string) {
	if a.Shell == nil || !a.Shell.Tells {
		a.notice("warning: %s", banner)
	}
}

// lossSections explains a lost quorum: who is missing, what works, what to do.
func lossSections(out *sections, l *api.QuorumLoss, now time.Time) {
	if l == nil {
		return
	}
	out.title("No quorum")
	since := moment(l.Since, now)
	if l.Unheard {
		since = "no leader was heard since the daemon was started, " + since
	}
	out.field("Since", since)
	out.field("Voters", fmt.Sprintf("%d of %d are reachable from here, %d are needed", l.Reachable, l.Voters, l.Needed))
	out.field("Works", "lists and other reads, as old as that; consoles, screens and screenshots of the VMs that run here")
	out.field("Does not", "changes, starts, migrations, restarts of VMs of lost nodes")
	for i, step := range l.Next {
		out.field(fmt.Sprintf("Step %d", i+1), step)
	}
	if len(l.Missing) > 0 {
		out.title("Voters that are missing")
		t := &table{head: []string{"NAME", "ROLE", "GOSSIP", "ADDRESS"}}
		for _, m := range l.Missing {
			t.add(m.Node, dash(string(m.Role)), string(m.State), m.Address)
		}
		out.table(t)
	}
	if len(l.Guests) > 0 {
		out.title("VMs that ran on this node")
		t := &table{head: []string{"VM", "PROJECT", "OUTCOME", "WHY"}}
		for _, g := range l.Guests {
			t.add(g.VM, g.Project, string(g.Outcome), g.Why)
		}
		out.table(t)
	}
}
