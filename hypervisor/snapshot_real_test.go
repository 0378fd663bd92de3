// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/console"
	"github.com/muster-vm/muster/internal/smalldisk"
)

// counter is the last line of the tiny guest: how often it booted, and its
// counter, which was fsynced to its disk before it was printed.
var counterLine = regexp.MustCompile(`muster-guest name=\S+ boot=(\d+) counter=(\d+)`)

type progress struct{ boot, counter int }

// count waits for a line that the guest prints from now on, and that is ok.
func (e *env) count(id, what string, ok func(progress) bool) progress {
	e.t.Helper()
	var ch <-chan []byte
	cancel := func() {}
	subscribe := func() {
		e.until("a console", func() bool {
			c, err := e.h.Console(id)
			if err != nil {
				return false
			}
			ch, cancel, err = c.Subscribe(0)
			return err == nil
		}, nothing)
	}
	subscribe()
	defer func() { cancel() }()
	var text strings.Builder
	deadline := time.After(guestPatience)
	for {
		var b []byte
		open := true
		select {
		case b, open = <-ch:
		case <-deadline:
			e.t.Fatalf("%s: waited %v; the console says %q", what, guestPatience, text.String())
		}
		if !open && strings.HasSuffix(text.String(), string(console.CutOff)) { // a busy machine reads slowly
			subscribe()
			continue
		}
		if !open {
			e.t.Fatalf("%s: the console ended after %q", what, text.String())
		}
		text.Write(b)
		for _, m := range counterLine.FindAllStringSubmatch(text.String(), -1) {
			boot, _ := strconv.Atoi(m[1])
			n, _ := strconv.Atoi(m[2])
			if p := (progress{boot, n}); ok(p) {
				return p
			}
		}
	}
}

func after(n int) func(progress) bool { return func(p progress) bool { return p.counter >= n } }

// counterGuest makes a disk with the tiny guest on it and one of no content.
func (e *env) counterGuest(spec api.VMSpec) string {
	e.t.Helper()
	image, err := filepath.Abs("../build/guest/tiny.qcow2")
	must(e.t, err)
	if out, err := exec.Command("../scripts/guest-image", "--output", image).CombinedOutput(); err != nil {
		e.t.Fatalf("build the test guest: %v: %s", err, out)
	}
	var disks []api.VMDisk
	for i, args := range [][]string{{"-b", image, "-F", "qcow2"}, nil} {
		name := []string{"web1-disk0", "web1-disk1"}[i]
		path := filepath.Join(e.runDir, name+".qcow2")
		args = append(append([]string{"create", "-q", "-f", "qcow2"}, args...), path)
		if i == 1 {
			args = append(args, "64M")
		}
		if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
			e.t.Fatalf("qemu-img: %v: %s", err, out)
		}
		e.vols.put(name, path)
		disks = append(disks, api.VMDisk{Volume: name})
	}
	spec.Memory = 160 * api.MiB
	return e.vmWith(spec, disks)
}

