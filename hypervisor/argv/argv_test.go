// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package argv

import (
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/muster-vm/muster/api"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func machine() Machine {
	return Machine{
		QEMU: "/usr/bin/qemu-system-x86_64", ID: "0198a000-0000-7000-8000-000000000001", Name: "web1",
		CPUs: 2, Memory: 512 * api.MiB, Accelerator: api.AccelTCG,
		Disks: []Disk{{Slot: 1, Path: "/var/lib/muster/pool/volumes/v1.qcow2", Format: "qcow2"}},
		QMP:   "/run/muster/vm/a/qmp", Agent: "/run/muster/vm/a/ga", Serial: "/run/muster/vm/a/serial", Log: "/run/muster/vm/a/log",
	}
}

func TestGolden(t *testing.T) {
	for name, change := range map[string]func(*Machine){
		"tcg":    func(*Machine) {},
		"kvm":    func(m *Machine) { m.Accelerator = api.AccelKVM; m.CPUs = 8; m.Memory = 16 * api.GiB },
		"paused": func(m *Machine) { m.Paused = true },
		"disks": func(m *Machine) {
			m.Disks = append(m.Disks, Disk{Slot: 2, Path: "/pool/raw,file=/etc/shadow", Format: "raw"}, Disk{Slot: 5, Path: "/pool/x=y", Format: "qcow2"})
		},
		"nics": func(m *Machine) {
			m.NICs = []NIC{{Slot: 1, Device: "mt0123456789n0", MAC: "52:54:00:12:34:56", MTU: 1450}, {Slot: 2, Device: "mt0123456789n1", MAC: "52:54:00:12:34:57", Offload: true}}
		},
		"rbd": func(m *Machine) {
			m.Disks[0].Path, m.Disks[0].Format = "rbd://muster@10.0.0.1:3300,[fd00::2]:3300/vms/ns/volume-1#k1", "raw"
			m.CDROMs = []CDROM{{Path: "rbd://muster@10.0.0.1:3300/vms//image-1@muster#k1", Format: "raw"}}
			m.Firmware = &Firmware{Code: "/usr/share/OVMF/code.fd", Vars: "rbd://other@h:6789/p//volume-2#k2", VarsFormat: "raw"}
		},
		"diskless": func(m *Machine) { m.Disks = nil },
		"seed":     func(m *Machine) { m.Seed = &Seed{Path: "/run/muster/vm/a,b/seed.iso"} },
		"sata":     func(m *Machine) { m.Seed = &Seed{Path: "/run/muster/vm/a/seed.iso", SATA: true} },
		"display":  func(m *Machine) { m.VNC = "/run/muster/vm/a,b/vnc" },
		"hotplug": func(m *Machine) {
			m.CPUs, m.Memory = 3, 1*api.GiB
			m.Boot = &api.VMBoot{Memory: 512 * api.MiB, MaxMemory: 2 * api.GiB, MaxCPUs: 8, DiskPorts: 12, NICPorts: 2, Queues: 2}
			m.Version = "pc-q35-7.2"
			m.Disks = append(m.Disks, Disk{Slot: 9, Path: "/pool/x", Format: "raw"})
			m.NICs = []NIC{{Slot: 2, Device: "mt0123456789n1", MAC: "52:54:00:12:34:57"}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := machine()
			change(&m)
			golden(t, name, m)
		})
	}
}

// golden compares the arguments of a machine with those in a file.
func golden(t *testing.T, name string, m Machine) {
	t.Helper()
	a, err := Build(m)
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Join(a, "\n") + "\n"
	file := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil || got != string(want) {
		t.Fatalf("differs from %s (run with -update and look at the difference): %v\n%s", file, err, got)
	}
}

func TestWhatQEMUCannotTakeIsRefused(t *testing.T) {
	for name, change := range map[string]func(*Machine){
		"name with a comma":    func(m *Machine) { m.Name = "a,b" },
		"name with a path":     func(m *Machine) { m.Name = "../x" },
		"no id":                func(m *Machine) { m.ID = "x" },
		"no cpu":               func(m *Machine) { m.CPUs = 0 },
		"too many cpus":        func(m *Machine) { m.CPUs = MaxCPUs + 1 },
		"odd memory":           func(m *Machine) { m.Memory += 4096 },
		"accelerator auto":     func(m *Machine) { m.Accelerator = api.AccelAuto },
		"format to be probed":  func(m *Machine) { m.Disks[0].Format = "" },
		"format with options":  func(m *Machine) { m.Disks[0].Format = "qcow2,backing=x" },
		"relative disk":        func(m *Machine) { m.Disks[0].Path = "nbd:host:1" },
		"disk with a newline":  func(m *Machine) { m.Disks[0].Path = "/a\nb" },
		"half an rbd image":    func(m *Machine) { m.Disks[0].Path = "rbd://u@h:1/p/i" },
		"disk with a NUL":      func(m *Machine) { m.Disks[0].Path = "/a\x00b" },
		"too many disks":       func(m *Machine) { m.Disks = make([]Disk, api.MaxDisks+1) },
		"socket path too long": func(m *Machine) { m.QMP = "/" + strings.Repeat("x", MaxSocketPath) },
		"mac with options":     func(m *Machine) { m.NICs = []NIC{{Slot: 1, Device: "t", MAC: "52:54:00:12:34:56,bus=x"}} },
		"no device":            func(m *Machine) { m.NICs = []NIC{{Slot: 1, MAC: "52:54:00:12:34:56"}} },
		"device too long":      func(m *Machine) { m.NICs = []NIC{{Slot: 1, Device: "0123456789abcdef", MAC: "52:54:00:12:34:56"}} },
		"odd mtu":              func(m *Machine) { m.NICs = []NIC{{Slot: 1, Device: "t", MAC: "52:54:00:12:34:56", MTU: 1}} },
		"too many cards":       func(m *Machine) { m.NICs = make([]NIC, api.MaxNICs+1) },
		"no slot":              func(m *Machine) { m.Disks[0].Slot = 0 },
		"a slot twice":         func(m *Machine) { m.Disks = append(m.Disks, m.Disks[0]) },
		"no serial log":        func(m *Machine) { m.Log = "" },
		"no program":           func(m *Machine) { m.QEMU = "" },
	} {
		m := machine()
		change(&m)
		if a, err := Build(m); err == nil {
			t.Errorf("%s: accepted: %q", name, a)
		}
	}
}

