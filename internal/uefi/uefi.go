// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package uefi

import (
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
)

// Limits of what is read.
const (
	MaxDescriptor  = 64 << 10
	MaxDescriptors = 100
)

// Firmware is one UEFI firmware: its program and the template of its variables.
type Firmware struct {
	// Code and Vars are paths of raw images.
	Code, Vars string
	// VarsSize is the size of the template: a store for this firmware has it.
	VarsSize int64
}

// Dirs are where descriptors are looked for, the most important first.
func Dirs() []string { return []string{"/etc/qemu/firmware", "/usr/share/qemu/firmware"} }

// descriptor is the part of a firmware descriptor that matters here.
type descriptor struct {
	Interfaces []string `json:"interface-types"`
	Mapping    struct {
		Device     string `json:"device"`
		Mode       string `json:"mode"`
		Executable file   `json:"executable"`
		Template   file   `json:"nvram-template"`
	} `json:"mapping"`
	Targets []struct {
		Architecture string   `json:"architecture"`
		Machines     []string `json:"machines"`
	} `json:"targets"`
	Features []string `json:"features"`
}

type file struct {
	Filename string `json:"filename"`
	Format   string `json:"format"`
}

// Find returns the firmware with or without Secure Boot: with it, its variables
// begin with keys, and it protects them (SMM). varsSize is the size that the
// variables must have, 0 for any.
func Find(dirs []string, secure bool, varsSize int64) (Firmware, error) {
	names := map[string]string{} // descriptor by file name
	for _, dir := range dirs {
		list, err := os.ReadDir(dir)
		if err != nil {
			continue // most hosts have one of the two
		}
		for _, e := range list[:min(len(list), MaxDescriptors)] {
			if strings.HasSuffix(e.Name(), ".json") && names[e.Name()] == "" {
				names[e.Name()] = filepath.Join(dir, e.Name())
			}
		}
	}
	other := false
	for _, name := range sorted(names) {
		f, ok := read(names[name], secure)
		if !ok {
			continue
		}
		if varsSize == 0 || f.VarsSize == varsSize {
			return f, nil
		}
		other = true
	}
	what := "UEFI firmware"
	if secure {
		what = "UEFI firmware with Secure Boot"
	}
	if other {
		return Firmware{}, api.Errorf(api.CodeUnsupported, "this node has no %s whose variables take %d bytes, as those of the VM do; install the same build of the package ovmf as on the node where the VM was made", what, varsSize)
	}
	return Firmware{}, api.Errorf(api.CodeUnsupported, "this node has no %s; install the package ovmf", what)
}

func sorted(names map[string]string) []string {
	out := make([]string, 0, len(names))
	for n := range names {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

// read returns what a descriptor describes, if it is what is looked for.
func read(path string, secure bool) (Firmware, bool) {
	f, err := os.Open(path)
	if err != nil {
		return Firmware{}, false
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, MaxDescriptor))
	if err != nil {
		return Firmware{}, false
	}
	out, ok := parse(b, secure)
	if !ok {
		return Firmware{}, false
	}
	code, err := os.Stat(out.Code)
	if err != nil || !code.Mode().IsRegular() {
		return Firmware{}, false
	}
	vars, err := os.Stat(out.Vars)
	if err != nil || !vars.Mode().IsRegular() {
		return Firmware{}, false
	}
	out.VarsSize = vars.Size()
	return out, true
}

// parse understands a descriptor; ok is false if it is not what is looked for.
func parse(b []byte, secure bool) (f Firmware, ok bool) {
	var d descriptor
	if json.Unmarshal(b, &d) != nil || !d.fits(secure) {
		return f, false
	}
	f = Firmware{Code: d.Mapping.Executable.Filename, Vars: d.Mapping.Template.Filename}
	return f, filepath.IsAbs(f.Code) && filepath.IsAbs(f.Vars)
}

func (d *descriptor) fits(secure bool) bool {
	m := &d.Mapping
	if m.Device != "flash" || m.Mode != "" && m.Mode != "split" || m.Executable.Format != "raw" || m.Template.Format != "raw" || !slices.Contains(d.Interfaces, "uefi") {
		return false
	}
	q35 := false
	for _, t := range d.Targets {
		q35 = q35 || t.Architecture == "x86_64" && slices.ContainsFunc(t.Machines, func(m string) bool { return strings.HasPrefix(m, "pc-q35-") })
	}
	has := func(feature string) bool { return slices.Contains(d.Features, feature) }
	switch {
	case !q35, has("intel-tdx"), has("amd-sev-snp"):
		return false
	case secure:
		return has("secure-boot") && has("enrolled-keys") && has("requires-smm")
	}
	return !has("secure-boot") && !has("requires-smm")
}
