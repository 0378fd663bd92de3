// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package system

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// killWait is how long the kernel may take to end a process.
	killWait = 10 * time.Second
	pollEach = 20 * time.Millisecond
	// logTail is how much of a server's log goes into an error.
	logTail = 2000
)

// Process is one server.
type Process struct {
	host *Host
	name string
	log  string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error

	mu   sync.Mutex
	kids []ident // what it started, which may outlive it
}

// ident names a process for good: pids are used again.
type ident struct {
	pid     int
	started string // field 22 of /proc/PID/stat, clock ticks since boot
}

// Start runs a program with its output in a file.
func (h *Host) Start(name, logFile, program string, args ...string) (*Process, error) {
	f, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("log of %s: %w", name, err)
	}
	defer func() { _ = f.Close() }()
	p := &Process{host: h, name: name, log: logFile, cmd: exec.Command(filepath.Join(h.Programs, program), args...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = f, f
	// A signal from the terminal is for the bench alone, which then ends them.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// PID of the server.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Ended reports with an error that the process is over, nil while it runs.
func (p *Process) Ended() error {
	select {
	case <-p.done:
		b, _ := os.ReadFile(p.log) // the tail is a courtesy
		return fmt.Errorf("%s ended: %w; the end of %s:\n%s", p.name, orExit(p.err), p.log, b[max(0, len(b)-logTail):])
	default:
		return nil
	}
}

func orExit(err error) error {
	if err == nil {
		return errors.New("exit status 0")
	}
	return err
}

// Kill ends the server alone, as a crash would.
func (p *Process) Kill() error {
	err := p.noteKids()
	_ = p.cmd.Process.Kill() // it may have ended
	return errors.Join(err, p.wait(killWait))
}

// Stop ends the server and what it started, without a farewell: its data is of
// no use any more, and some take seconds to say goodbye.
func (p *Process) Stop() error {
	err := p.Kill()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, k := range p.kids {
		err = errors.Join(err, k.end())
	}
	return err
}

func (p *Process) wait(limit time.Duration) error {
	select {
	case <-p.done:
		return nil
	case <-time.After(limit):
		return fmt.Errorf("%s (pid %d) does not end", p.name, p.PID())
	}
}

// noteKids remembers what the server has started.
func (p *Process) noteKids() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, k := range descendants(p.PID()) {
		if slices.Contains(p.kids, k) {
			continue
		}
		p.kids = append(p.kids, k)
		if err := p.host.record(k); err != nil {
			return fmt.Errorf("note pid %d, which %s started: %w", k.pid, p.name, err)
		}
	}
	return nil
}

// end kills a process that is not our child.
func (i ident) end() error {
	for deadline := time.Now().Add(killWait); i.alive(); time.Sleep(pollEach) {
		_ = syscall.Kill(i.pid, syscall.SIGKILL)
		// It may have become our child, see AdoptOrphans.
		_, _ = syscall.Wait4(i.pid, nil, syscall.WNOHANG, nil)
		if time.Now().After(deadline) {
			return fmt.Errorf("pid %d does not end", i.pid)
		}
	}
	return nil
}

func (i ident) alive() bool {
	f, err := stat(i.pid)
	return err == nil && f[statStarted] == i.started && f[statState] != "Z"
}

// Fields of /proc/PID/stat after the name of the program, proc(5).
const (
	statState   = 0
	statParent  = 1
	statUser    = 11
	statSystem  = 12
	statStarted = 19
)

// stat returns the fields of /proc/PID/stat behind the name.
func stat(pid int) ([]string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	text := string(b)
	f := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(f) <= statStarted {
		return nil, fmt.Errorf("/proc/%d/stat: %d fields", pid, len(f))
	}
	return f, nil
}

// descendants returns the living processes below a pid.
func descendants(root int) []ident {
	children := map[int][]ident{}
	entries, _ := filepath.Glob("/proc/[0-9]*")
	for _, e := range entries {
		pid, err := strconv.Atoi(filepath.Base(e))
		if err != nil {
			continue
		}
		f, err := stat(pid)
		if err != nil {
			continue // it has just ended
		}
		parent, err := strconv.Atoi(f[statParent])
		if err == nil {
			children[parent] = append(children[parent], ident{pid, f[statStarted]})
		}
	}
	var out []ident
	for queue := []int{root}; len(queue) > 0; queue = queue[1:] {
		for _, k := range children[queue[0]] {
			out = append(out, k)
			queue = append(queue, k.pid)
		}
	}
	return out
}

// Usage is what a server and what it started have used.
type Usage struct {
	RSS     int64         // bytes of memory, now
	CPU     time.Duration // of user and system since their start
	Written int64         // bytes to disk since their start
}

// clockTick is USER_HZ, which Linux has had at 100 for all programs.
const clockTick = time.Second / 100

// Usage reads /proc. What ended since the start is not in it.
func (p *Process) Usage() (Usage, error) {
	u, err := usage(p.PID())
	if err != nil {
		return u, fmt.Errorf("usage of %s: %w", p.name, err)
	}
	if err := p.noteKids(); err != nil {
		return u, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, k := range p.kids {
		ku, err := usage(k.pid)
		if err != nil || !k.alive() {
			continue // it has ended
		}
		u.RSS, u.CPU, u.Written = u.RSS+ku.RSS, u.CPU+ku.CPU, u.Written+ku.Written
	}
	return u, nil
}

// OwnUsage is that of this program.
func OwnUsage() (Usage, error) { return usage(os.Getpid()) }

func usage(pid int) (u Usage, err error) {
	f, err := stat(pid)
	if err != nil {
		return u, err
	}
	for _, i := range []int{statUser, statSystem} {
		n, err := strconv.ParseInt(f[i], 10, 64)
		if err != nil {
			return u, err
		}
		u.CPU += time.Duration(n) * clockTick
	}
	kib, err := procField(pid, "status", "VmRSS:")
	if err != nil {
		return u, err
	}
	u.RSS = kib << 10
	u.Written, err = procField(pid, "io", "write_bytes:")
	return u, err
}

func procField(pid int, file, name string) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			return strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 64)
		}
	}
	return 0, fmt.Errorf("/proc/%d/%s has no %s", pid, file, name)
}

// until asks again and again until ready returns nil, one of the servers ends
// or the time is over.
func until(ctx context.Context, limit time.Duration, what string, servers []*Process, ready func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := ready(ctx)
		if err == nil {
			for _, p := range servers {
				err = errors.Join(err, p.noteKids())
			}
			return err
		}
		for _, p := range servers {
			if gone := p.Ended(); gone != nil {
				return gone
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited %s in vain until %s: %w", limit, what, err)
		case <-time.After(pollEach):
		}
	}
}
