// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// peer is libvirt, in a mount namespace of its own where its directories are empty
// ones of the bench's: what the host has of libvirt is neither seen nor changed.
type peer struct {
	dir   string
	shell *exec.Cmd
	log   *os.File
	uri   string
}

//go:embed libvirt.sh
var libvirtScript string

func beginLibvirt(ctx context.Context, data, image string) (*peer, error) {
	p := &peer{dir: filepath.Join(data, "libvirt")}
	if err := os.MkdirAll(p.dir, 0o755); err != nil {
		return nil, err
	}
	if out, err := exec.Command("cp", image, p.image()).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("copy the image: %w: %s", err, out)
	}
	var err error
	if p.log, err = os.Create(filepath.Join(data, "libvirt.log")); err != nil {
		return nil, err
	}
	p.shell = exec.Command("unshare", "--mount", "bash", "-c", libvirtScript, "libvirt", p.dir)
	p.shell.Stdout, p.shell.Stderr = p.log, p.log
	p.shell.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.shell.Start(); err != nil {
		return nil, err
	}
	return p, until(ctx, ready, "libvirtd answers", func() bool {
		pid, err := p.pid("libvirtd")
		if err != nil {
			return false
		}
		p.uri = fmt.Sprintf("qemu:///system?socket=/proc/%d/root/run/libvirt/libvirt-sock", pid)
		_, err = p.virsh(ctx, "version")
		return err == nil
	})
}

func (p *peer) image() string { return filepath.Join(p.dir, "guest.qcow2") }

func (p *peer) pid(program string) (int, error) {
	b, err := os.ReadFile(filepath.Join(p.dir, program+".pid"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

func (p *peer) virsh(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, step)
	defer cancel()
	cmd := exec.CommandContext(ctx, "virsh", append([]string{"-c", p.uri}, args...)...)
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("virsh %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errOut.String()))
	}
	return string(out), nil
}

// domain has the devices that Muster gives a VM.
const domain = `<domain type='qemu'><name>%[1]s</name><memory unit='MiB'>%[2]s</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type><bios useserial='yes'/></os><cpu mode='maximum'/>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<disk type='file' device='disk'><driver name='qemu' type='qcow2' io='threads' discard='unmap'/><source file='%[3]s'/><target dev='vda' bus='virtio'/></disk>
<controller type='usb' model='none'/><memballoon model='virtio'/>
<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng><panic model='isa'/>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<serial type='unix'><source mode='bind' path='%[4]s.sock'/><log file='%[4]s' append='on'/><target port='0'/></serial>
<console type='unix'><source mode='bind' path='%[4]s.sock'/><target type='serial' port='0'/></console>
</devices></domain>`

// define makes a VM of one of the kinds.
func (p *peer) define(ctx context.Context, kind, name string) error {
	disk := filepath.Join(p.dir, name+".qcow2")
	args, memory := []string{"create", "-q", "-f", "qcow2"}, "64"
	if kind == guest {
		args = append(args, "-b", p.image(), "-F", "qcow2", disk)
		memory = "96"
	} else {
		args = append(args, disk, "64M")
	}
	if out, err := exec.CommandContext(ctx, "qemu-img", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("qemu-img: %w: %s", err, out)
	}
	file := filepath.Join(p.dir, name+".xml")
	if err := os.WriteFile(file, fmt.Appendf(nil, domain, name, memory, disk, p.serialLog(name)), 0o600); err != nil {
		return err
	}
	_, err := p.virsh(ctx, "define", file)
	return err
}

func (p *peer) serialLog(name string) string { return filepath.Join(p.dir, name+".serial") }

func (p *peer) stop(ctx context.Context, name string) error {
	_, err := p.virsh(ctx, "destroy", name)
	return errors.Join(err, os.RemoveAll(p.serialLog(name)))
}

func (p *peer) pids() ([]int, error) {
	a, err1 := p.pid("libvirtd")
	b, err2 := p.pid("virtlogd")
	return []int{a, b}, errors.Join(err1, err2)
}

func (p *peer) end() error {
	ctx := context.Background()
	var errs []error
	if out, err := p.virsh(ctx, "list", "--name"); err == nil {
		for _, name := range strings.Fields(out) {
			errs = append(errs, p.stop(ctx, name))
		}
	}
	if pids, err := p.pids(); err == nil {
		for _, pid := range pids {
			errs = append(errs, endProcess(pid))
		}
	}
	_ = p.shell.Process.Kill()
	_ = p.shell.Wait()
	return errors.Join(append(errs, p.log.Close(), os.RemoveAll(p.dir))...)
}
