// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
)

// differences names the fields of the spec that the hardware does not have as
// wished. It compares what is written, so that a field that is new to the spec
// is never forgotten here.
func differences(hw, want *api.VMSpec) []string {
	a, b := fieldsOf(hw), fieldsOf(want)
	var out []string
	for _, key := range slices.Sorted(maps.Keys(union(a, b))) {
		if reflect.DeepEqual(a[key], b[key]) {
			continue
		}
		switch key {
		case "disks", "nics":
			out = append(out, bySlot(key, a[key], b[key])...)
		case "cdroms":
			out = append(out, byDrive(a[key], b[key])...)
		default:
			out = append(out, key)
		}
	}
	return out
}

func fieldsOf(s *api.VMSpec) map[string]any {
	c := s.Hardware()
	c.Boot = nil
	// What is left out and what that means are the same.
	c.Machine = c.MachineType()
	if !c.UEFI() {
		c.Firmware = nil
	}
	if c.Hugepages.Size() == 0 {
		c.Hugepages = ""
	}
	b, err := json.Marshal(c)
	var out map[string]any
	if err == nil {
		err = json.Unmarshal(b, &out)
	}
	if err != nil {
		return map[string]any{"(unreadable)": err.Error()}
	}
	return out
}

func union(a, b map[string]any) map[string]any {
	out := maps.Clone(a)
	maps.Copy(out, b)
	return out
}

// bySlot compares two lists of devices: each device by its slot, then the
// order.
func bySlot(field string, a, b any) (out []string) {
	x, y := slotsOf(a), slotsOf(b)
	for _, slot := range slices.Sorted(maps.Keys(union(x, y))) {
		if !reflect.DeepEqual(x[slot], y[slot]) {
			out = append(out, fmt.Sprintf("%s (slot %s)", field, strings.TrimLeft(slot, "0")))
		}
	}
	if out == nil {
		out = []string{field + " (their order)"}
	}
	return out
}

// mediumOf begins the difference of a drive that is changed while QEMU runs.
const mediumOf = "cdroms (medium of drive "

// byDrive compares two lists of CD-ROM drives, which are told apart by their
// place.
func byDrive(a, b any) (out []string) {
	x, _ := a.([]any)
	y, _ := b.([]any)
	for n := range max(len(x), len(y)) {
		if n >= len(x) || n >= len(y) {
			out = append(out, fmt.Sprintf("cdroms (drive %d)", n))
			continue
		}
		was, _ := x[n].(map[string]any)
		is, _ := y[n].(map[string]any)
		switch {
		case was["bus"] != is["bus"]:
			out = append(out, fmt.Sprintf("cdroms (drive %d)", n))
		case was["image"] != is["image"]:
			out = append(out, fmt.Sprintf("%s%d)", mediumOf, n))
		}
	}
	return out
}

func slotsOf(list any) map[string]any {
	out := map[string]any{}
	items, _ := list.([]any)
	for _, it := range items {
		o, _ := it.(map[string]any)
		slot, _ := o["slot"].(float64)
		out[fmt.Sprintf("%02.0f", slot)] = o
	}
	return out
}

// liveField reports that a difference is one that is changed while QEMU runs.
func liveField(name string) bool {
	return name == "memory" || strings.HasPrefix(name, mediumOf) || strings.HasPrefix(name, "disks (slot") || strings.HasPrefix(name, "nics (slot")
}
