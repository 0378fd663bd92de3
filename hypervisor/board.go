// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/argv"
	"github.com/muster-vm/muster/internal/uefi"
)

// board adds to a machine what the VM's spec says beyond CPUs, memory and disks.
// If something is missing, the status says what, and ok is false.
func (s *step) board(m *argv.Machine) (ok bool) {
	spec, p := &s.vm.Spec, s.h.pathsOf(s.vm.Meta.ID)
	m.Type = spec.MachineType()
	m.Sockets, m.Cores, m.Threads = spec.Topology(spec.CPUs)
	m.NUMA, m.Hugepages = spec.NUMA, spec.Hugepages.Size()
	if spec.Watchdog != nil {
		m.Watchdog = spec.Watchdog.Action
	}
	if spec.Vsock != nil {
		m.Vsock = spec.Vsock.CID
	}
	if spec.TPM != nil {
		m.TPM = p.tpm
	}
	m.BootOrder, m.Extra = spec.BootOrder, spec.ExtraArgs
	if m.HostDevices, ok = spec.HostDevicesOn(s.h.cfg.NodeName); !ok {
		s.wait(api.VMFailed, fmt.Sprintf("its devices of the host are on %s, not on this node; stop and start the vm", spec.HostDeviceNodes()))
		return false
	}
	for _, add := range []func(*argv.Machine) error{s.cpuModel, s.firmware, s.kernel, s.drives} {
		if err := add(m); err != nil {
			s.wait(api.VMStarting, "waiting: "+err.Error())
			return false
		}
	}
	return true
}

// cpuModel chooses the value of -cpu. With a model, QEMU refuses to start on a
// CPU that lacks something of it: a guest must not find less than it was
// promised.
func (s *step) cpuModel(m *argv.Machine) error {
	switch model := s.vm.Spec.CPUModel(); model {
	case api.CPUHost:
		return nil
	case api.CPUCluster:
		cpu, err := clusterCPU(s.v)
		m.CPU = cpu
		return err
	default:
		m.CPU = model + ",enforce=on"
		return nil
	}
}

// firmware finds UEFI's program and the VM's variables.
func (s *step) firmware(m *argv.Machine) error {
	if !s.vm.Spec.UEFI() {
		return nil
	}
	name := s.vm.Spec.Firmware.Volume
	vol, err := configdb.Volumes.Find(s.v, s.vm.Meta.Project, name)
	if err != nil {
		return err
	}
	path, format, err := s.resolve(name)
	if err != nil {
		return err
	}
	f, err := uefi.Find(s.h.cfg.FirmwareDirs, s.vm.Spec.SecureBoot(), int64(vol.Status.Size))
	if err != nil {
		return err
	}
	m.Firmware = &argv.Firmware{Code: f.Code, Vars: path, VarsFormat: format, Secure: s.vm.Spec.SecureBoot()}
	return nil
}

// kernel finds the images of the kernel that is started directly.
func (s *step) kernel(m *argv.Machine) error {
	k := s.vm.Spec.Kernel
	if k == nil {
		return nil
	}
	m.Kernel = &argv.Kernel{Cmdline: k.Cmdline}
	for _, f := range []struct {
		name string
		to   *string
	}{{k.Image, &m.Kernel.Image}, {k.Initrd, &m.Kernel.Initrd}} {
		if f.name == "" {
			continue
		}
		path, format, err := s.h.cfg.Volumes.ResolveImage(s.v, s.vm.Meta.Project, f.name)
		if err == nil && format != "raw" {
			err = fmt.Errorf("image %q has the format %s; a kernel is a raw file", f.name, format)
		}
		if err == nil {
			err = plainFile(fmt.Sprintf("image %q, a kernel or its initial RAM disk,", f.name), path)
		}
		if err != nil {
			return err
		}
		*f.to = path
	}
	return nil
}

// drives finds the images in the CD-ROM drives.
func (s *step) drives(m *argv.Machine) error {
	for _, d := range s.vm.Spec.CDROMs {
		c := argv.CDROM{Bus: d.Bus}
		if d.Image != "" {
			var err error
			if c.Path, c.Format, err = s.h.cfg.Volumes.ResolveImage(s.v, s.vm.Meta.Project, d.Image); err != nil {
				return err
			}
		}
		m.CDROMs = append(m.CDROMs, c)
	}
	return nil
}

// maxCmdline bounds the arguments of a process that are read.
const maxCmdline = 1 << 20

// cmdline returns the arguments of a process (proc_pid_cmdline(5)).
func cmdline(pid int) ([]string, error) {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	if err != nil {
		return nil, err
	}
	b = bytes.TrimSuffix(b[:min(len(b), maxCmdline)], []byte{0})
	var out []string
	for arg := range bytes.SplitSeq(b, []byte{0}) {
		out = append(out, string(arg))
	}
	return out, nil
}

// runningCPU is the CPU that a QEMU was started with, "" if that is not known.
func runningCPU(pid int) string {
	args, err := cmdline(pid)
	if err != nil {
		return ""
	}
	return argv.CPUOf(args)
}