// One guest goes through everything: what it has counted says which moment it
// is in, and whether it booted or went on.
func TestRealGuestThroughSnapshotsSuspendAndRevert(t *testing.T) {
	e := newEnv(t, true)
	id := e.counterGuest(api.VMSpec{CPUs: 1, Power: api.PowerRunning, MaxMemory: 640 * api.MiB})
	e.wait(id, "running", running)
	e.count(id, "first boot", after(5)) // its drivers are loaded by then
	e.plugEverything(id)
	p := e.count(id, "with more hardware", after(6))
	e.done(id, api.ActionVMSnapshot, "memory", true)
	atMemory := e.count(id, "after the snapshot", after(p.counter+2))
	if atMemory.boot != p.boot {
		t.Fatalf("a snapshot rebooted the guest: %+v, was %+v", atMemory, p)
	}
	e.done(id, api.ActionVMSnapshot, "disks", false)
	s := e.snap(id, "memory")
	if s.Status.MemorySize < api.MiB || s.Status.Power != api.PowerRunning {
		t.Errorf("%+v", s.Status)
	}
	t.Logf("memory of a guest of 288 MiB: %s", s.Status.MemorySize)

	e.done(id, api.ActionVMSuspend, "", false)
	e.wait(id, "suspended", func(vm api.VM) bool { return vm.Status.Phase == api.VMSuspended && vm.Status.PID == 0 })
	tags, err := tagsOf(e.path("web1-disk0"))
	more, err2 := tagsOf(e.path("data"))
	if err != nil || err2 != nil || len(tags) != 3 || len(more) != 3 {
		t.Errorf("tags of a suspended VM: %v, %v, %v, %v", tags, err, more, err2)
	}
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
	e.wait(id, "resumed", func(vm api.VM) bool {
		if vm.Status.Phase == api.VMSuspended && strings.Contains(vm.Status.Message, "could not be loaded") {
			t.Fatal(vm.Status.Message)
		}
		return running(vm)
	})
	resumed := e.count(id, "resumed", after(atMemory.counter))
	if resumed.boot != p.boot {
		t.Fatalf("the guest booted instead of going on: %+v", resumed)
	}
	e.waitLong(id, "running with all it had", func(vm api.VM) bool { return running(vm) && len(vm.Status.Conditions) == 0 && pluggedIn(vm) })
	e.change(id, func(vm *api.VM) { vm.Spec.NICs, vm.Spec.Memory = nil, 160*api.MiB })
	e.waitLong(id, "the guest lets go after it was resumed", func(vm api.VM) bool {
		return len(vm.Status.Conditions) == 0 && len(vm.Status.Hardware.NICs) == 0 && vm.Status.Hardware.Memory == 160*api.MiB
	})

	e.request(id, api.ActionVMRevert, "memory", false)
	e.ended(id, api.TaskSucceeded)
	back := e.count(id, "reverted", func(q progress) bool { return q.counter < resumed.counter })
	e.waitLong(id, "reverted with all it had", func(vm api.VM) bool { return running(vm) && len(vm.Status.Conditions) == 0 && pluggedIn(vm) })
	if back.boot != p.boot || back.counter < p.counter {
		t.Fatalf("the guest is not where it was at %+v: %+v", p, back)
	}
	e.request(id, api.ActionVMRevert, "disks", false)
	e.ended(id, api.TaskSucceeded)
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	e.done(id, api.ActionVMForget, "memory", false)
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
	cold := e.count(id, "cold start", after(atMemory.counter))
	if cold.boot != p.boot+1 {
		t.Fatalf("the guest did not boot from the disks of then: %+v", cold)
	}
	e.done(id, api.ActionVMForget, "disks", false)
	e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	e.noTags("web1-disk0", "web1-disk1", "data")
	if out, err := exec.Command("qemu-img", "check", "-q", e.path("web1-disk0")).CombinedOutput(); err != nil {
		t.Errorf("the disk after all that: %v: %s", err, out)
	}
}

// plugEverything gives the guest a disk, a card, a CPU and memory while it runs: what is
// saved later is the memory of the machine as it is then.
func (e *env) plugEverything(id string) {
	e.t.Helper()
	e.ports.prefix = fmt.Sprintf("hvs%d-", os.Getpid()%100000) // QEMU makes the tap, and takes it with it
	lab := api.Network{Meta: api.NewMeta(api.KindNetwork, "", "lab"), Spec: api.NetworkSpec{Type: api.NetworkIsolated}}
	tx := &configdb.Txn{}
	must(e.t, configdb.Networks.Create(tx, &lab))
	e.commit(tx)
	e.volume("data", id)
	run(e.t, "qemu-img", "create", "-q", "-f", "qcow2", e.path("data"), "64M")
	e.change(id, func(vm *api.VM) {
		vm.Spec.Disks = append(vm.Spec.Disks, api.VMDisk{Volume: "data", Slot: 4, Limit: api.DiskLimit{IOPS: 500}})
		vm.Spec.NICs = []api.VMNIC{{Network: "lab", MAC: "52:54:00:00:00:78", Slot: 2}}
		vm.Spec.CPUs, vm.Spec.Memory = 2, 288*api.MiB
	})
	e.waitLong(id, "everything there", func(vm api.VM) bool { return len(vm.Status.Conditions) == 0 && pluggedIn(vm) })
}

func pluggedIn(vm api.VM) bool {
	h := vm.Status.Hardware
	return h != nil && h.CPUs == 2 && h.Memory == 288*api.MiB && len(h.Disks) == 3 && len(h.NICs) == 1
}

