// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/argv"
	"github.com/muster-vm/muster/hypervisor/memory"
)

// guestPatience is for a guest without KVM on a busy machine.
const guestPatience = 2 * time.Minute

// guest starts the tiny test guest as VM web1 and waits for its first line.
func (e *env) guest(spec api.VMSpec) (string, api.VM) {
	e.t.Helper()
	image, err := filepath.Abs("../build/guest/tiny.qcow2")
	must(e.t, err)
	if out, err := exec.Command("../scripts/guest-image").CombinedOutput(); err != nil {
		e.t.Fatalf("build the test guest: %v: %s", err, out)
	}
	disk := filepath.Join(e.runDir, "guest.qcow2")
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", disk).CombinedOutput(); err != nil {
		e.t.Fatalf("make the guest's disk: %v: %s", err, out)
	}
	e.vols.put("web1-disk0", disk)
	spec.Power = api.PowerRunning
	id := e.create("node-1", spec)
	e.wait(id, "running", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning })
	c, err := e.h.Console(id)
	must(e.t, err)
	deadline := time.Now().Add(guestPatience)
	for !strings.Contains(string(c.History(1<<20)), "counter=5") { // its drivers are loaded by then
		if time.Now().After(deadline) {
			e.t.Fatalf("the guest did not boot: %s", c.History(2000))
		}
		time.Sleep(100 * time.Millisecond)
	}
	return id, e.vm(id)
}

