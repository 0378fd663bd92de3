// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
)

// A slot is the place of a disk or network card in the guest's hardware. It
// stays with the device as long as the VM has it, whatever is added or removed
// beside it, so that the guest finds the device at the same address after a
// restart, a migration or a resume.

// AssignSlots gives every disk and network card without a slot its own: that of
// the same device in old (by volume, by MAC address), else the lowest free one.
// old may be nil.
func (s *VMSpec) AssignSlots(old *VMSpec) { s.AssignSlotsBeside(old, nil) }

// AssignSlotsBeside does the same and leaves free, if it can, the slots of what
// running hardware still has.
func (s *VMSpec) AssignSlotsBeside(old, running *VMSpec) {
	if old == nil {
		old = &VMSpec{}
	}
	if running == nil {
		running = &VMSpec{}
	}
	disks, nics := slotTable{most: MaxDisks}, slotTable{most: MaxNICs}
	for _, d := range running.Disks {
		disks.avoid = append(disks.avoid, d.Slot)
	}
	for _, n := range running.NICs {
		nics.avoid = append(nics.avoid, n.Slot)
	}
	for i := range s.Disks {
		disks.add(&s.Disks[i].Slot, s.Disks[i].Volume)
	}
	for i := range s.NICs {
		nics.add(&s.NICs[i].Slot, s.NICs[i].MAC)
	}
	for _, d := range old.Disks {
		disks.inherit(d.Volume, d.Slot)
	}
	for _, n := range old.NICs {
		nics.inherit(n.MAC, n.Slot)
	}
	disks.fill()
	nics.fill()
}

// slotTable are the devices of one sort of one VM.
type slotTable struct {
	slots []*int
	keys  []string
	avoid []int // taken only if nothing else is left
	most  int
}

func (t *slotTable) add(slot *int, key string) {
	t.slots, t.keys = append(t.slots, slot), append(t.keys, key)
}

func (t *slotTable) taken(n int) bool {
	for _, s := range t.slots {
		if *s == n {
			return true
		}
	}
	return false
}

// inherit gives the device with a key its old slot.
func (t *slotTable) inherit(key string, slot int) {
	if key == "" || slot == 0 || t.taken(slot) {
		return
	}
	for i, k := range t.keys {
		if k == key && *t.slots[i] == 0 {
			*t.slots[i] = slot
			return
		}
	}
}

func (t *slotTable) fill() {
	next := 1
	for _, s := range t.slots {
		for *s == 0 {
			if !t.taken(next) && !slices.Contains(t.avoid, next) {
				*s = next
			}
			if next++; next > t.most && len(t.avoid) > 0 {
				next, t.avoid = 1, nil
			}
		}
	}
}

// TakenSlot finds a device that is given the slot of one that stays where it is,
// and names the field.
func (s *VMSpec) TakenSlot(old *VMSpec) error {
	for i, d := range s.Disks {
		for _, o := range s.Disks {
			at := slices.IndexFunc(old.Disks, func(x VMDisk) bool { return x.Volume != "" && x.Volume == o.Volume })
			if d.Slot != 0 && o.Slot == 0 && at >= 0 && old.Disks[at].Slot == d.Slot {
				return Invalid(fmt.Sprintf("spec.disks[%d].slot", i), "%d is taken by volume %s; leave the slot out to get a free one", d.Slot, o.Volume)
			}
		}
	}
	for i, n := range s.NICs {
		for _, o := range s.NICs {
			at := slices.IndexFunc(old.NICs, func(x VMNIC) bool { return x.MAC != "" && x.MAC == o.MAC })
			if n.Slot != 0 && o.Slot == 0 && at >= 0 && old.NICs[at].Slot == n.Slot {
				return Invalid(fmt.Sprintf("spec.nics[%d].slot", i), "%d is taken by the card %s; leave the slot out to get a free one", n.Slot, o.MAC)
			}
		}
	}
	return nil
}

// validSlot checks a slot that a user may give; 0 means that one is chosen.
func validSlot(field string, slot, most int, seen map[int]bool) error {
	if slot < 0 || slot > most {
		return Invalid(field+".slot", "is %d; give 1 to %d, or leave it out", slot, most)
	}
	if slot != 0 && seen[slot] {
		return Invalid(field+".slot", "%d is given to another device, too", slot)
	}
	seen[slot] = true
	return nil
}

// Hardware is the part of the spec that makes the guest's hardware: everything
// but the wishes about power, availability and how far memory may be squeezed.
func (s *VMSpec) Hardware() *VMSpec {
	var h VMSpec
	deepCopy(s, &h)
	h.HA, h.Power, h.ForceStop, h.Reboots, h.MemoryMin, h.CloudInit, h.Limits = "", "", false, 0, 0, nil, nil
	h.Recovery = nil
	for i := range h.CDROMs {
		h.CDROMs[i].Force = false
	}
	return &h
}

// SameHardware reports that two specs ask for the same hardware.
func (s *VMSpec) SameHardware(o *VMSpec) bool {
	a, errA := json.Marshal(s.Hardware())
	b, errB := json.Marshal(o.Hardware())
	return errA == nil && errB == nil && bytes.Equal(a, b)
}
