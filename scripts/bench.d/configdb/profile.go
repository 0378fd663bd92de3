// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/muster-vm/muster/scripts/bench.d/configdb/load"
	"github.com/muster-vm/muster/scripts/bench.d/configdb/system"
)

const (
	// profileHertz is how often each core is looked at; not a divisor of any
	// period that the daemon has.
	profileHertz = 497
	// profileLines of a profile are printed, the rest stays in its file.
	profileLines = 40
	// profileLeast is the smallest share of the time that is listed, in percent.
	profileLeast = 0.5
)

// profileWindow is the load of one profile; an idle cluster needs longer to
// show something.
var profileWindow = load.Window{Warmup: time.Second, Measure: 6 * time.Second}

const profileIdle = 30 * time.Second

// profile finds out where musterd spends its time under load.
func (s *session) profile(ctx context.Context) error {
	return s.onMuster(ctx, func(m *system.Muster) error {
		if err := load.PrepareReads(ctx, m); err != nil {
			return err
		}
		if err := s.profileOne(ctx, m, "idle", 0); err != nil {
			return err
		}
		for _, kind := range []string{"writes", "reads"} {
			for _, clients := range []int{1, 64, 256} {
				if err := s.profileOne(ctx, m, kind, clients); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

func (s *session) profileOne(ctx context.Context, m *system.Muster, kind string, clients int) error {
	name := fmt.Sprintf("%s_%d", kind, clients)
	leader, err := m.Leader(ctx)
	if err != nil {
		return err
	}
	// Both followers do the same.
	profiles := []*recording{
		{file: s.profileFile(name, "leader"), pid: m.PIDs()[leader]},
		{file: s.profileFile(name, "follower"), pid: m.PIDs()[(leader+1)%load.Nodes]},
	}
	for _, p := range profiles {
		if err := p.start(); err != nil {
			return err
		}
		defer p.kill()
	}
	err = s.profileLoad(ctx, m, kind, name, clients, leader)
	for _, p := range profiles {
		err = errors.Join(err, p.stop())
	}
	if err != nil {
		return err
	}
	for _, p := range profiles {
		if err := profileReport(ctx, p.file); err != nil {
			return err
		}
	}
	return nil
}

func (s *session) profileLoad(ctx context.Context, m *system.Muster, kind, name string, clients, leader int) error {
	if clients == 0 {
		s.say("  %-10s %s for %s", ours, name, profileIdle)
		return wait(ctx, profileIdle)
	}
	_, err := s.load(ours, name, m, profileWindow, func(w load.Window) (*load.Result, error) {
		if kind == "writes" {
			return load.Writes(ctx, m, "profile-"+name, clients, load.All(leader), w, false)
		}
		return load.Reads(ctx, m, clients, load.All(leader), w)
	})
	return err
}

func (s *session) profileFile(name, role string) string {
	return filepath.Join(s.host.Data, "profile-"+name+"-"+role)
}

// recording is perf at work on one process.
type recording struct {
	file string // without an extension
	pid  int
	cmd  *exec.Cmd
}

func (r *recording) start() error {
	r.cmd = exec.Command("perf", "record", "--quiet", "-F", strconv.Itoa(profileHertz), "-g", "-o", r.file+".perf", "-p", strconv.Itoa(r.pid))
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	r.cmd.Stderr = os.Stderr
	if err := r.cmd.Start(); err != nil {
		return fmt.Errorf("start perf: %w", err)
	}
	return nil
}

// stop ends it; perf then writes its file and ends by the same signal.
func (r *recording) stop() error {
	err := r.cmd.Process.Signal(syscall.SIGINT)
	ended := r.cmd.Wait()
	if status, ok := r.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() && status.Signal() == syscall.SIGINT {
		ended = nil
	}
	if err = errors.Join(err, ended); err != nil {
		return fmt.Errorf("perf record of pid %d: %w", r.pid, err)
	}
	return nil
}

// kill is for the case that stop was not reached.
func (r *recording) kill() {
	if r.cmd.ProcessState == nil {
		_ = r.cmd.Process.Kill()
		_ = r.cmd.Wait()
	}
}

// profileReport writes what functions took, themselves and with all that they
// called, to files, and prints the beginning.
func profileReport(ctx context.Context, file string) error {
	for _, by := range []struct{ what, flag string }{{"cumulative", "--children"}, {"self", "--no-children"}} {
		out, err := exec.CommandContext(ctx, "perf", "report", "-i", file+".perf", "--stdio", "-g", "none", by.flag,
			"--sort", "symbol", "--percent-limit", fmt.Sprint(profileLeast)).Output()
		if err != nil {
			return fmt.Errorf("perf report: %w", err)
		}
		text := file + "-" + by.what + ".txt"
		if err := os.WriteFile(text, out, 0o600); err != nil {
			return err
		}
		fmt.Printf("\n%s:\n", text)
		n := 0
		for line := range strings.Lines(string(out)) {
			if strings.TrimSpace(line) == "" || strings.HasPrefix(line, "#") {
				continue
			}
			if n++; n > profileLines {
				break
			}
			fmt.Print(line)
		}
	}
	return nil
}
