// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/muster-vm/muster/internal/guard"
)

// TestMain plays the program itself when Launch or a test starts the test
// binary with its arguments.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && strings.HasPrefix(os.Args[1], "--run-dir") {
		main()
	}
	os.Exit(m.Run())
}

func TestUsage(t *testing.T) {
	for _, tt := range []struct {
		args []string
		code int
		says string
	}{
		{nil, guard.ExitUsage, "--run-dir is required"},
		{[]string{"--run-dir", "/x", "more"}, guard.ExitUsage, "no other arguments"},
		{[]string{"--no-such-flag"}, guard.ExitUsage, "no-such-flag"},
		{[]string{"--help"}, guard.ExitOK, "-watchdog"},
	} {
		var out bytes.Buffer
		if code := run(tt.args, &out); code != tt.code || !strings.Contains(out.String(), tt.says) {
			t.Errorf("%q: code %d, %s", tt.args, code, out.String())
		}
	}
}

func TestLaunchLockAndSigterm(t *testing.T) {
	base, err := os.MkdirTemp("", "guard")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(base) })
	dir, log := filepath.Join(base, "run"), filepath.Join(base, "log")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	// Never the host's own watchdog: a test must not reset the machine.
	if err := guard.Launch(ctx, self, dir, log, "--watchdog=none"); err != nil {
		t.Fatal(err)
	}
	c, err := guard.Dial(ctx, dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	h, err := c.Hello(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Kill(h.PID, syscall.SIGKILL) }()
	if fi, err := os.Stat(filepath.Join(dir, guard.SocketName)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket %v, %v", fi, err)
	}

	out, err := exec.CommandContext(ctx, self, "--run-dir", dir, "--watchdog", "none").CombinedOutput()
	exit, ok := err.(*exec.ExitError)
	if !ok || exit.ExitCode() != guard.ExitLocked || !strings.Contains(string(out), "another guard holds the run directory") {
		t.Errorf("second guard: %v, %s", err, out)
	}
	if err := syscall.Kill(h.PID, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-c.Done():
	case <-ctx.Done():
		t.Fatal("the guard does not stop at SIGTERM")
	}
}
