// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/hypervisor/qmp"
)

// The tests of this file drive the real QEMU with a blank disk: the firmware is
// guest enough for everything but the ACPI power button.

func TestRealQEMULifeCycle(t *testing.T) {
	e := newEnv(t, true)
	id, vm := e.running(api.VMSpec{CPUs: 2})
	if vm.Status.Accelerator != "tcg" {
		t.Error("accelerator", vm.Status.Accelerator)
	}
	c, err := e.h.Console(id)
	must(t, err)
	e.until("first boot", func() bool {
		return strings.Contains(string(c.History(1<<20)), "No bootable device")
	}, func() string { return string(c.History(2000)) })
	ch, cancel, err := c.Subscribe(4096)
	must(t, err)
	defer cancel()
	if seen := <-ch; !strings.Contains(string(seen), "No bootable device") {
		t.Errorf("a reader is given %q", seen)
	}

	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerPaused })
	e.wait(id, "paused", func(vm api.VM) bool { return vm.Status.Phase == api.VMPaused })
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
	e.wait(id, "resumed", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning })
	e.change(id, func(vm *api.VM) { vm.Spec.Reboots = 1 })
	e.wait(id, "reset", func(vm api.VM) bool { return vm.Status.RebootsDone == 1 })
	e.until("second boot", func() bool {
		return strings.Count(string(c.History(1<<20)), "No bootable device") >= 2
	}, func() string { return string(c.History(2000)) })
	if now := e.vm(id); now.Status.PID != vm.Status.PID {
		t.Error("a reset changed the process")
	}

	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerStopped })
	e.wait(id, "stopping", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopping })
	e.change(id, func(vm *api.VM) { vm.Spec.ForceStop = true })
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped && vm.Status.PID == 0 })
	for range ch {
	}
}

func TestRealQEMUIsAdoptedAndItsEndNoticed(t *testing.T) {
	e := newEnv(t, true)
	id, was := e.running(api.VMSpec{})
	e.stop()
	if p, _ := e.guard.get(id); p.State != ProcessRunning {
		t.Fatal("the VM ended with the daemon")
	}
	e.begin()
	e.until("adopted", func() bool { _, err := e.h.Console(id); return err == nil }, nothing)
	if now := e.vm(id); now.Status.PID != was.Status.PID || now.Status.Phase != api.VMRunning || !now.Status.StartedAt.Equal(*was.Status.StartedAt) {
		t.Fatalf("%+v, was %+v", now.Status, was.Status)
	}
	must(t, syscall.Kill(was.Status.PID, syscall.SIGKILL))
	vm := e.wait(id, "restarted", func(vm api.VM) bool { return vm.Status.Crashes == 1 && vm.Status.Phase == api.VMRunning })
	if vm.Status.PID == was.Status.PID {
		t.Fatal("the same process")
	}

	e.stop() // the end while no daemon looks
	must(t, syscall.Kill(vm.Status.PID, syscall.SIGKILL))
	e.until("dead", func() bool { p, _ := e.guard.get(id); return p.State == ProcessExited }, nothing)
	e.begin()
	e.wait(id, "restarted", func(vm api.VM) bool { return vm.Status.Crashes == 2 && vm.Status.Phase == api.VMRunning })
}

func TestRealQEMUStoppedBySIGSTOPIsForcedOff(t *testing.T) {
	e := newEnv(t, true)
	id, vm := e.running(api.VMSpec{})
	must(t, syscall.Kill(vm.Status.PID, syscall.SIGSTOP))
	e.h.Wake()
	e.wait(id, "condition", func(vm api.VM) bool {
		_, bad := api.FindCondition(vm.Status.Conditions, ConditionQMPUnresponsive)
		return bad
	})
	e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
}

func TestRealQEMUSaysWhyItCannotStart(t *testing.T) {
	e := newEnv(t, true)
	e.vols.put("web1-disk0", e.runDir+"/no such disk, indeed")
	id := e.create("node-1", api.VMSpec{Power: api.PowerRunning})
	vm := e.wait(id, "failed", func(vm api.VM) bool { return vm.Status.Phase == api.VMFailed })
	if !strings.Contains(vm.Status.Message, "no such disk, indeed") {
		t.Fatal(vm.Status.Message)
	}
	e.change(id, func(vm *api.VM) { now := time.Now().UTC(); vm.Meta.DeletingAt = &now })
	e.wait(id, "deleting", func(vm api.VM) bool { return vm.Status.Phase == api.VMDeleting })
}

// A second QEMU on the same disk is refused by QEMU itself.
func TestRealQEMULocksItsDisk(t *testing.T) {
	e := newEnv(t, true)
	id, _ := e.running(api.VMSpec{})
	r := e.guard.starts[0]
	dir, err := os.MkdirTemp("", "hv")
	must(t, err)
	defer os.RemoveAll(dir)
	was := e.h.pathsOf(id).dir
	for i := range r.Argv {
		r.Argv[i] = strings.ReplaceAll(r.Argv[i], was, dir)
	}
	r.Dir, r.LogPath = dir, dir+"/qemu.log"
	code := make(chan int, 1)
	_, _, err = execQEMU(r, func(c, _ int) { code <- c })
	must(t, err)
	if c := <-code; c != 1 {
		t.Fatal("exit code", c)
	}
	log, err := os.ReadFile(r.LogPath)
	if err != nil || !strings.Contains(string(log), `Failed to get "write" lock`) {
		t.Fatalf("%s, %v", log, err)
	}
}

// The whole schema of QMP is over 64 KiB in one reply.
func TestRealQMP(t *testing.T) {
	e := newEnv(t, true)
	id, _ := e.running(api.VMSpec{})
	e.stop() // QEMU serves one monitor client at a time
	conn, err := qmp.Dial(t.Context(), e.h.pathsOf(id).qmp)
	must(t, err)
	defer conn.Disconnect()
	var schema []map[string]any
	must(t, conn.Execute(t.Context(), "query-qmp-schema", nil, &schema))
	if len(schema) < 500 {
		t.Fatalf("%d entries", len(schema))
	}
	if err := conn.Execute(t.Context(), "qom-get", map[string]string{"path": "/machine", "property": "none"}, nil); err == nil {
		t.Fatal("no refusal")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := qmp.Dial(ctx, e.h.pathsOf(id).qmp); err == nil {
		t.Fatal("a second client was greeted")
	}
	var d net.Dialer
	ga, err := d.DialContext(t.Context(), "unix", e.h.AgentSocket(id))
	must(t, err)
	must(t, ga.Close())
}
