// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/hypervisor/qmp"
	"github.com/muster-vm/muster/internal/access"
)

var testUsers = Users{Group: 70000, First: 70001, Last: 70040}

func TestUsersAreNeverShared(t *testing.T) {
	cfg := Users{Group: 70000, First: 70001, Last: 70010, Taken: map[int]bool{70004: true}}
	tab := newUserTable(cfg)
	procs := map[string]Process{"adopted": {VM: "adopted", State: ProcessRunning, UID: 70007}, "ended": {VM: "ended", State: ProcessExited, UID: 70008}}
	seen := map[int]string{70004: "the host", 70007: "adopted"}
	for i := range 8 {
		vm := fmt.Sprint("vm-", i)
		uid, err := tab.assign(vm, procs, nil)
		must(t, err)
		if uid < cfg.First || uid > cfg.Last || seen[uid] != "" {
			t.Fatalf("%s got %d, which is %q's", vm, uid, seen[uid])
		}
		seen[uid] = vm
		if again, err := tab.assign(vm, procs, nil); err != nil || again != uid {
			t.Fatalf("asked again: %d, %v, was %d", again, err, uid)
		}
	}
	if _, err := tab.assign("one too many", procs, nil); !errors.Is(err, errNoUser) {
		t.Fatal(err)
	}
	tab.note("adopted", 70007)
	if uid, err := tab.assign("adopted", procs, nil); err != nil || uid != 70007 {
		t.Fatalf("what runs keeps its user: %d, %v", uid, err)
	}
	tab.release("vm-3")
	if _, err := tab.assign("one too many", procs, nil); err != nil {
		t.Fatal(err)
	}
}

// Two nodes that run nothing else give a VM the same user.
func TestUserFollowsFromTheID(t *testing.T) {
	a, b := newUserTable(testUsers), newUserTable(testUsers)
	different := map[int]bool{}
	for i := range 20 {
		vm := fmt.Sprint("0198f0c2-", i)
		x, err1 := a.assign(vm, nil, nil)
		y, err2 := b.assign(vm, nil, nil)
		if err1 != nil || err2 != nil || x != y {
			t.Fatalf("%d, %v and %d, %v", x, err1, y, err2)
		}
		different[x] = true
		a.release(vm)
		b.release(vm)
	}
	if len(different) < 5 {
		t.Fatalf("only %d different users for 20 VMs", len(different))
	}
}

func (e *env) withUsers() {
	e.t.Helper()
	e.stop()
	e.users = testUsers
	e.begin()
}

func ownerOf(t *testing.T, path string) (uid, gid int) {
	t.Helper()
	st, err := os.Lstat(path)
	must(t, err)
	sys := st.Sys().(*syscall.Stat_t)
	return int(sys.Uid), int(sys.Gid)
}

func TestRealQEMURunsAsAUserOfItsOwn(t *testing.T) {
	e := newEnv(t, true)
	e.withUsers()
	id, vm := e.running(api.VMSpec{})
	other := filepath.Join(e.runDir, "other.qcow2")
	must(t, exec.Command("qemu-img", "create", "-q", "-f", "qcow2", other, "1G").Run())
	e.vols.put("web2-disk0", other)
	id2 := e.createNamed("web2", "node-1", api.VMSpec{Power: api.PowerRunning})
	vm2 := e.wait(id2, "running", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning && vm.Status.PID != 0 })

	uid, uid2 := e.h.UserOf(id), e.h.UserOf(id2)
	if uid == uid2 || uid < testUsers.First || uid > testUsers.Last {
		t.Fatalf("users %d and %d", uid, uid2)
	}
	for pid, want := range map[int]int{vm.Status.PID: uid, vm2.Status.PID: uid2} {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		text := strings.Join(strings.Fields(string(status)), " ")
		if err != nil || !strings.Contains(text, fmt.Sprintf("Uid: %[1]d %[1]d %[1]d %[1]d Gid: %[1]d", want)) || !strings.Contains(text, "CapEff: 0000000000000000") {
			t.Errorf("pid %d: %s, %v", pid, text, err)
		}
	}
	p := e.h.pathsOf(id)
	if u, g := ownerOf(t, p.dir); u != 0 || g != uid {
		t.Errorf("the run directory is %d:%d's", u, g)
	}
	if u, _ := ownerOf(t, p.qmp); u != uid {
		t.Errorf("the monitor is %d's", u)
	}
	if u, _ := ownerOf(t, p.qemuLog); u != 0 {
		t.Errorf("QEMU's log is %d's", u)
	}
	if u, _ := ownerOf(t, other); u != uid2 {
		t.Errorf("the second disk is %d's", u)
	}
	for _, path := range []string{other, e.h.pathsOf(id2).qmp, e.h.pathsOf(id2).serialLog, p.qemuLog, "/dev/kvm"} {
		if access.CanOpen(path, uid, uid) == nil {
			t.Errorf("user %d of the first VM can open %s", uid, path)
		}
	}
	c, err := e.h.Console(id)
	must(t, err)
	e.until("serial output", func() bool { return strings.Contains(string(c.History(1<<16)), "SeaBIOS") }, nothing)
	e.until("its copy", e.printed(id, "SeaBIOS"), e.serial(id)) // QEMU writes it a moment later
	if c := e.h.isolationCondition(); !c.OK {
		t.Errorf("%+v", c)
	}

	e.stop() // the next life learns the users from the guard
	e.begin()
	e.until("adopted", func() bool { _, err := e.h.Console(id); return err == nil && e.h.UserOf(id) == uid }, nothing)
	must(t, syscall.Kill(vm.Status.PID, syscall.SIGKILL))
	e.wait(id, "restarted", func(vm api.VM) bool { return vm.Status.Crashes == 1 && vm.Status.Phase == api.VMRunning })
	if got := e.h.UserOf(id); got != uid {
		t.Errorf("after the restart it is user %d, was %d", got, uid)
	}
}

