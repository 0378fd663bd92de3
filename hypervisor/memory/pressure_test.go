// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package memory

import (
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/muster-vm/muster/api"
)

// simHost is a host whose guests use what they want as soon as they may, and
// which begins to stall when less than a line is available. Its kernel says so
// late, as the mean of the last ten seconds.
type simHost struct {
	total, other, line api.Size
	want               []api.Size // by VM: what its guest would use
	uses               []api.Size
	stall              float64
	psi                bool
}

func (h *simHost) available() api.Size {
	left := h.total - h.other
	for _, u := range h.uses {
		left -= u
	}
	return left
}

// pass lets an interval pass: guests use more at their own pace, and give back what
// their balloon takes.
func (h *simHost) pass(vms []VM, now time.Time) {
	for i := range vms {
		v := &vms[i]
		v.Actual = v.Target
		most := min(h.want[i], v.Actual)
		h.uses[i] = min(most, h.uses[i]+max((most-h.uses[i])/2, 16*api.MiB))
		v.Used, v.StatsAt = min(h.want[i], v.Actual*9/10), now
	}
	now10 := 0.0
	if h.available() < h.line {
		now10 = 60
	}
	h.stall = (h.stall + now10) / 2
}

func drawHost(t *rapid.T) (*simHost, []VM, Node) {
	const total = 64 * api.GiB
	h := &simHost{total: total, psi: rapid.Bool().Draw(t, "psi")}
	h.line = api.Size(rapid.Int64Range(0, int64(total/5)).Draw(t, "line")) / api.MiB * api.MiB
	var vms []VM
	var least api.Size
	for i := range rapid.IntRange(1, 8).Draw(t, "vms") {
		v := VM{ID: fmt.Sprint("vm", i), Min: api.Size(rapid.IntRange(128, 2048).Draw(t, "min")) * api.MiB}
		v.Max = v.Min + api.Size(rapid.IntRange(0, 12288).Draw(t, "range"))*api.MiB
		v.Target, v.Actual = v.Max, v.Max
		least += v.Min
		h.want = append(h.want, api.Size(rapid.Int64Range(0, int64(v.Max)).Draw(t, "want")))
		vms = append(vms, v)
	}
	h.uses = make([]api.Size, len(vms))
	// Somebody else uses so much that the minimums still fit above all lines.
	h.other = api.Size(rapid.Int64Range(0, int64(total-least-total/4)).Draw(t, "other"))
	return h, vms, Node{Budget: total - api.Size(rapid.Int64Range(0, int64(total/8)).Draw(t, "reserved")), Total: total}
}

// Whatever the host and its guests are, with a load that stays the same the targets
// come to rest, nobody leaves its bounds, and a host that stalls, or is about to
// run out of memory, is relieved.
func TestPressureIsRelievedAndNothingOscillates(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h, vms, n := drawHost(t)
		var p Pressure
		now := start
		step := func() int {
			node := n
			node.Available = max(h.available(), 0)
			p.Note(&node, h.stall, h.psi, now)
			ds := Decide(node, vms, now)
			for _, d := range ds {
				if d.Why == "" || d.From == d.To {
					t.Fatalf("%+v", d)
				}
			}
			apply(vms, ds, now, true)
			for _, v := range vms {
				if v.Target < v.Min || v.Target > v.Max {
					t.Fatalf("%+v left its bounds", v)
				}
			}
			h.pass(vms, now)
			now = now.Add(interval)
			return len(ds)
		}
		for range 240 { // twenty minutes to find its level
			step()
		}
		moves := 0
		for range 240 { // and then nothing
			moves += step()
		}
		if moves > 0 {
			t.Fatalf("%d changes with a load that stays the same; available %s, line %s, floor %s", moves, h.available(), h.line, p.floor)
		}
		if short := min(h.line, 4*n.margin()); h.psi && h.available() < short {
			for _, v := range vms {
				if v.Target > v.Min {
					t.Fatalf("the host stalls at %s, and %s has %s above its minimum", h.available(), v.ID, v.Target-v.Min)
				}
			}
		}
		if h.available() < n.margin() {
			for _, v := range vms {
				if v.Target > v.Min {
					t.Fatalf("%s available, and %s has %s above its minimum", h.available(), v.ID, v.Target-v.Min)
				}
			}
		}
	})
}