// options splits an option string as QEMU does: a doubled comma is a comma.
func options(s string) map[string]string {
	const mark = "\x00"
	out := map[string]string{}
	for i, part := range strings.Split(strings.ReplaceAll(s, ",,", mark), ",") {
		k, v, ok := strings.Cut(part, "=")
		if !ok && i == 0 {
			k, v = "", part
		}
		if _, twice := out[k]; twice {
			return nil
		}
		out[k] = strings.ReplaceAll(v, mark, ",")
	}
	return out
}

func TestAnyValidMachineKeepsItsValuesWhole(t *testing.T) {
	path := rapid.StringMatching(`/[a-z,=:. "'\\%]{1,30}`)
	rapid.Check(t, func(t *rapid.T) {
		m := machine()
		m.Name = rapid.StringMatching(`[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?`).Draw(t, "name")
		m.CPUs = rapid.IntRange(1, MaxCPUs).Draw(t, "cpus")
		m.Memory = api.Size(rapid.IntRange(16, 1<<20).Draw(t, "MiB")) * api.MiB
		m.Accelerator = rapid.SampledFrom([]api.Accelerator{api.AccelKVM, api.AccelTCG}).Draw(t, "accel")
		m.Paused = rapid.Bool().Draw(t, "paused")
		m.QMP, m.Agent, m.Serial, m.Log = path.Draw(t, "qmp"), path.Draw(t, "ga"), path.Draw(t, "serial"), path.Draw(t, "log")
		m.Disks = nil
		for i := range rapid.IntRange(0, api.MaxDisks).Draw(t, "disks") {
			m.Disks = append(m.Disks, Disk{Slot: i + 1, Path: path.Draw(t, "disk"), Format: rapid.SampledFrom([]string{"qcow2", "raw"}).Draw(t, "format")})
		}
		a, err := Build(m)
		if err != nil {
			t.Fatalf("refused: %v", err)
		}
		check(t, m, a)
	})
}

func check(t *rapid.T, m Machine, a []string) {
	files, devices := []string{}, 0
	sockets := map[string]string{}
	for i, arg := range a {
		if slices.Contains([]string{"-drive", "-hda", "-cdrom", "-monitor", "-serial", "-netdev", "-nic"}, arg) {
			t.Fatalf("%s is used", arg)
		}
		if i == 0 || !strings.HasPrefix(a[i-1], "-") || strings.HasPrefix(arg, "-") {
			continue
		}
		o := options(arg)
		if o == nil {
			t.Fatalf("%s %s names an option twice", a[i-1], arg)
		}
		switch a[i-1] {
		case "-blockdev":
			if o["driver"] == "" {
				t.Fatalf("blockdev without a driver: %s", arg)
			}
			if o["driver"] == "file" {
				if o["locking"] != "on" || o["cache.no-flush"] != "off" {
					t.Fatalf("unsafe file: %s", arg)
				}
				files = append(files, o["filename"])
			} else if d := m.Disks[devices]; o["driver"] != d.Format {
				t.Fatalf("format %s, want %s", o["driver"], d.Format)
			}
		case "-chardev":
			sockets[o["id"]] = o["path"] + "|" + o["logfile"]
		case "-device":
			if o[""] == "virtio-blk-pci" {
				devices++
			}
		}
	}
	if devices != len(m.Disks) || len(files) != devices {
		t.Fatalf("%d disks, %d devices, %d files", len(m.Disks), devices, len(files))
	}
	for i, d := range m.Disks {
		if files[i] != d.Path {
			t.Fatalf("path %q became %q", d.Path, files[i])
		}
	}
	if sockets["qmp0"] != m.QMP+"|" || sockets["ga0"] != m.Agent+"|" || sockets["serial0"] != m.Serial+"|"+m.Log {
		t.Fatalf("sockets %q", sockets)
	}
}

func TestAnImageOfRBDIsPluggedInWithAListOfMonitors(t *testing.T) {
	d := Disk{Slot: 3, Path: "rbd://muster@10.0.0.1:3300,[fd00::2]:3301/vms//volume-1#k1", Format: "raw"}
	o := d.FileOptions().Object()
	want := []any{map[string]any{"host": "10.0.0.1", "port": "3300"}, map[string]any{"host": "fd00::2", "port": "3301"}}
	if !reflect.DeepEqual(o["server"], want) || o["driver"] != "rbd" || o["key-secret"] != "rbd-k1" || o["filename"] != nil || o["locking"] != nil {
		t.Errorf("%v", o)
	}
	if s := SecretOptions("/run/m", "k1").Object(); s["file"] != "/run/m/rbd-k1.key" || s["data"] != nil {
		t.Errorf("%v", s)
	}
}
