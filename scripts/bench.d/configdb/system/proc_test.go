// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package system

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// newTestHost is a host whose one program, a server, starts another one in a
// session of its own, like a daemon that starts a guard.
func newTestHost(t *testing.T, script string) *Host {
	t.Helper()
	h, err := NewHost(t.TempDir(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(h.Programs, "server"), []byte("#!/bin/sh\n"+script), 0o700); err != nil {
		t.Fatal(err)
	}
	return h
}

// It starts nothing else, which might be counted.
const startsAnother = "setsid sleep 300 &\necho $! >\"$1\"\nexec sleep 300\n"

func startServer(t *testing.T, h *Host) (*Process, ident) {
	t.Helper()
	kidFile := filepath.Join(h.Data, "kid")
	t.Chdir(h.Data)
	p, err := h.Start("server", filepath.Join(h.Data, "log"), "server", kidFile)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Stop() })
	err = until(t.Context(), 10*time.Second, "the server started another", []*Process{p}, func(context.Context) error {
		_, err := os.Stat(kidFile)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(p.kids) != 1 {
		t.Fatalf("noted %d of what the server started, want 1", len(p.kids))
	}
	return p, p.kids[0]
}

func TestStopEndsWhatTheServerStarted(t *testing.T) {
	p, kid := startServer(t, newTestHost(t, startsAnother))
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	if !kid.alive() {
		t.Fatal("a crash of the server ended what it started")
	}
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	if kid.alive() {
		t.Error("what the server started is still there")
	}
}

func TestTheNextRunEndsLeftovers(t *testing.T) {
	h := newTestHost(t, startsAnother)
	p, kid := startServer(t, h)
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := NewHost(h.Programs, h.Data); err != nil {
		t.Fatal(err)
	}
	if kid.alive() {
		t.Error("what an earlier run left is still there")
	}
}

func TestAPidThatIsUsedAgainIsLeftAlone(t *testing.T) {
	f, err := stat(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	other := ident{os.Getpid(), f[statStarted] + "0"}
	if other.alive() {
		t.Error("another process is taken for one that has ended")
	}
	if err := other.end(); err != nil { // would kill this test
		t.Error(err)
	}
}

func TestServersInheritNoOpenFile(t *testing.T) {
	leak, err := syscall.Open("/dev/null", syscall.O_RDONLY, 0) // as a shell would leave it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Close(leak) })
	p, _ := startServer(t, newTestHost(t, startsAnother))
	// Not the number of open files: a shell may have its script open.
	if to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", p.PID(), leak)); err == nil && to == "/dev/null" {
		t.Errorf("the server has inherited descriptor %d", leak)
	}
}

func TestUntilTellsOfAServerThatEnded(t *testing.T) {
	h := newTestHost(t, "echo no luck\nexit 3\n")
	p, err := h.Start("server", filepath.Join(h.Data, "log"), "server")
	if err != nil {
		t.Fatal(err)
	}
	err = until(t.Context(), 10*time.Second, "never", []*Process{p}, func(context.Context) error { return errors.New("not yet") })
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "no luck") {
		t.Errorf("err %v", err)
	}
}

func TestUsageCountsWhatTheServerStarted(t *testing.T) {
	p, kid := startServer(t, newTestHost(t, startsAnother))
	all, err := p.Usage()
	if err != nil {
		t.Fatal(err)
	}
	alone, err := usage(p.PID())
	if err != nil {
		t.Fatal(err)
	}
	if alone.RSS <= 0 || all.RSS <= alone.RSS {
		t.Errorf("memory %d, of the server alone %d", all.RSS, alone.RSS)
	}
	if err := syscall.Kill(kid.pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}