func TestVMOfAnEarlierSettingIsNamed(t *testing.T) {
	e := newEnv(t, false)
	if c := e.h.isolationCondition(); c.OK || c.Reason != "Off" {
		t.Fatalf("%+v", c)
	}
	id, _ := e.running(api.VMSpec{})
	e.withUsers()
	e.until("named", func() bool { c := e.h.isolationCondition(); return c.Reason == "StartedEarlier" }, nothing)
	e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	e.until("over", func() bool { return e.h.isolationCondition().OK }, nothing)
}

func TestNodeWithoutUsersSaysWhy(t *testing.T) {
	e := newEnv(t, false)
	e.stop()
	e.users = Users{Problem: "musterd lacks CAP_SETUID"}
	e.begin()
	if c := e.h.isolationCondition(); c.OK || c.Reason != "NoUsers" || !strings.Contains(c.Message, "CAP_SETUID") {
		t.Fatalf("%+v", c)
	}
}

// What a QEMU that was taken over leaves in its run directory harms nobody.
func TestTrapsInTheRunDirectoryAreRemoved(t *testing.T) {
	dir, err := os.MkdirTemp("", "hv")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	precious := filepath.Join(dir, "precious")
	must(t, os.WriteFile(precious, []byte("data"), 0o600))
	p := paths{dir: filepath.Join(dir, "vm", "a")}
	p.qmp, p.serialLog, p.qemuLog = filepath.Join(p.dir, "qmp"), filepath.Join(p.dir, "log"), filepath.Join(p.dir, "qemu.log")
	must(t, os.MkdirAll(p.dir, 0o700))
	u := &ProcessUser{UID: 70005, GID: 70005, Groups: []int{70000}}
	must(t, handDir(p, u, 70000))
	must(t, os.WriteFile(p.qemuLog, nil, 0o600))
	as := func(args ...string) error {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 70005, Gid: 70005, Groups: []uint32{70000}}}
		return cmd.Run()
	}
	must(t, as("/bin/ln", "-s", precious, filepath.Join(p.dir, "vnc")))
	must(t, as("/bin/mkdir", filepath.Join(p.dir, "sub")))
	must(t, as("/bin/sh", "-c", "echo boot >>"+p.serialLog))
	for _, attack := range [][]string{
		{"/bin/rm", "-f", p.qemuLog}, {"/bin/mv", p.serialLog, p.dir + "/x"}, {"/bin/rm", "-f", p.serialLog}, {"/bin/chmod", "777", p.dir},
		{"/bin/ls", dir}, {"/bin/cat", precious},
	} {
		if as(attack...) == nil {
			t.Errorf("%v succeeded", attack)
		}
	}
	must(t, handDir(p, u, 70000))
	entries, err := os.ReadDir(p.dir)
	must(t, err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if got := strings.Join(names, " "); got != "log qemu.log" {
		t.Errorf("left: %s", got)
	}
	if b, err := os.ReadFile(precious); err != nil || string(b) != "data" {
		t.Errorf("%q, %v", b, err)
	}
	if uid, _ := ownerOf(t, precious); uid != 0 {
		t.Error("precious was given away")
	}
}

// A monitor socket that leads to another VM's is refused.
func TestMonitorOfAnotherProcessIsRefused(t *testing.T) {
	dir, err := os.MkdirTemp("", "hv")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	l, err := net.Listen("unix", filepath.Join(dir, "victim"))
	must(t, err)
	t.Cleanup(func() { _ = l.Close() })
	link := filepath.Join(dir, "qmp")
	must(t, os.Symlink(filepath.Join(dir, "victim"), link))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := qmp.DialLogged(ctx, link, os.Getpid()+1, nil); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("process %d listens", os.Getpid())) {
		t.Fatal(err)
	}
}

func TestDevicesOfTheHostAreFound(t *testing.T) {
	root := t.TempDir()
	for path, text := range map[string]string{
		"1-1/idVendor": "1234\n", "1-1/idProduct": "5678\n", "1-1/busnum": "1\n", "1-1/devnum": "12\n", "1-1:1.0/bInterfaceClass": "03\n",
		"2-1/idVendor": "1234\n", "2-1/idProduct": "0001\n", "2-1/busnum": "2\n", "2-1/devnum": "3\n",
	} {
		path = filepath.Join(root, "sys/bus/usb/devices", path)
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		must(t, os.WriteFile(path, []byte(text), 0o644))
	}
	pci := filepath.Join(root, "sys/bus/pci/devices/0000:01:00.0")
	must(t, os.MkdirAll(pci, 0o755))
	must(t, os.Symlink("../../../../kernel/iommu_groups/7", filepath.Join(pci, "iommu_group")))
	for want, d := range map[string]api.VMHostDevice{"dev/bus/usb/001/012": {USB: "1234:5678"}, "dev/vfio/7": {PCI: "0000:01:00.0"}} {
		got, err := deviceNodes(root, d)
		if err != nil || len(got) != 1 || got[0] != filepath.Join(root, want) {
			t.Errorf("%+v: %v, %v", d, got, err)
		}
	}
	if got, err := deviceNodes(root, api.VMHostDevice{PCI: "0000:02:00.0"}); err == nil {
		t.Errorf("a device that is not there: %v", got)
	}
}
