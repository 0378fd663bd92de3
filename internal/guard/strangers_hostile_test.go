// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package guard

import "testing"

// A QEMU of an earlier guard that hangs in the kernel still holds its disks. A
// list without it made the daemon report its VM as stopped, which lets a start
// move the VM to another node.
func TestAProcessThatCannotBeKilledIsListed(t *testing.T) {
	tab := newTable()
	tab.strangers["web1"] = 4711
	tab.strangers[""] = 4712 // nobody knows which VM that is
	got := tab.list()
	if len(got) != 1 || got[0].VM != "web1" || got[0].PID != 4711 || got[0].State != StateKilling {
		t.Errorf("listed: %+v", got)
	}
	delete(tab.strangers, "web1")
	if got := tab.list(); len(got) != 0 {
		t.Errorf("still listed when it is gone: %+v", got)
	}
}
