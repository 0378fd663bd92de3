// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package argv

import (
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/muster-vm/muster/api"
)

const pool = "/var/lib/muster/pool/volumes/"

func uefi(secure bool) *Firmware {
	return &Firmware{Code: "/usr/share/OVMF/OVMF_CODE_4M.fd", Vars: pool + "vars.qcow2", VarsFormat: "qcow2", Secure: secure}
}

func onBus(slot int, bus api.DiskBus, change func(*api.VMDisk)) Disk {
	d := Disk{Slot: slot, Path: fmt.Sprintf("%sv%d.qcow2", pool, slot), Format: "qcow2", Options: api.VMDisk{Bus: bus}}
	if change != nil {
		change(&d.Options)
	}
	return d
}

func TestGoldenBoards(t *testing.T) {
	zero := 0
	for name, change := range map[string]func(*Machine){
		"uefi":     func(m *Machine) { m.Firmware = uefi(false); m.Type = api.MachinePC },
		"secure":   func(m *Machine) { m.Firmware, m.TPM = uefi(true), "/run/muster/vm/a/tpm" },
		"watchdog": func(m *Machine) { m.Watchdog, m.Vsock = api.WatchdogPause, 42 },
		"cpu": func(m *Machine) {
			m.CPUs, m.CPU, m.Sockets, m.Cores, m.Threads = 8, "Haswell-noTSX,+aes,enforce=on", 2, 2, 2
		},
		"microvm": func(m *Machine) {
			m.Type = api.MachineMicroVM
			m.Kernel = &Kernel{Image: "/pool/images/k.raw", Initrd: "/pool/images/i,x.raw", Cmdline: "console=ttyS0,115200 quiet"}
			m.NICs = []NIC{{Slot: 1, Device: "mt0", MAC: "52:54:00:12:34:56", Offload: true}}
		},
		"buses": func(m *Machine) {
			m.Disks = []Disk{
				onBus(1, "", func(d *api.VMDisk) { d.IOThread, d.Queues, d.AIO = true, 4, api.AIOURing }),
				onBus(2, api.BusSCSI, func(d *api.VMDisk) { d.IOThread, d.Queues, d.Cache, d.AIO = true, 2, api.CacheNone, api.AIONative }),
				onBus(3, api.BusSATA, func(d *api.VMDisk) { d.Cache, d.Discard = api.CacheWritethrough, api.DiscardIgnore }),
				onBus(7, api.BusSCSI, func(d *api.VMDisk) { d.Cache = api.CacheDirectsync }),
			}
			m.CDROMs = []CDROM{{Bus: api.BusSATA, Path: "/pool/images/a,b.raw", Format: "raw"}, {Bus: api.BusSCSI}}
			m.NICs = []NIC{{Slot: 1, Device: "mt0", MAC: "52:54:00:12:34:56"}}
			m.BootOrder = []string{"cdrom0", "disk1", "nic0"}
		},
		"pc": func(m *Machine) {
			m.Type = api.MachinePC
			m.Disks = []Disk{onBus(1, api.BusIDE, nil), onBus(2, api.BusIDE, nil)}
			m.CDROMs = []CDROM{{Bus: api.BusIDE}, {Bus: api.BusIDE}}
		},
		"hugepages": func(m *Machine) { m.Hugepages = 2 * api.MiB },
		"numa": func(m *Machine) {
			m.CPUs, m.Hugepages = 4, api.GiB
			m.Memory = 2 * api.GiB
			m.NUMA = []api.VMNUMANode{{CPUs: "0,2", Memory: api.GiB, HostNode: &zero}, {CPUs: "1,3", Memory: api.GiB}}
		},
		"passthrough": func(m *Machine) {
			m.HostDevices = []api.VMHostDevice{{PCI: "0000:01:00.0"}, {USB: "046d:c52b"}}
			m.Extra = []string{"-device", "edu,id=lab"}
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := machine()
			change(&m)
			golden(t, name, m)
		})
	}
}

