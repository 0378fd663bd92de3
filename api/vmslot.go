// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

// A slot is the place of a disk or network card in the guest's hardware. It
// stays with the device as long as the VM has it, whatever is added or removed
// beside it, so that the guest finds the device at the same address after a
// restart, a migration or a resume.

// AssignSlots gives every disk and network card without a slot its own: that of
// the same device in old (by volume, by MAC address), else the lowest free one.
// old may be nil.
func (s *VMSpec) AssignSlots(old *VMSpec) {
	if old == nil {
		old = &VMSpec{}
	}
	disks, nics := slotTable{}, slotTable{}
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
			if !t.taken(next) {
				*s = next
			}
			next++
		}
	}
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
// but the wishes about power and availability.
func (s *VMSpec) Hardware() *VMSpec {
	var h VMSpec
	deepCopy(s, &h)
	h.HA, h.Power, h.ForceStop, h.Reboots, h.Limits = "", "", false, 0, nil
	return &h
}
