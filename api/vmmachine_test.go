// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"encoding/json"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func vmOf(t *testing.T, text string) (VM, error) {
	t.Helper()
	vm := VM{Meta: NewMeta(KindVM, "", "web1")}
	if err := DecodeStrict(strings.NewReader(text), &vm.Spec); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return vm, vm.Prepare()
}

const oneDisk = `"disks":[{"size":1073741824}]`

func TestMachinesThatCannotBeAreRefusedByField(t *testing.T) {
	for text, want := range map[string]string{
		`{"machine":"i440fx"}`:                                                                    "spec.machine",
		`{"cpus":4,"cpu":{"sockets":3}}`:                                                          "spec.cpu",
		`{"cpus":4,"cpu":{"sockets":2,"cores":4}}`:                                                "spec.cpu",
		`{"cpus":4,"cpu":{"sockets":1,"cores":2,"threads":4}}`:                                    "spec.cpu",
		`{"cpu":{"cores":-1}}`:                                                                    "spec.cpu.cores",
		`{"cpu":{"model":"Haswell,+aes"}}`:                                                        "spec.cpu.model",
		`{"firmware":{"type":"efi"}}`:                                                             "spec.firmware.type",
		`{"firmware":{"secureBoot":true}}`:                                                        "spec.firmware.secureBoot",
		`{"machine":"pc","firmware":{"type":"uefi","secureBoot":true}}`:                           "spec.firmware.secureBoot",
		`{"machine":"microvm","kernel":{"image":"k"},"firmware":{"type":"uefi"}}`:                 "spec.firmware.type",
		`{"machine":"microvm","kernel":{"image":"k"},"tpm":{}}`:                                   "spec.tpm",
		`{"machine":"microvm","kernel":{"image":"k"},"display":"vnc"}`:                            "spec.display",
		`{"machine":"microvm","kernel":{"image":"k"},"watchdog":{}}`:                              "spec.watchdog",
		`{"machine":"microvm","kernel":{"image":"k"},"cdroms":[{}]}`:                              "spec.cdroms",
		`{"machine":"microvm","kernel":{"image":"k"},"disks":[{"size":1073741824,"bus":"scsi"}]}`: "spec.disks[0].bus",
		`{"machine":"pc","disks":[{"size":1073741824,"bus":"sata"}]}`:                             "spec.disks[0].bus",
		`{"disks":[{"size":1073741824,"bus":"ide"}]}`:                                             "spec.disks[0].bus",
		`{"disks":[{"size":1073741824,"bus":"floppy"}]}`:                                          "spec.disks[0].bus",
		`{"disks":[{"size":1073741824,"aio":"native"}]}`:                                          "spec.disks[0].aio",
		`{"disks":[{"size":1073741824,"queues":65}]}`:                                             "spec.disks[0].queues",
		`{"disks":[{"size":1073741824,"bus":"sata","queues":2}]}`:                                 "spec.disks[0].queues",
		`{"disks":[{"size":1073741824,"bus":"sata","iothread":true}]}`:                            "spec.disks[0].iothread",
		`{"machine":"pc","cdroms":[{},{},{},{}],"disks":[{"size":1073741824,"bus":"ide"}]}`:       "spec.cdroms[3].bus",
		`{"cdroms":[{},{},{},{},{}]}`:                                                             "spec.cdroms",
		`{"cdroms":[{"bus":"ide"}]}`:                                                              "spec.cdroms[0].bus",
		`{"watchdog":{"action":"explode"}}`:                                                       "spec.watchdog.action",
		`{"vsock":{"cid":2}}`:                                                                     "spec.vsock.cid",
		`{"bootOrder":["floppy0"]}`:                                                               "spec.bootOrder[0]",
		`{` + oneDisk + `,"bootOrder":["disk1"]}`:                                                 "spec.bootOrder[0]",
		`{` + oneDisk + `,"bootOrder":["disk0","disk0"]}`:                                         "spec.bootOrder[1]",
		`{"hugepages":"4M"}`:                                                                      "spec.hugepages",
		`{"hugepages":"1G","memory":536870912}`:                                                   "spec.memory",
		`{"cpus":2,"numa":[{"cpus":"0","memory":536870912}]}`:                                     "spec.numa",
		`{"cpus":2,"numa":[{"cpus":"0-2","memory":536870912}]}`:                                   "spec.numa[0].cpus",
		`{"cpus":2,"numa":[{"cpus":"1,0","memory":536870912}]}`:                                   "spec.numa[0].cpus",
		`{"cpus":2,"numa":[{"cpus":"0-1","memory":268435456}]}`:                                   "spec.numa",
		`{"cpus":2,"numa":[{"cpus":"0-1","memory":536870912,"hostNode":200}]}`:                    "spec.numa[0].hostNode",
		`{"hostDevices":[{"pci":"01:00.0"}]}`:                                                     "spec.hostDevices[0].pci",
		`{"hostDevices":[{"usb":"46d:c52b"}]}`:                                                    "spec.hostDevices[0].usb",
		`{"hostDevices":[{}]}`:                                                                    "spec.hostDevices[0]",
		`{"hostDevices":[{"pci":"0000:01:00.0"},{"pci":"0000:01:00.0","node":"n1"}]}`:             "spec.hostDevices[1]",
		`{"ha":"restart","hostDevices":[{"pci":"0000:01:00.0","node":"n1"}]}`:                     "spec.ha",
		`{"machine":"microvm"}`:                                                                   "spec.kernel",
		`{"kernel":{}}`:                                                                           "spec.kernel.image",
		`{"kernel":{"image":"k","cmdline":"a\u000ab"}}`:                                           "spec.kernel.cmdline",
		`{"kernel":{"image":"k"},"firmware":{"type":"uefi","secureBoot":true}}`:                   "spec.kernel",
		`{"extraArgs":["device"]}`:                                                                "spec.extraArgs[0]",
		`{"extraArgs":["-daemonize"]}`:                                                            "spec.extraArgs[0]",
		`{"extraArgs":["--S"]}`:                                                                   "spec.extraArgs[0]",
		`{"extraArgs":["-device","a\u0000b"]}`:                                                    "spec.extraArgs[1]",
	} {
		_, err := vmOf(t, text)
		var e *Error
		if e, _ = err.(*Error); e == nil || e.Code != CodeInvalid || e.Field != want {
			t.Errorf("%s: %v; want a complaint about %s", text, err, want)
		}
	}
}

