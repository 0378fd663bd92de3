// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/muster-vm/muster/internal/guard"
	"github.com/muster-vm/muster/internal/torture/lab"
)

const (
	processesEvery = 100 * time.Millisecond
	// Names of programs as the kernel has them, cut off after 15 characters.
	qemuName  = "qemu-system-x86"
	guardName = "muster-guard"
)

// process is one that was seen.
type process struct {
	pid   int
	ticks string // start time: with the pid it is unique
	vm    string
	dir   string // of its guard, which tells the host
}

// alive tells whether it still runs its program: neither gone nor in the kernel's
// exit, from which none returns.
func (p process) alive() bool {
	st, err := readStat(p.pid)
	return err == nil && st.ticks == p.ticks && st.state != "Z" && st.state != "X" && st.flags&pfExiting == 0
}

// pfExiting is PF_EXITING of include/linux/sched.h.
const pfExiting = 0x4

type stat struct {
	state, ticks string
	flags        uint64
}

// readStat reads /proc/PID/stat (proc_pid_stat(5)).
func readStat(pid int) (st stat, err error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return st, err
	}
	f := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(f) < 20 {
		return st, fmt.Errorf("stat of %d has %d fields", pid, len(f))
	}
	st.state, st.ticks = f[0], f[19]
	st.flags, err = strconv.ParseUint(f[6], 10, 64)
	return st, err
}

// machines returns the QEMUs of the campaign's VMs on all hosts. Those that only
// tell the daemon what QEMU can do belong to no VM.
func (c *campaign) machines() (found []process) {
	names, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, name := range names {
		comm, err := os.ReadFile(name)
		if err != nil || strings.TrimSpace(string(comm)) != qemuName {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		if err != nil {
			continue
		}
		p := process{pid: pid}
		for kv := range bytes.SplitSeq(env, []byte{0}) {
			k, v, _ := strings.Cut(string(kv), "=")
			switch k {
			case guard.EnvVM:
				p.vm = v
			case guard.EnvGuardDir:
				p.dir = v
			}
		}
		if p.vm == "" || !strings.HasPrefix(p.dir, c.runDir) {
			continue
		}
		if st, err := readStat(pid); err == nil {
			p.ticks = st.ticks
			found = append(found, p)
		}
	}
	return found
}

// watchProcesses looks for two QEMUs of one VM. The first is looked at again after
// the second: then both were there at one moment.
func (c *campaign) watchProcesses(ctx context.Context) {
	told := map[string]bool{}
	for lab.Wait(ctx, processesEvery) {
		c.mu.Lock()
		c.looks++
		c.mu.Unlock()
		by := map[string][]process{}
		for _, p := range c.machines() {
			if p.alive() {
				by[p.vm] = append(by[p.vm], p)
			}
		}
		for vm, ps := range by {
			if len(ps) < 2 || !ps[0].alive() || !ps[1].alive() || !ps[0].alive() {
				continue
			}
			if c.lockedAway(ps[:2]) {
				continue
			}
			what := fmt.Sprintf("vm %s is run by process %d (%s) and %d (%s)", vm, ps[0].pid, ps[0].dir, ps[1].pid, ps[1].dir)
			if !told[what] {
				told[what] = true
				c.violate(ranTwice, "%s", what)
			}
		}
	}
}

// inside returns the processes of a host that have a name; all for "".
func (c *campaign) inside(node int, name string) (pids []int, err error) {
	out, err := lab.Command("", "ip", "netns", "pids", c.Hosts.Namespace(node))
	if err != nil {
		return nil, err
	}
	for _, word := range strings.Fields(out) {
		pid, err := strconv.Atoi(word)
		if err != nil {
			return nil, err
		}
		comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		if err == nil && (name == "" || strings.TrimSpace(string(comm)) == name) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// qemus returns the QEMUs of the VMs on a host.
func (c *campaign) qemus(node int) (pids []int) {
	for _, p := range c.machines() {
		if p.dir == c.host(node) {
			pids = append(pids, p.pid)
		}
	}
	return pids
}

// send sends a signal to processes, of which some may have ended.
func send(s syscall.Signal, pids []int) error {
	for _, pid := range pids {
		if err := syscall.Kill(pid, s); err != nil && err != syscall.ESRCH {
			return fmt.Errorf("%s to process %d: %w", s, pid, err)
		}
	}
	return nil
}

func killed(pids []int) error { return send(syscall.SIGKILL, pids) }
