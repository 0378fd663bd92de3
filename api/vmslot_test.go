// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func slotsOf(s *VMSpec) (out []int) {
	for _, d := range s.Disks {
		out = append(out, d.Slot)
	}
	return out
}

func TestSlotsStayWithTheirDevices(t *testing.T) {
	s := VMSpec{Disks: []VMDisk{{Volume: "a"}, {Volume: "b", Slot: 1}, {Volume: "c"}}, NICs: []VMNIC{{MAC: "m"}}}
	s.AssignSlots(nil)
	if got := slotsOf(&s); !slices.Equal(got, []int{2, 1, 3}) || s.NICs[0].Slot != 1 {
		t.Fatalf("slots %v, %+v", got, s.NICs)
	}
	now := VMSpec{Disks: []VMDisk{{Volume: "new"}, {Volume: "c"}, {Volume: "b"}}}
	now.AssignSlots(&s)
	if got := slotsOf(&now); !slices.Equal(got, []int{2, 3, 1}) {
		t.Fatalf("after a was taken out and another put in: %v", got)
	}
}

func TestSlotsAreDistinctAndKept(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var old VMSpec
		for range rapid.IntRange(0, MaxDisks).Draw(t, "old") {
			old.Disks = append(old.Disks, VMDisk{Volume: string(rune('a' + len(old.Disks)))})
		}
		old.AssignSlots(nil)
		var now VMSpec
		for _, i := range rapid.Permutation(slices.Collect(func(yield func(int) bool) {
			for i := range MaxDisks {
				if !yield(i) {
					return
				}
			}
		})).Draw(t, "order") {
			now.Disks = append(now.Disks, VMDisk{Volume: string(rune('a' + i))})
		}
		now.AssignSlots(&old)
		seen := map[int]bool{}
		for i, d := range now.Disks {
			if err := validSlot("f", d.Slot, MaxDisks, seen); err != nil || d.Slot == 0 {
				t.Fatalf("disk %d: slot %d: %v", i, d.Slot, err)
			}
			for _, o := range old.Disks {
				if o.Volume == d.Volume && o.Slot != d.Slot {
					t.Fatalf("volume %s moved from slot %d to %d", d.Volume, o.Slot, d.Slot)
				}
			}
		}
	})
}
