// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"encoding/json"
	"testing"
)

// A revert gives a VM other hardware and leaves its wishes: whatever Hardware leaves
// out, WithHardware has to keep.
func TestOtherHardwareLeavesTheWishes(t *testing.T) {
	s := VMSpec{
		CPUs: 2, Memory: GiB, HA: HARestart, Power: PowerRunning, ForceStop: true, Reboots: 3, MemoryMin: 64 * MiB,
		CloudInit: &CloudInit{User: "ops"}, Limits: &VMLimits{CPUWeight: 7}, Recovery: &VMRecovery{Priority: PriorityHighest},
	}
	got := s.WithHardware(s.Hardware())
	a, _ := json.Marshal(s)
	b, _ := json.Marshal(got)
	if string(a) != string(b) {
		t.Errorf("was %s\n is %s", a, b)
	}
}
