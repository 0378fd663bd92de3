// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/argv"
	"github.com/muster-vm/muster/hypervisor/qmp"
	"github.com/muster-vm/muster/internal/uefi"
)

// need fails the test if a program or file that it needs is missing.
func need(t *testing.T, path, pkg string) string {
	t.Helper()
	if !strings.HasPrefix(path, "/") {
		if p, err := exec.LookPath(path); err == nil {
			return p
		}
	} else if _, err := os.Stat(path); err == nil {
		return path
	}
	t.Fatalf("this test needs %s: install the package %s", path, pkg)
	return ""
}

func run(t *testing.T, program string, args ...string) {
	t.Helper()
	if out, err := exec.Command(program, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v: %s", program, args, err, out)
	}
}

// machineFor is a machine whose files exist in dir.
func machineFor(t *testing.T, dir string) argv.Machine {
	disk := func(name string) string {
		path := filepath.Join(dir, name)
		run(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
		return path
	}
	return argv.Machine{
		QEMU: need(t, "qemu-system-x86_64", "qemu-system-x86"), ID: "0198a000-0000-7000-8000-000000000001", Name: "web1",
		CPUs: 2, Memory: 128 * api.MiB, Accelerator: api.AccelTCG, Paused: true,
		Disks: []argv.Disk{{Slot: 1, Path: disk("a.qcow2"), Format: "qcow2"}, {Slot: 2, Path: disk("b.qcow2"), Format: "qcow2"}},
		QMP:   dir + "/qmp", Agent: dir + "/ga", Serial: dir + "/serial", Log: dir + "/log",
	}
}

// QEMU itself takes what the golden files have, and has the devices that others
// look for by their names.
func TestRealQEMUTakesEveryBoard(t *testing.T) {
	zero := 0
	for name, c := range map[string]struct {
		change  func(m *argv.Machine)
		devices []string
	}{
		"pc with everything": {func(m *argv.Machine) {
			m.Type, m.Watchdog = api.MachinePC, api.WatchdogPause
			m.VNC = filepath.Dir(m.QMP) + "/vnc"
			m.Disks[0].Options = api.VMDisk{Bus: api.BusIDE}
			m.Disks[1].Options = api.VMDisk{Bus: api.BusSCSI, IOThread: true}
			m.CDROMs = []argv.CDROM{{Bus: api.BusIDE}, {Bus: api.BusSCSI}}
		}, []string{"vd1", "vd2", "cd0", "cd1", argv.WatchdogID, "video0", "tablet0"}},
		"q35 with every bus": {func(m *argv.Machine) {
			m.VNC = filepath.Dir(m.QMP) + "/vnc"
			m.CPUs, m.CPU, m.Sockets, m.Cores, m.Threads = 4, "qemu64,+aes,enforce=on", 1, 2, 2
			m.Disks[0].Options = api.VMDisk{IOThread: true, Queues: 2, AIO: api.AIOURing, Discard: api.DiscardIgnore}
			m.Disks[1].Options = api.VMDisk{Bus: api.BusSATA, Cache: api.CacheWritethrough}
			m.CDROMs = []argv.CDROM{{Bus: api.BusSATA, Path: m.Disks[0].Path + ".iso", Format: "raw"}, {Bus: api.BusSATA}}
			m.BootOrder = []string{"cdrom0", "disk1"}
		}, []string{"vd1", "vd2", "cd0", "cd1", "video0"}},
		"numa": {func(m *argv.Machine) {
			m.NUMA = []api.VMNUMANode{{CPUs: "0", Memory: 64 * api.MiB, HostNode: &zero}, {CPUs: "1", Memory: 64 * api.MiB}}
			m.Extra = []string{"-device", "edu,id=lab"}
		}, []string{"vd1", "lab"}},
		"microvm": {func(m *argv.Machine) { m.Type = api.MachineMicroVM }, []string{"vd1", "vd2", "balloon0"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir, err := os.MkdirTemp("", "hv")
			must(t, err)
			defer os.RemoveAll(dir)
			m := machineFor(t, dir)
			must(t, os.WriteFile(m.Disks[0].Path+".iso", make([]byte, 1<<20), 0o600))
			c.change(&m)
			args, err := argv.Build(m)
			must(t, err)
			conn := startQEMU(t, args, m.QMP)
			for _, id := range c.devices {
				var props []any
				if err := conn.Execute(t.Context(), "qom-list", map[string]string{"path": "/machine/peripheral/" + id}, &props); err != nil {
					t.Errorf("device %s: %v", id, err)
				}
			}
			if m.VNC != "" {
				if _, err := os.Stat(m.VNC); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// startQEMU runs QEMU until the test ends and returns its monitor.
func startQEMU(t *testing.T, args []string, socket string) *qmp.Conn {
	t.Helper()
	log := &strings.Builder{}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	must(t, cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
	})
	for end := time.Now().Add(patience); ; {
		conn, err := qmp.Dial(t.Context(), socket)
		if err == nil {
			t.Cleanup(func() { _ = conn.Disconnect() })
			return conn
		}
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("QEMU ended: %v: %s", err, log)
		case <-time.After(attachRetry):
		}
		if time.Now().After(end) {
			t.Fatalf("QEMU does not answer: %v", err)
		}
	}
}

// stateVolume adds a volume that is ready, with its file, to the database.
func (e *env) stateVolume(name, path string, content api.VolumeContent, size api.Size) {
	e.t.Helper()
	vol := api.Volume{Meta: api.NewMeta(api.KindVolume, "", name), Spec: api.VolumeSpec{Content: content}, Status: api.VolumeStatus{Phase: api.StorageReady, Size: size}}
	must(e.t, vol.Prepare())
	tx := &configdb.Txn{}
	must(e.t, configdb.Volumes.Create(tx, &vol))
	e.commit(tx)
	e.vols.put(name, path)
}

// esp makes a disk whose EFI/BOOT/BOOTX64.EFI is a program.
func (e *env) esp(program []byte) string {
	e.t.Helper()
	dir := filepath.Join(e.runDir, "esp")
	must(e.t, os.MkdirAll(filepath.Join(dir, "EFI/BOOT"), 0o700))
	must(e.t, os.WriteFile(filepath.Join(dir, "EFI/BOOT/BOOTX64.EFI"), program, 0o600))
	path := filepath.Join(e.runDir, "esp.qcow2")
	run(e.t, "qemu-img", "convert", "-O", "qcow2", "fat:"+dir, path)
	return path
}

// A VM with UEFI, Secure Boot and a TPM: the firmware runs a loader that
// Microsoft signed and refuses the same one with a byte changed; TPM state and
// variables are files of the VM, which it finds again after a restart.
func TestRealSecureBootAndTPM(t *testing.T) {
	need(t, "swtpm", "swtpm")
	shim, err := os.ReadFile(need(t, "/usr/lib/shim/shimx64.efi.signed", "shim-signed"))
	must(t, err)
	fw, err := uefi.Find(uefi.Dirs(), true, 0)
	if err != nil {
		t.Fatalf("this test needs UEFI firmware: %v", err)
	}
	e := newEnv(t, true)
	vars, tpm := filepath.Join(e.runDir, "vars.qcow2"), filepath.Join(e.runDir, "tpm.raw")
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", fw.Vars, vars)
	must(t, os.WriteFile(tpm, nil, 0o600))
	e.stateVolume("web1-uefi", vars, api.ContentUEFISecure, api.Size(fw.VarsSize))
	e.stateVolume("web1-tpm", tpm, api.ContentTPM, 0)
	e.vols.put("web1-disk0", e.esp(shim))
	id := e.create("node-1", api.VMSpec{
		Power: api.PowerRunning, HA: api.HARestart, Memory: 256 * api.MiB,
		Firmware: &api.VMFirmware{Type: api.FirmwareUEFI, SecureBoot: true, Volume: "web1-uefi"}, TPM: &api.VMTPM{Volume: "web1-tpm"},
	})
	vm := e.wait(id, "running", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning && vm.Status.CPU != "" })
	if vm.Status.CPU != "max" {
		t.Error("cpu", vm.Status.CPU)
	}
	e.until("the signed loader runs", e.printed(id, `Failed to open \EFI\BOOT\grubx64.efi`), e.serial(id))

	told, err := e.h.QEMU(t.Context(), id, api.MaxQEMULog)
	if err != nil || told.PID != vm.Status.PID || !slices.Contains(told.Argv, "driver=cfi.pflash01,property=secure,value=on") {
		t.Errorf("QEMU is told as %+v, %v", told.Argv, err)
	}
	if !slices.ContainsFunc(told.Log, func(e api.QEMULogEntry) bool { return e.Kind == qmp.LogReply && e.Name == "query-status" }) {
		t.Errorf("monitor %+v", told.Log)
	}

	// swtpm is the guard's, protected as the VM, and its end is noticed.
	p, ok := e.guard.get(tpmPrefix + id)
	if !ok || p.State != ProcessRunning || !p.Protected {
		t.Fatalf("TPM process %+v", p)
	}
	first, err := os.ReadFile(tpm)
	if err != nil || len(first) == 0 {
		t.Fatalf("the TPM has %d bytes of state: %v", len(first), err)
	}
	if st, err := os.Stat(tpm); err != nil || st.Mode().Perm() != 0o600 {
		t.Error("the TPM's state can be read by others:", st.Mode(), err)
	}
	// Another daemon finds both as they were.
	e.stop()
	e.begin()
	e.until("adopted", func() bool { _, err := e.h.Console(id); return err == nil }, nothing)
	if now := e.vm(id); now.Status.PID != vm.Status.PID || len(now.Status.Conditions) > 0 {
		t.Errorf("after a restart of the daemon: %+v", now.Status)
	}
	p = e.savedWithFirmware(id, vars)
	must(t, syscall.Kill(p.PID, syscall.SIGKILL))
	e.wait(id, "told that the TPM is gone", func(vm api.VM) bool {
		_, bad := api.FindCondition(vm.Status.Conditions, ConditionTPM)
		return bad
	})
	e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped && vm.Status.PID == 0 })
	if p, ok := e.guard.get(tpmPrefix + id); ok && p.State != ProcessExited {
		t.Errorf("stopped with its TPM left: %+v", p)
	}

	broken := append([]byte(nil), shim...)
	broken[len(broken)/2] ^= 1
	e.vols.put("web1-disk0", e.esp(broken))
	must(t, os.WriteFile(e.h.pathsOf(id).serialLog, nil, 0o600))
	e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerRunning, false })
	vm = e.wait(id, "running again", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning && vm.Status.PID != 0 })
	if len(vm.Status.Conditions) > 0 {
		t.Errorf("conditions %+v", vm.Status.Conditions)
	}
	e.until("the changed loader is refused", e.printed(id, "Access Denied"), e.serial(id))
}

