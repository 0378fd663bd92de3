// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"bytes"
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

// TestRealQEMUHasTheCloudInitCDROM: in both formats; made anew with the same
// bytes at the next start, and gone when the wish is.
func TestRealQEMUHasTheCloudInitCDROM(t *testing.T) {
	for name, format := range map[string]api.CloudInitFormat{"linux": api.CloudInitNoCloud, "windows": api.CloudInitConfigDrive} {
		e := newEnv(t, true)
		id, _ := e.runningNamed(name, api.VMSpec{Display: api.DisplayNone, CloudInit: &api.CloudInit{Format: format, User: "ops"}})
		var disks []struct {
			QDev     string `json:"qdev"`
			Inserted struct {
				File string `json:"file"`
				RO   bool   `json:"ro"`
			} `json:"inserted"`
		}
		e.ask(id, "query-block", nil, &disks)
		found := false
		for _, d := range disks {
			found = found || strings.HasSuffix(d.Inserted.File, "seed.iso") && d.Inserted.RO && strings.Contains(d.QDev, "seedcd")
		}
		if !found {
			t.Errorf("%s: %+v", name, disks)
		}
		if e.vm(id).Status.Hardware.CloudInit != nil {
			t.Errorf("%s: the status repeats the settings", name)
		}
		path := e.h.pathsOf(id).seed
		first, err := os.ReadFile(path)
		must(t, err)
		restart := func(change func(*api.VM)) {
			e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
			e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
			must(t, os.WriteFile(path, []byte("damaged"), 0o600))
			e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerRunning, false; change(vm) })
			e.wait(id, "running", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning })
		}
		restart(func(*api.VM) {})
		if again, err := os.ReadFile(path); err != nil || !bytes.Equal(first, again) {
			t.Errorf("%s: the next start has another CD-ROM: %v", name, err)
		}
		restart(func(vm *api.VM) { vm.Spec.CloudInit = nil })
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s: the CD-ROM is still there: %v", name, err)
		}
	}
}

// TestRealQEMUWithoutAnAgentSaysSo: the firmware has none.
func TestRealQEMUWithoutAnAgentSaysSo(t *testing.T) {
	e := newEnv(t, true)
	id, _ := e.running(api.VMSpec{Display: api.DisplayNone})
	in := e.h.instance(id)
	e.until("the port is known", in.knowsPort, nothing)
	a, err := e.h.GuestAgent(id)
	must(t, err)
	if k := a.Known(); k.Connected || k.Answering || k.Problem == "" {
		t.Errorf("%+v", k)
	}
	if n, err := e.h.Freeze(t.Context(), id, time.Minute); api.CodeOf(err) != api.CodeRefused || n != 0 {
		t.Errorf("%d, %v", n, err)
	}
	if err := e.h.Thaw(t.Context(), id); api.CodeOf(err) != api.CodeRefused {
		t.Error(err)
	}
	e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	if _, err := e.h.GuestAgent(id); api.CodeOf(err) != api.CodeRefused {
		t.Errorf("the agent of a stopped VM: %v", err)
	}
}

// A daemon that ends in the middle of its look at the agents ends.
func TestTheLookAtAgentsEndsWithItsContext(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	e.until("QEMU is known", func() bool { return e.h.instance(id).openConn() != nil }, nothing)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		lanes := newAgentLanes()
		defer lanes.work.Wait()
		for range 200 { // which of two ready ways is taken is chance
			in := e.h.instance(id)
			in.mu.Lock()
			in.portKnown = false // so that it is due
			in.mu.Unlock()
			e.h.checkAgents(ctx, lanes)
		}
	}()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatal("it waits for somebody who never had a place")
	}
}
