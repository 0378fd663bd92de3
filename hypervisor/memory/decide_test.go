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

var start = time.Unix(1_800_000_000, 0)

const interval = 5 * time.Second

// apply carries decisions out; the guests obey as the balloons say.
func apply(vms []VM, ds []Decision, now time.Time, obey bool) {
	for _, d := range ds {
		for i := range vms {
			v := &vms[i]
			if v.ID != d.ID {
				continue
			}
			if d.To < v.Target {
				v.SqueezedAt = now
			} else {
				v.GrownAt = now
			}
			v.Target = d.To
			if obey {
				v.Actual = d.To
			}
		}
	}
}

func total(vms []VM) (target, least, most api.Size) {
	for _, v := range vms {
		target, least, most = target+v.Target, least+v.Min, most+v.Max
	}
	return target, least, most
}

func drawVMs(t *rapid.T) []VM {
	var vms []VM
	for i := range rapid.IntRange(1, 12).Draw(t, "vms") {
		v := VM{ID: fmt.Sprint("vm", i)}
		v.Min = api.Size(rapid.IntRange(16, 8192).Draw(t, "min")) * api.MiB
		v.Max = v.Min + api.Size(rapid.IntRange(1, 16384).Draw(t, "range"))*api.MiB
		v.Target, v.Actual = v.Max, v.Max
		if rapid.Bool().Draw(t, "talks") { // and may lie
			v.Used, v.StatsAt = api.Size(rapid.Int64Range(-1, 1<<45).Draw(t, "used")), start
		}
		vms = append(vms, v)
	}
	return vms
}

func TestTheNodeIsNeverOverfilledAndNobodyLeavesItsBounds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		vms := drawVMs(t)
		_, least, most := total(vms)
		n := Node{Budget: least + api.Size(rapid.Int64Range(0, int64(most-least)+int64(api.GiB)).Draw(t, "room"))}
		now := start
		obey := rapid.Bool().Draw(t, "obey")
		quiet := 0
		for range 400 {
			for i := range vms {
				if vms[i].StatsAt != (time.Time{}) {
					vms[i].StatsAt = now
				}
			}
			ds := Decide(n, vms, now)
			for _, d := range ds {
				if d.From == d.To {
					t.Fatalf("a decision for nothing: %+v", d)
				}
			}
			apply(vms, ds, now, obey)
			for _, v := range vms {
				if v.Target < v.Min || v.Target > v.Max {
					t.Fatalf("%+v left its bounds", v)
				}
			}
			if quiet++; len(ds) > 0 {
				quiet = 0
			}
			now = now.Add(interval)
		}
		if target, _, _ := total(vms); target > n.Budget {
			t.Fatalf("the targets sum up to %s of %s", target, n.Budget)
		}
		if quiet < 100 {
			t.Fatalf("with nothing new it decided %d intervals ago", quiet)
		}
		if n.Budget >= most && obey {
			for _, v := range vms {
				if v.Target != v.Max {
					t.Fatalf("%+v is squeezed without a reason", v)
				}
			}
		}
	})
}

// Once it fits, it fits at every moment: what one gets another has given back.
func TestGrowingWaitsForWhatIsGivenBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		vms := drawVMs(t)
		_, least, most := total(vms)
		n := Node{Budget: (least + most) / 2}
		now := start
		held := func() (sum api.Size) {
			for _, v := range vms {
				sum += max(v.Target, v.Actual)
			}
			return sum
		}
		fits := false
		for range 200 {
			for i := range vms { // the guests are slow, and change their minds
				v := &vms[i]
				if rapid.IntRange(0, 3).Draw(t, "moves") == 0 {
					v.Actual = v.Target
				}
				if rapid.IntRange(0, 9).Draw(t, "wants") == 0 {
					v.Used, v.StatsAt = api.Size(rapid.Int64Range(0, int64(v.Max)).Draw(t, "used")), now
				}
			}
			apply(vms, Decide(n, vms, now), now, false)
			if fits && held() > n.Budget {
				t.Fatalf("held %s of %s", held(), n.Budget)
			}
			fits = held() <= n.Budget
			now = now.Add(interval)
		}
	})
}

func TestNoiseMovesNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		vms := []VM{
			{ID: "a", Min: 256 * api.MiB, Max: 2 * api.GiB, Target: 2 * api.GiB, Actual: 2 * api.GiB},
			{ID: "b", Min: 256 * api.MiB, Max: 2 * api.GiB, Target: 2 * api.GiB, Actual: 2 * api.GiB},
		}
		n := Node{Budget: 3 * api.GiB}
		now := start
		step := func() []Decision {
			for i := range vms {
				vms[i].Used = 800*api.MiB + api.Size(rapid.IntRange(-20, 20).Draw(t, "noise"))*api.MiB
				vms[i].StatsAt = now
			}
			ds := Decide(n, vms, now)
			apply(vms, ds, now, true)
			now = now.Add(interval)
			return ds
		}
		for range 40 {
			step()
		}
		for range 100 {
			if ds := step(); len(ds) > 0 {
				t.Fatalf("noise of 20 MiB led to %+v", ds)
			}
		}
	})
}

func TestSqueezingIsFair(t *testing.T) {
	now := start
	vms := []VM{
		{ID: "idle", Min: 256 * api.MiB, Max: 4 * api.GiB, Used: 300 * api.MiB, StatsAt: now},
		{ID: "busy", Min: 256 * api.MiB, Max: 4 * api.GiB, Used: 3 * api.GiB, StatsAt: now},
		{ID: "mute", Min: 1 * api.GiB, Max: 1 * api.GiB},
	}
	for i := range vms {
		vms[i].Target, vms[i].Actual = vms[i].Max, vms[i].Max
	}
	got := Share(6*api.GiB, vms, now)
	if got[0]+got[1]+got[2] > 6*api.GiB || got[1] < 3*api.GiB || got[0] < 300*api.MiB || got[2] != api.GiB {
		t.Errorf("%v", got)
	}
	got = Share(4*api.GiB, vms, now)
	if got[0] < 256*api.MiB || got[1] < 2*api.GiB || got[0]+got[1] > 3*api.GiB {
		t.Errorf("with less than they need: %v", got)
	}
	got = Share(0, vms, now)
	if got[0] != 256*api.MiB || got[1] != 256*api.MiB || got[2] != api.GiB {
		t.Errorf("with nothing: %v", got)
	}
}

func TestAHostThatIsShortGetsMemoryBack(t *testing.T) {
	now := start
	vms := []VM{{ID: "a", Min: 256 * api.MiB, Max: 4 * api.GiB, Target: 4 * api.GiB, Actual: 4 * api.GiB, Used: 500 * api.MiB, StatsAt: now}}
	n := Node{Budget: 100 * api.GiB, Total: 16 * api.GiB, Available: 300 * api.MiB} // the margin is 819 MiB
	ds := Decide(n, vms, now)
	if len(ds) != 1 || ds[0].To >= 4*api.GiB-500*api.MiB || ds[0].Why != "the node is short of memory" {
		t.Fatalf("%+v", ds)
	}
	apply(vms, ds, now, true)
	n.Available = 900 * api.MiB // between the lines: nothing moves
	if ds := Decide(n, vms, now.Add(time.Hour)); len(ds) != 0 {
		t.Fatalf("%+v", ds)
	}
	n.Available = 8 * api.GiB
	if ds := Decide(n, vms, now.Add(interval)); len(ds) != 0 {
		t.Fatalf("given back at once: %+v", ds)
	}
	if ds := Decide(n, vms, now.Add(Cooldown)); len(ds) != 1 || ds[0].To != 4*api.GiB {
		t.Fatalf("%+v", ds)
	}
}

func TestChangedBoundsAreKept(t *testing.T) {
	vms := []VM{{ID: "a", Min: 2 * api.GiB, Max: 3 * api.GiB, Target: api.GiB, Actual: api.GiB}, {ID: "b", Min: api.GiB, Max: 2 * api.GiB, Target: 3 * api.GiB, Actual: 3 * api.GiB}}
	apply(vms, Decide(Node{Budget: 100 * api.GiB}, vms, start), start, true)
	if vms[0].Target < 2*api.GiB || vms[1].Target > 2*api.GiB {
		t.Errorf("%+v", vms)
	}
	if ds := Decide(Node{}, nil, start); ds != nil {
		t.Error(ds)
	}
}