// printed looks for a text in what the VM's serial port wrote.
func (e *env) printed(id, text string) func() bool {
	return func() bool { return strings.Contains(e.serial(id)(), text) }
}

func (e *env) serial(id string) func() string {
	return func() string {
		b, _ := os.ReadFile(e.h.pathsOf(id).serialLog)
		return string(b)
	}
}

// bootSector prints a text on the serial port and halts.
func bootSector(text string) []byte {
	code := []byte{
		0xfa, 0xfc, 0x31, 0xc0, 0x8e, 0xd8, // cli; cld; xor ax,ax; mov ds,ax
		0xbe, 0x00, 0x7c, // mov si, text
		0xba, 0xf8, 0x03, // mov dx, 0x3f8
		0xac, 0x84, 0xc0, 0x74, 0x03, // next: lodsb; test al,al; jz stop
		0xee, 0xeb, 0xf8, // out dx,al; jmp next
		// stop: hlt; jmp stop
	}
	stop := []byte{0xf4, 0xeb, 0xfd}
	code[7] = byte(len(code) + len(stop)) // text follows
	sector := make([]byte, 512)
	copy(sector, append(append(code, stop...), text...))
	sector[510], sector[511] = 0x55, 0xaa
	return sector
}

// A guest boots from each bus, from the second disk if it comes first in the
// boot order.
func TestRealBootFromEveryBus(t *testing.T) {
	for name, spec := range map[string]api.VMSpec{
		"virtio": {Disks: []api.VMDisk{{AIO: api.AIOURing, IOThread: true}}},
		"scsi":   {Disks: []api.VMDisk{{Bus: api.BusSCSI}}},
		"sata":   {Disks: []api.VMDisk{{Bus: api.BusSATA}}},
		"ide":    {Machine: api.MachinePC, Disks: []api.VMDisk{{Bus: api.BusIDE}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, err := os.MkdirTemp("", "hv")
			must(t, err)
			defer os.RemoveAll(dir)
			m := machineFor(t, dir)
			raw := filepath.Join(dir, "boot.raw")
			must(t, os.WriteFile(raw, append(bootSector("it boots from "+name+"\r\n"), make([]byte, 1<<20)...), 0o600))
			// The second disk is booted; the first one is blank.
			m.Type, m.Paused = spec.Machine, false
			m.Disks[1] = argv.Disk{Slot: 2, Path: raw, Format: "raw", Options: spec.Disks[0]}
			m.BootOrder = []string{"disk1", "disk0"}
			args, err := argv.Build(m)
			must(t, err)
			startQEMU(t, args, m.QMP)
			awaitText(t, m.Log, "it boots from "+name)
		})
	}
}