func TestMachinesThatCanBe(t *testing.T) {
	for _, text := range []string{
		`{"cpus":8,"cpu":{"model":"Haswell-noTSX","sockets":2,"cores":2,"threads":2}}`,
		`{"cpus":8,"cpu":{"threads":2}}`, `{"cpus":6,"cpu":{"model":"cluster","cores":3}}`,
		`{"firmware":{"type":"uefi","secureBoot":true},"tpm":{},"watchdog":{},"vsock":{}}`,
		`{"machine":"pc","cdroms":[{},{"bus":"scsi"}],"firmware":{"type":"uefi"}}`,
		`{"machine":"microvm","kernel":{"image":"linux","initrd":"initrd","cmdline":"console=ttyS0"},` + oneDisk + `}`,
		`{"disks":[{"size":1073741824,"bus":"scsi","iothread":true,"queues":4,"cache":"none","aio":"native"}],"cdroms":[{"image":"debian"}],"bootOrder":["cdrom0","disk0"]}`,
		`{"cpus":4,"hugepages":"2M","memory":536870912,"numa":[{"cpus":"0,2","memory":268435456,"hostNode":0},{"cpus":"1,3","memory":268435456}]}`,
		`{"hostDevices":[{"pci":"0000:01:00.0","node":"n1"},{"pci":"0000:02:00.0","node":"n2"}],"ha":"restart"}`,
		`{"extraArgs":["-device","edu","-global","x=y"]}`,
	} {
		if _, err := vmOf(t, text); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestDefaultsOfMachines(t *testing.T) {
	vm, err := vmOf(t, `{"firmware":{"volume":"left-over"},"watchdog":{},"cdroms":[{}]}`)
	if s := vm.Spec; err != nil || s.Firmware.Type != FirmwareBIOS || s.Firmware.Volume != "" || s.Watchdog.Action != WatchdogReset || s.CDROMs[0].Bus != BusSATA {
		t.Errorf("%+v, %v", s, err)
	}
	if vm, _ := vmOf(t, `{"machine":"pc","cdroms":[{}]}`); vm.Spec.CDROMs[0].Bus != BusIDE {
		t.Error(vm.Spec.CDROMs)
	}
	// A VM that says nothing is stored as before: nothing is added to it.
	if vm, _ := vmOf(t, `{}`); vm.Spec.Machine != "" || vm.Spec.CPU != nil || vm.Spec.Firmware != nil {
		t.Errorf("%+v", vm.Spec)
	}
}

func TestTopologyIsAlwaysAllCPUs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, MaxCPUs).Draw(t, "cpus")
		part := rapid.IntRange(0, 16)
		s := VMSpec{CPUs: n, CPU: &VMCPU{Sockets: part.Draw(t, "sockets"), Cores: part.Draw(t, "cores"), Threads: part.Draw(t, "threads")}}
		if err := s.validateCPU(); err != nil {
			return
		}
		sockets, cores, threads := s.Topology(n)
		if sockets*cores*threads != n || sockets < 1 || cores < 1 || threads < 1 {
			t.Fatalf("%d × %d × %d is not %d", sockets, cores, threads, n)
		}
		if c := s.CPU; c.Sockets != 0 && c.Sockets != sockets && c.Cores != 0 || c.Threads != 0 && c.Threads != threads {
			t.Fatalf("%+v became %d × %d × %d", c, sockets, cores, threads)
		}
	})
}

func TestHostDevicesOfANode(t *testing.T) {
	s := VMSpec{HostDevices: []VMHostDevice{{PCI: "0000:01:00.0", Node: "n1"}, {PCI: "0000:02:00.0", Node: "n2"}, {USB: "1234:5678"}}}
	if d, ok := s.HostDevicesOn("n2"); !ok || len(d) != 2 || d[0].PCI != "0000:02:00.0" {
		t.Error(d, ok)
	}
	if _, ok := s.HostDevicesOn("n3"); ok {
		t.Error("a node that no entry names")
	}
	if d, ok := (&VMSpec{HostDevices: s.HostDevices[2:]}).HostDevicesOn("n3"); !ok || len(d) != 1 {
		t.Error(d, ok)
	}
}

func TestHardwareIsADeepCopyOfTheMachine(t *testing.T) {
	vm, err := vmOf(t, `{"firmware":{"type":"uefi"},"tpm":{},"cdroms":[{}],"cpu":{"cores":1}}`)
	if err != nil {
		t.Fatal(err)
	}
	h := vm.Spec.Hardware()
	vm.Spec.Firmware.Volume, vm.Spec.CDROMs[0].Image, vm.Spec.CPU.Cores = "x", "y", 7
	b, _ := json.Marshal(h)
	if h.Firmware.Volume != "" || h.CDROMs[0].Image != "" || h.CPU.Cores != 1 {
		t.Errorf("shares memory: %s", b)
	}
}