// waitLong is wait for what a guest takes its time for.
func (e *env) waitLong(id, what string, ok func(api.VM) bool) api.VM {
	e.t.Helper()
	deadline := time.Now().Add(guestPatience)
	for {
		vm := e.vm(id)
		if ok(vm) {
			return vm
		}
		if time.Now().After(deadline) {
			e.t.Fatalf("waited %v for: %s; spec %+v, status %+v, hardware %+v", guestPatience, what, vm.Spec, vm.Status, vm.Status.Hardware)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// ask has QEMU carry out what may be repeated, until it has answered.
func (e *env) ask(id, cmd string, args, out any) {
	e.t.Helper()
	var err error
	e.until("QEMU answers "+cmd, func() bool {
		err = e.h.instance(id).execute(e.t.Context(), cmd, args, out)
		return err == nil || refusal(err)
	}, func() string { return err.Error() })
	must(e.t, err)
}

// One real guest, to which everything comes and from which everything goes.
func TestRealGuestHotplug(t *testing.T) {
	e := newEnv(t, true)
	tx := &configdb.Txn{}
	lab := api.Network{Meta: api.NewMeta(api.KindNetwork, "", "lab"), Spec: api.NetworkSpec{Type: api.NetworkIsolated}}
	must(t, configdb.Networks.Create(tx, &lab))
	e.commit(tx)
	e.ports.prefix = fmt.Sprintf("hvt%d-", os.Getpid()%100000) // QEMU makes the tap, and takes it with it
	id, _ := e.guest(api.VMSpec{CPUs: 1, Memory: 160 * api.MiB, MaxMemory: 640 * api.MiB})
	quiet := func(vm api.VM) bool { return len(vm.Status.Conditions) == 0 }

	data := e.volume("data", id)
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", e.runDir+"/data", "64M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	began := time.Now()
	e.change(id, func(vm *api.VM) {
		vm.Spec.Disks = append(vm.Spec.Disks, api.VMDisk{Volume: "data", Slot: 3, Limit: api.DiskLimit{IOPS: 500, Burst: 2}})
		vm.Spec.NICs = []api.VMNIC{{Network: "lab", MAC: "52:54:00:00:00:77", Slot: 2}}
		vm.Spec.CPUs, vm.Spec.Memory = 2, 288*api.MiB
	})
	vm := e.waitLong(id, "everything there", func(vm api.VM) bool {
		h := vm.Status.Hardware
		return quiet(vm) && h.CPUs == 2 && h.Memory == 288*api.MiB && len(h.Disks) == 2 && len(h.NICs) == 1
	})
	t.Logf("all plugged in after %v", time.Since(began).Round(time.Millisecond))
	var mem []struct {
		Data struct {
			Size int64 `json:"size"`
		} `json:"data"`
	}
	e.ask(id, "query-memory-devices", nil, &mem)
	if len(mem) != 1 || mem[0].Data.Size != int64(128*api.MiB) {
		t.Errorf("the guest has %+v", mem)
	}
	e.until("the guest reads the disk", func() bool { return e.reads(id, argv.DiskNode(3)) > 0 }, nothing)

	// The same machine, built from the status alone: QEMU takes it.
	s := &step{h: e.h, v: e.db.Local(), vm: vm, in: e.h.instance(id), now: time.Now()}
	m, ok := s.machine(vm.Status.Hardware)
	if !ok {
		t.Fatal("no machine")
	}
	m.NICs = []argv.NIC{{Slot: 2, Device: "hvtx", MAC: "52:54:00:00:00:77"}}
	args, err := argv.Build(m)
	must(t, err)
	all := strings.Join(args, " ")
	for _, w := range []string{"cpus=2,maxcpus=4", "size=160M,maxmem=640M", "requested-size=134217728", "id=vd3,drive=disk3,bus=pd3", "id=nic2,netdev=net2,mac=52:54:00:00:00:77,bus=pn2"} {
		if !strings.Contains(all, w) {
			t.Errorf("%q is not in %s", w, all)
		}
	}

	e.ask(id, "block_resize", map[string]any{"node-name": argv.DiskNode(3), "size": int64(128 * api.MiB)}, nil)

	began = time.Now()
	e.detach(id, data)
	e.change(id, func(vm *api.VM) { vm.Spec.NICs, vm.Spec.Memory = nil, 160*api.MiB })
	e.waitLong(id, "everything gone", func(vm api.VM) bool {
		h := vm.Status.Hardware
		return quiet(vm) && h.Memory == 160*api.MiB && len(h.Disks) == 1 && len(h.NICs) == 0
	})
	t.Logf("all let go of after %v", time.Since(began).Round(time.Millisecond))
	e.until("released", func() bool { return !e.referred(data) }, nothing)
	var nodes []struct {
		Node string `json:"node-name"`
	}
	e.ask(id, "query-named-block-nodes", nil, &nodes)
	for _, n := range nodes {
		if n.Node == argv.DiskNode(3) || n.Node == argv.FileNode(3) {
			t.Errorf("QEMU has %s open", n.Node)
		}
	}
	e.squeezeRealGuest(id)
	e.change(id, func(vm *api.VM) { vm.Spec.CPUs = 1 })
	vm = e.waitLong(id, "pending", func(vm api.VM) bool { return strings.Contains(condition(vm, ConditionPendingRestart), "cpus") })
	if vm.Status.Phase != api.VMRunning || vm.Status.Crashes != 0 {
		t.Errorf("%+v", vm.Status)
	}
}

// squeezeRealGuest takes memory from a real guest by its balloon, and gives it
// back.
func (e *env) squeezeRealGuest(id string) {
	t := e.t
	actual := func() api.Size {
		var b struct {
			Actual int64 `json:"actual"`
		}
		e.ask(id, "query-balloon", nil, &b)
		return api.Size(b.Actual)
	}
	e.nodeMemory(130*api.MiB + api.OverheadPerVM)
	e.change(id, func(vm *api.VM) { vm.Spec.MemoryMin = 100 * api.MiB })
	began := time.Now()
	e.waitLong(id, "squeezed", func(vm api.VM) bool {
		e.h.BalanceNow(t.Context())
		return target(vm) == 130*api.MiB && actual() < 160*api.MiB // it gives what it can spare
	})
	t.Logf("squeezed to %s after %v", actual(), time.Since(began).Round(time.Millisecond))
	e.waitLong(id, "the guest's word", func(vm api.VM) bool {
		e.h.BalanceNow(t.Context())
		e.h.mu.Lock()
		defer e.h.mu.Unlock()
		used := e.h.instances[id].balloon.vm.Used
		return used > 16*api.MiB && used < 160*api.MiB
	})
	e.nodeMemory(64 * api.GiB)
	e.clock.advance(memory.Cooldown)
	e.waitLong(id, "given back", func(vm api.VM) bool {
		e.h.BalanceNow(t.Context())
		return target(vm) == 160*api.MiB && actual() == 160*api.MiB
	})
	e.change(id, func(vm *api.VM) { vm.Spec.MemoryMin = 0 })
	e.waitLong(id, "nothing to say", func(vm api.VM) bool { return vm.Status.Memory == nil })
}

// reads counts the requests that a guest sent to a disk.
func (e *env) reads(id, node string) int {
	e.t.Helper()
	var stats []struct {
		Node  string `json:"node-name"`
		Stats struct {
			Reads int `json:"rd_operations"`
		} `json:"stats"`
	}
	e.ask(id, "query-blockstats", nil, &stats)
	for _, s := range stats {
		if s.Node == node {
			return s.Stats.Reads
		}
	}
	return 0
}

// A QEMU whose guest never boots takes devices, and keeps those that it is asked
// to give back; the volume stays.
func TestRealQEMUWithoutAGuestKeepsADisk(t *testing.T) {
	e := newEnv(t, true)
	id, _ := e.running(api.VMSpec{})
	data := e.volume("data", id)
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", e.runDir+"/data", "64M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	e.attach(id, "data", 4)
	e.wait(id, "attached", hasDisk(4))
	e.detach(id, data)
	e.wait(id, "asked", func(vm api.VM) bool { return condition(vm, ConditionChanging) != "" })
	e.clock.advance(UnplugTimeout)
	e.h.Wake()
	vm := e.wait(id, "the condition", func(vm api.VM) bool { return condition(vm, ConditionUnplugIgnored) != "" })
	if !e.referred(data) || !hasDisk(4)(vm) {
		t.Fatal("released while QEMU has it open")
	}
	var list []struct{ Name string }
	e.ask(id, "qom-list", map[string]any{"path": "/machine/peripheral"}, &list)
	if !slices.ContainsFunc(list, func(o struct{ Name string }) bool { return o.Name == "vd4" }) {
		t.Error(list)
	}
	// A broken file is refused by QEMU and leaves nothing.
	must(t, os.WriteFile(e.runDir+"/broken", []byte("no qcow2"), 0o600))
	e.volume("broken", id)
	e.attach(id, "broken", 2)
	vm = e.wait(id, "refusal", func(vm api.VM) bool {
		return strings.Contains(condition(vm, ConditionHotplugFailed), "disk broken (slot 2)")
	})
	t.Log(condition(vm, ConditionHotplugFailed))
	if hasDisk(2)(vm) {
		t.Error("the status has it")
	}
}
