// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"encoding/json"
	"strings"
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

// More CPUs than QEMU's machines have places for were taken, and the VM never started.
func TestMoreCPUsThanAMachineTakesAreRefusedAtOnce(t *testing.T) {
	s := VMSpec{CPUs: 256, Memory: GiB}
	s.SetDefaults()
	if err := s.Validate(); err == nil || !strings.Contains(err.Error(), "spec.cpus: is 256; give 1 to 255") {
		t.Error(err)
	}
}