// awaitText waits until a file has a text.
func awaitText(t *testing.T, path, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		b, _ := os.ReadFile(path)
		if strings.Contains(string(b), text) {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%q is not in %q", text, b)
		case <-time.After(attachRetry):
		}
	}
}

// bootDisk puts a program that the BIOS starts on the VM's disk.
func (e *env) bootDisk(program []byte) {
	e.t.Helper()
	sector := make([]byte, 1<<20)
	copy(sector, program)
	sector[510], sector[511] = 0x55, 0xaa
	raw, disk := filepath.Join(e.runDir, "boot.raw"), filepath.Join(e.runDir, "boot.qcow2")
	must(e.t, os.WriteFile(raw, sector, 0o600))
	run(e.t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, disk)
	e.vols.put("web1-disk0", disk)
}

// A guest that panics is seen: its only program tells the panic device.
func TestRealGuestPanicIsSeen(t *testing.T) {
	e := newEnv(t, true)
	e.bootDisk([]byte{0xba, 0x05, 0x05, 0xb0, 0x01, 0xee, 0xf4, 0xeb, 0xfd}) // mov dx,0x505; mov al,1; out dx,al; hlt; jmp
	id := e.create("node-1", api.VMSpec{Power: api.PowerRunning})
	e.wait(id, "told of the panic", func(vm api.VM) bool {
		_, bad := api.FindCondition(vm.Status.Conditions, ConditionGuestPanicked)
		return bad
	})
	if _, err := e.h.QEMU(t.Context(), "0198a000-0000-7000-8000-00000000000f", 1); api.CodeOf(err) != api.CodeRefused {
		t.Error("the QEMU of a VM that does not run:", err)
	}
}