// savedWithFirmware takes a VM with UEFI and a TPM through a snapshot with memory,
// a suspend and a revert, and returns the process of its TPM.
func (e *env) savedWithFirmware(id, vars string) Process {
	t := e.t
	e.request(id, api.ActionVMSnapshot, "disks", false)
	if st := e.ended(id, api.TaskFailed); !strings.Contains(st.Message, "has a TPM") {
		t.Errorf("%+v", st)
	}
	e.done(id, api.ActionVMSnapshot, "a", true)
	s := e.snap(id, "a").Status
	if len(s.Disks) != 2 || s.Disks[1].Volume != "web1-uefi" || s.Machine == nil || s.Machine.CPU != "max" || !strings.HasPrefix(s.Machine.Type, "pc-q35-") {
		t.Errorf("%+v", s)
	}
	was := e.vm(id).Status.PID
	e.done(id, api.ActionVMSuspend, "", false)
	e.wait(id, "suspended", func(vm api.VM) bool { return vm.Status.Phase == api.VMSuspended && vm.Status.PID == 0 })
	if tags, err := tagsOf(vars); err != nil || len(tags) != 2 {
		t.Errorf("the variables have the tags %v, %v", tags, err)
	}
	if p, ok := e.guard.get(tpmPrefix + id); ok && p.State != ProcessExited {
		t.Errorf("suspended with its TPM left: %+v", p)
	}
	goesOn := func(what string) {
		t.Helper()
		vm := e.wait(id, what, func(vm api.VM) bool { return running(vm) && vm.Status.PID != was && !e.hasSaved(id) })
		if len(vm.Status.Conditions) > 0 {
			t.Errorf("%s: %+v", what, vm.Status.Conditions)
		}
		was = vm.Status.PID
	}
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
	goesOn("resumed")
	e.done(id, api.ActionVMRevert, "a", false)
	goesOn("reverted")
	e.done(id, api.ActionVMForget, "a", false)
	p, ok := e.guard.get(tpmPrefix + id)
	if !ok || p.State != ProcessRunning || !p.Protected {
		t.Fatalf("TPM process %+v", p)
	}
	return p
}

// A pool without space for the memory: nothing half-made stays, the guest goes on.
func TestRealSnapshotOnAFullPool(t *testing.T) {
	e := newEnv(t, true)
	small := smalldisk.Mount(t, 4<<20)
	path := filepath.Join(small, "disk.qcow2")
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", path, "64M").CombinedOutput(); err != nil {
		t.Fatalf("qemu-img: %v: %s", err, out)
	}
	e.vols.put("web1-disk0", path)
	id := e.vmWith(api.VMSpec{Power: api.PowerRunning}, []api.VMDisk{{Volume: "web1-disk0"}})
	e.wait(id, "running", running)
	giveBack := smalldisk.Fill(t, small)
	for _, action := range []api.Action{api.ActionVMSnapshot, api.ActionVMSuspend} {
		e.request(id, action, "a", true)
		if st := e.ended(id, api.TaskFailed); st.Code != api.CodeStorageFull {
			t.Errorf("%s: %+v", action, st)
		}
		if e.hasSaved(id) || len(e.snapshots(id)) != 0 {
			t.Errorf("%s left something", action)
		}
	}
	giveBack()
	vm := e.wait(id, "running", running)
	e.done(id, api.ActionVMSnapshot, "a", true)
	if now := e.vm(id); now.Status.PID != vm.Status.PID {
		t.Error("another process")
	}
	e.done(id, api.ActionVMForget, "a", false)
	e.done(id, api.ActionVMSuspend, "", false)
	e.wait(id, "suspended", func(vm api.VM) bool { return vm.Status.Phase == api.VMSuspended && vm.Status.PID == 0 })
	must(t, os.Truncate(path, 1<<20)) // the memory is lost behind our back
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
	e.until("told", func() bool {
		st, err := configdb.SavedStates.Get(e.db.Local(), id)
		vm := e.vm(id)
		return err == nil && st.Status.Message != "" || vm.Status.Phase == api.VMFailed
	}, func() string { return e.vm(id).Status.Message })
}
