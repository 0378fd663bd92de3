// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"strings"
	"testing"
)

// TestARealGuestIsDrilled fails a real guest over on purpose, while all nodes live.
func TestARealGuestIsDrilled(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	f.up()
	f.withGuest(f.nodes[0])
	_, c := f.counting(f.nodes[1], bootPatience, 1, 0)
	h := f.nodes[1]
	h.refuse(4, "not meant for drills", "ha", "drill", "run", "web1")
	h.run("vm", "set", "web1", "--drill", "manual")
	from := h.vm("web1").Status.Node
	h.run("ha", "drill", "run", "web1")
	vm := h.vm("web1")
	if vm.Status.Node == from || vm.Status.Epoch != 2 || vm.Status.Tries != nil {
		t.Fatalf("%+v", vm.Status)
	}
	for _, n := range f.nodes {
		if st := h.node(n.name).Status; st.Phase != "ready" || st.LostAt != nil {
			t.Errorf("%s: %+v", n.name, st)
		}
	}
	if boot, n := f.counting(h, bootPatience, 2, c); boot != 2 {
		t.Errorf("boot %d, count %d", boot, n)
	}
	if out := h.run("ha", "drill", "ls"); !strings.Contains(out, "succeeded") || !strings.Contains(out, from) {
		t.Error(out)
	}
	if out := h.run("ha", "proof"); !strings.Contains(out, "drill") {
		t.Error(out)
	}
	if out := h.run("ha", "verify"); !strings.Contains(out, "the guard reaped QEMU of vm web1") && !strings.Contains(out, "holds") {
		t.Error(out)
	}
	if out := h.run("event", "ls"); !strings.Contains(out, "vm.drill-succeeded") {
		t.Error(out)
	}
}