// watchdogProgram finds the Intel 6300ESB by the PCI BIOS, sets both stages of
// its timer to the shortest time and starts it, and never feeds it. It reaches the
// registers with 32-bit addresses from real mode.
const watchdogProgram = "fafc31c08ed88ed0bc0070" + // cli; cld; ds = ss = 0; sp = 0x7000
	"b802b1b9ab25ba868031f6cd1a7247" + // find device 8086:25ab; jc stop
	"b80ab1bf1000cd1a723d6683e1f06689cd" + // ebp = address register 0 & ~15
	"660f0116987c0f20c00c010f22c0ba08008eda24fe0f22c031d28eda" + // lgdt; a flat ds, in protected mode and back
	"6631f6e8180066be04000000e80f00" + // preload both stages
	"b80bb1bf6800b90200cd1a" + // lock register: enable
	"fbf4ebfd" + // stop: sti; hlt; jmp
	"b880003e6789450cb886003e6789450c66b8010000003e676689443500c3" + // set: unlock; write 1
	"8db40000900000000000000000ffff00000092cf000f00887c0000" // the GDT and its register

// A guest that does not feed its watchdog is paused, if that is what the VM's
// watchdog is to do.
func TestRealWatchdogPausesTheGuest(t *testing.T) {
	e := newEnv(t, true)
	program, err := hex.DecodeString(watchdogProgram)
	must(t, err)
	e.bootDisk(program)
	id := e.create("node-1", api.VMSpec{Power: api.PowerRunning, Watchdog: &api.VMWatchdog{Action: api.WatchdogPause}})
	e.wait(id, "halted by the watchdog", func(vm api.VM) bool {
		c, bad := api.FindCondition(vm.Status.Conditions, ConditionGuestHalted)
		return bad && strings.Contains(c.Message, "watchdog")
	})
}

// kernel is the smallest one that the boot protocol of Linux (x86/boot.rst,
// version 2.02) lets in: its setup prints a text on the serial port.
func kernel(text string) []byte {
	const setupSectors, entry = 4, 0x268
	k := make([]byte, (setupSectors+2)*512)
	k[0x1f1], k[0x1fe], k[0x1ff] = setupSectors, 0x55, 0xaa
	copy(k[0x200:], []byte{0xeb, entry - 0x202}) // jmp entry
	copy(k[0x202:], "HdrS\x02\x02")
	k[0x211] = 1 // loaded high
	code := []byte{
		0xfa, 0xfc, 0xbe, 0x00, 0x00, // cli; cld; mov si, text
		0xba, 0xf8, 0x03, // mov dx, 0x3f8
		0xac, 0x84, 0xc0, 0x74, 0x03, // next: lodsb; test al,al; jz stop
		0xee, 0xeb, 0xf8, // out dx,al; jmp next
		0xf4, 0xeb, 0xfd, // stop: hlt; jmp stop
	}
	at := entry + len(code)
	code[3], code[4] = byte(at), byte(at>>8)
	copy(k[entry:], append(code, text...))
	return k
}

// A kernel is started without a boot loader, also where nothing else is: on a
// microvm.
func TestRealKernelIsStarted(t *testing.T) {
	for _, machine := range []api.MachineType{api.MachineQ35, api.MachineMicroVM} {
		t.Run(string(machine), func(t *testing.T) {
			t.Parallel()
			dir, err := os.MkdirTemp("", "hv")
			must(t, err)
			defer os.RemoveAll(dir)
			m := machineFor(t, dir)
			image := filepath.Join(dir, "kernel.raw")
			must(t, os.WriteFile(image, kernel("it is a kernel\r\n"), 0o600))
			m.Type, m.Paused = machine, false
			m.Kernel = &argv.Kernel{Image: image, Cmdline: "console=ttyS0"}
			args, err := argv.Build(m)
			must(t, err)
			startQEMU(t, args, m.QMP)
			awaitText(t, m.Log, "it is a kernel")
		})
	}
}
