// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package vswitch

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// hardware says what runs of a VM.
func (w *world) hardware(vm api.VM, hw *api.VMSpec) {
	w.t.Helper()
	w.do(func(v *configdb.View, tx *configdb.Txn) error {
		o, err := configdb.VMs.Get(v, vm.Meta.ID)
		if err != nil {
			return err
		}
		o.Status.Hardware = hw
		return configdb.VMs.UpdateStatus(v, tx, &o)
	})
}

// A guest that has not let go of a card moves with it, and goes on from saved memory
// with it: there is a device, which is a port of nothing.
func TestACardThatIsNotWantedAnyMoreGetsADeviceAlone(t *testing.T) {
	w := newWorld(t, 1)
	h := w.hosts[0]
	w.network("red", api.NetworkSpec{Type: api.NetworkIsolated})
	w.start()
	w.ready("red")
	one, two := nic("red", "01", ""), nic("red", "02", "")
	one.Slot, two.Slot = 1, 2
	vm := w.vm("web1", h, one)
	hw := vm.Spec.Hardware()
	hw.NICs = append(hw.NICs, two)
	runs := vm.Clone()
	runs.Spec = vm.Spec.WithHardware(hw)
	if _, _, err := h.sw.Plug(t.Context(), runs, 1); err == nil {
		t.Fatal("a card that nobody knows was plugged")
	}
	w.hardware(vm, hw)
	device, offload, err := h.sw.Plug(t.Context(), runs, 1)
	if err != nil || offload || device != tapName(vm.Meta.ID, 2) {
		t.Fatal(device, offload, err)
	}
	if strings.Contains(h.vsctl("list-ports", Bridge), device) {
		t.Error("it is a port")
	}
	// A look at the whole leaves it, as long as the machine has it.
	w.network("blue", api.NetworkSpec{Type: api.NetworkIsolated})
	w.ready("blue")
	if err := exec.Command("ip", "-n", h.ns, "link", "show", device).Run(); err != nil {
		t.Fatal("the device is gone")
	}
	w.hardware(vm, nil)
	h.sw.loop.Enqueue(all)
	h.gone(device)
}