func TestBoardsThatCannotBeAreRefused(t *testing.T) {
	for name, change := range map[string]func(*Machine){
		"cpu with options":       func(m *Machine) { m.CPU = "max,+aes -device x" },
		"cpu with a path":        func(m *Machine) { m.CPU = "/bin/sh" },
		"topology":               func(m *Machine) { m.Sockets, m.Cores, m.Threads = 1, 3, 1 },
		"variables to be probed": func(m *Machine) { m.Firmware = uefi(true); m.Firmware.VarsFormat = "" },
		"relative firmware":      func(m *Machine) { m.Firmware = uefi(true); m.Firmware.Code = "nbd:host" },
		"long tpm socket":        func(m *Machine) { m.TPM = "/" + strings.Repeat("x", MaxSocketPath) },
		"numa with options":      func(m *Machine) { m.NUMA = []api.VMNUMANode{{CPUs: "0,memdev=x", Memory: api.GiB}} },
		"pci with options":       func(m *Machine) { m.HostDevices = []api.VMHostDevice{{PCI: "0000:01:00.0,x=y"}} },
		"usb with options":       func(m *Machine) { m.HostDevices = []api.VMHostDevice{{USB: "046d:c52b,x=y"}} },
		"drive to be probed":     func(m *Machine) { m.CDROMs = []CDROM{{Path: "/x", Bus: api.BusSATA}} },
		"too many drives":        func(m *Machine) { m.CDROMs = make([]CDROM, api.MaxCDROMs+1) },
		"relative kernel":        func(m *Machine) { m.Kernel = &Kernel{Image: "k"} },
		"cmdline of two lines":   func(m *Machine) { m.Kernel = &Kernel{Image: "/k", Cmdline: "a\nb"} },
		"empty extra":            func(m *Machine) { m.Extra = []string{""} },
		"too many cards for pc": func(m *Machine) {
			m.Type = api.MachinePC
			m.Disks = nil
			for i := range api.MaxDisks {
				m.Disks = append(m.Disks, onBus(i+1, "", nil))
			}
			m.Vsock, m.Watchdog, m.VNC = 3, api.WatchdogReset, "/x"
		},
	} {
		m := machine()
		change(&m)
		if a, err := Build(m); err == nil {
			t.Errorf("%s: accepted: %q", name, a)
		}
	}
}

// Whatever disks and drives a machine has, each is one device on the bus that it
// asked for, at a place of its own.
func TestDisksAndDrivesNeverShareAPlace(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := machine()
		legacy := api.BusSATA
		if rapid.Bool().Draw(t, "pc") {
			m.Type, legacy = api.MachinePC, api.BusIDE
		}
		m.Disks, m.CDROMs = nil, nil
		left := map[api.DiskBus]int{api.BusSATA: sataPorts, api.BusIDE: idePlaces}
		bus := func(name string, buses ...api.DiskBus) api.DiskBus {
			b := rapid.SampledFrom(buses).Draw(t, name)
			if left[b] == 0 && b == legacy {
				return api.BusSCSI
			}
			left[b]--
			return b
		}
		for i := range rapid.IntRange(0, api.MaxDisks).Draw(t, "disks") {
			b := bus("bus", api.BusVirtio, api.BusSCSI, legacy)
			thread := rapid.Bool().Draw(t, "iothread") && b != legacy
			m.Disks = append(m.Disks, onBus(i+1, b, func(d *api.VMDisk) { d.IOThread = thread }))
		}
		for range rapid.IntRange(0, api.MaxCDROMs).Draw(t, "drives") {
			m.CDROMs = append(m.CDROMs, CDROM{Bus: bus("drive", api.BusSCSI, legacy)})
		}
		a, err := Build(m)
		if err != nil {
			t.Fatalf("refused: %v", err)
		}
		places, ids := map[string]bool{}, map[string]map[string]string{}
		for i, arg := range a {
			if i == 0 || a[i-1] != "-device" && a[i-1] != "-object" {
				continue
			}
			o := options(arg)
			if o == nil || ids[o["id"]] != nil {
				t.Fatalf("%s names an option or a device twice", arg)
			}
			ids[o["id"]] = o
			if o["bus"] == "" || strings.HasPrefix(o["bus"], "vser") {
				continue
			}
			place := o["bus"] + "/" + o["unit"] + "/" + o["scsi-id"]
			if places[place] {
				t.Fatalf("two devices at %s: %q", place, a)
			}
			places[place] = true
		}
		for _, d := range m.Disks {
			o := ids[DiskID(d.Slot)]
			want := map[api.DiskBus]string{api.BusVirtio: "virtio-blk-pci", api.BusSCSI: "scsi-hd", legacy: "ide-hd"}[d.Options.BusOf()]
			if o[""] != want || o["drive"] != DiskNode(d.Slot) {
				t.Fatalf("disk %d on %s is %v", d.Slot, d.Options.Bus, o)
			}
			if thread := o["iothread"]; d.Options.BusOf() == api.BusVirtio && (thread != "") != d.Options.IOThread || thread != "" && ids[thread] == nil {
				t.Fatalf("disk %d has the thread %q", d.Slot, thread)
			}
		}
		for i := range m.CDROMs {
			if o := ids[CDROMID(i)]; o[""] != "ide-cd" && o[""] != "scsi-cd" {
				t.Fatalf("drive %d is %v", i, o)
			}
		}
	})
}