func TestStallsSqueezeBeforeTheHostSwaps(t *testing.T) {
	vm := func() []VM {
		return []VM{{ID: "a", Min: 256 * api.MiB, Max: 4 * api.GiB, Target: 4 * api.GiB, Actual: 4 * api.GiB, Used: 500 * api.MiB, StatsAt: start}}
	}
	const total = 16 * api.GiB // the margin is 819 MiB
	for name, c := range map[string]struct {
		available api.Size
		stall     float64
		known     bool
		squeezed  bool
	}{
		"much is available, so it is a process with a limit of its own": {8 * api.GiB, 90, true, false},
		"little is available and processes wait":                        {2 * api.GiB, 20, true, true},
		"little is available and nobody waits":                          {2 * api.GiB, 0.5, true, false},
		"somebody waits a little":                                       {2 * api.GiB, 5, true, false},
		"the kernel does not say":                                       {2 * api.GiB, 90, false, false},
		"the margin is gone":                                            {500 * api.MiB, 0, false, true},
	} {
		var p Pressure
		n := Node{Budget: 100 * api.GiB, Total: total, Available: c.available}
		p.Note(&n, c.stall, c.known, start)
		ds := Decide(n, vm(), start)
		if got := len(ds) == 1 && ds[0].To < 4*api.GiB; got != c.squeezed {
			t.Errorf("%s: %+v", name, ds)
		}
		if c.known && c.squeezed && ds[0].Why != waitingForMemory {
			t.Errorf("%s: %q", name, ds[0].Why)
		}
	}
	// The figure is about ten seconds: it speaks of before the squeeze for as long.
	var p Pressure
	vms := vm()
	look := func(at time.Duration, stall float64, available api.Size) []Decision {
		n := Node{Budget: 100 * api.GiB, Total: total, Available: available}
		p.Note(&n, stall, true, start.Add(at))
		vms[0].StatsAt = start.Add(at)
		ds := Decide(n, vms, start.Add(at))
		apply(vms, ds, start.Add(at), true)
		return ds
	}
	if ds := look(0, 40, 2*api.GiB); len(ds) != 1 {
		t.Fatalf("%+v", ds)
	}
	if ds := look(5*time.Second, 40, 2*api.GiB); len(ds) != 0 {
		t.Fatalf("squeezed again at once: %+v", ds)
	}
	if ds := look(10*time.Second, 40, 2*api.GiB); len(ds) != 1 {
		t.Fatalf("not squeezed again: %+v", ds)
	}
	// It is given back when there is clearly more than when it stalled, and slowly.
	if ds := look(10*time.Minute, 0, 3*api.GiB); len(ds) != 0 {
		t.Fatalf("given back at %s: %+v", 3*api.GiB, ds)
	}
	ds := look(11*time.Minute, 0, 8*api.GiB)
	if len(ds) != 1 || ds[0].To <= ds[0].From || ds[0].To-ds[0].From > total/marginFraction {
		t.Fatalf("%+v", ds)
	}
	if ds := look(11*time.Minute+5*time.Second, 0, 8*api.GiB); len(ds) != 0 {
		t.Fatalf("more, before it was seen what that does: %+v", ds)
	}
	vms[0].Target, vms[0].Actual = 2*api.GiB, 2*api.GiB
	if ds := look(2*time.Hour, 0, 3*api.GiB); len(ds) != 1 || ds[0].To != 4*api.GiB {
		t.Fatalf("after an hour without: %+v", ds)
	}
}
