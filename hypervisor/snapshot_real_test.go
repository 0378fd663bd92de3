// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
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
	e.until("a console", func() bool {
		c, err := e.h.Console(id)
		if err != nil {
			return false
		}
		ch, cancel, err = c.Subscribe(0)
		return err == nil
	}, nothing)
	defer cancel()
	var text strings.Builder
	for {
		b, open := <-ch
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
	spec.Memory = 96 * api.MiB
	return e.vmWith(spec, disks)
}

// One guest goes through everything: what it has counted says which moment it
// is in, and whether it booted or went on.
func TestRealGuestThroughSnapshotsSuspendAndRevert(t *testing.T) {
	e := newEnv(t, true)
	id := e.counterGuest(api.VMSpec{CPUs: 1, Power: api.PowerRunning})
	e.wait(id, "running", running)
	p := e.count(id, "first boot", after(3))
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
	t.Logf("memory of a 96 MiB guest: %s", s.Status.MemorySize)

	e.done(id, api.ActionVMSuspend, "", false)
	e.wait(id, "suspended", func(vm api.VM) bool { return vm.Status.Phase == api.VMSuspended && vm.Status.PID == 0 })
	tags, err := tagsOf(e.path("web1-disk0"))
	if err != nil || len(tags) != 3 {
		t.Errorf("tags of a suspended VM: %v, %v", tags, err)
	}
	e.change(id, func(vm *api.VM) { vm.Spec.Power = api.PowerRunning })
	resumed := e.count(id, "resumed", after(atMemory.counter))
	if resumed.boot != p.boot {
		t.Fatalf("the guest booted instead of going on: %+v", resumed)
	}
	e.wait(id, "running", running)

	e.request(id, api.ActionVMRevert, "memory", false)
	e.ended(id, api.TaskSucceeded)
	back := e.count(id, "reverted", func(q progress) bool { return q.counter < resumed.counter })
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
	e.noTags("web1-disk0", "web1-disk1")
	if out, err := exec.Command("qemu-img", "check", "-q", e.path("web1-disk0")).CombinedOutput(); err != nil {
		t.Errorf("the disk after all that: %v: %s", err, out)
	}
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
