// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package guard

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Roles the test binary plays when it is started by a test or by Launch.
const (
	roleGuard    = "--run-dir"
	roleStubborn = "--stubborn" // a VM that ignores SIGTERM
	roleClient   = "--client"   // a daemon that extends its lease for ever
)

func TestMain(m *testing.M) {
	if len(os.Args) > 2 {
		switch os.Args[1] {
		case roleGuard:
			os.Exit(guardMain(os.Args[2]))
		case roleStubborn:
			stubbornMain()
		case roleClient:
			clientMain(os.Args[2])
		}
	}
	// With the race detector a program sleeps for a second before it exits; those that tests
	// start need not.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=10 "+os.Getenv("GORACE")); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// guardMain is the program muster-guard, but never with the host's watchdog.
func guardMain(dir string) int {
	DetachFromCaller()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	s, err := NewServer(Config{RunDir: dir, Watchdog: WatchdogNone, Harden: true})
	if err == nil {
		err = s.Serve(ctx)
	}
	switch {
	case errors.Is(err, ErrLocked):
		return ExitLocked
	case err != nil:
		fmt.Fprintln(os.Stderr, err)
		return ExitFailed
	}
	return ExitOK
}

func stubbornMain() {
	signal.Ignore(unix.SIGTERM)
	fmt.Println("ready")
	for {
		time.Sleep(time.Hour)
	}
}

// clientMain keeps session 1 alive, 700 ms at a time, and owns one protected VM.
func clientMain(dir string) {
	ctx := context.Background()
	c, err := Dial(ctx, dir)
	if err != nil {
		panic(err)
	}
	for first := true; ; first = false {
		if _, err := c.Extend(ctx, 1, BootClock{}.NowNS()+int64(700*time.Millisecond)); err != nil {
			panic(err)
		}
		if first {
			if _, err := c.Start(ctx, sleeper(dir, "p", 1, true)); err != nil {
				panic(err)
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func sleepPath() string {
	path, err := exec.LookPath("sleep")
	if err != nil {
		panic(err)
	}
	return path
}

func sleeper(dir, vm string, session uint64, protected bool) StartRequest {
	return StartRequest{
		VM: vm, Epoch: 7, Session: session, Protected: protected,
		Argv: []string{sleepPath(), "1000"}, LogPath: filepath.Join(dir, vm+".log"),
	}
}

func self(t testing.TB) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// spawnSelf starts this binary in a role and ends it with the test: politely, so
// that a guard removes its cgroups, then by force.
func spawnSelf(t testing.TB, role, arg string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(self(t), role, arg)
	log, err := os.CreateTemp(shortDir(t), "log")
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(unix.SIGTERM)
		force := time.AfterFunc(StopGrace+5*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		force.Stop()
		text, _ := os.ReadFile(log.Name())
		_ = log.Close()
		t.Logf("%s wrote:\n%s", role, text)
	})
	return cmd
}

// newGuard starts a guard process on dir and connects to it with session 1.
func newGuard(t testing.TB, dir string) (*exec.Cmd, *Client) {
	t.Helper()
	cmd := spawnSelf(t, roleGuard, dir)
	var c *Client
	eventually(t, "the guard answers", func() bool {
		var err error
		if c, err = Dial(testCtx(t), dir); err != nil {
			return false
		}
		h, err := c.Hello(testCtx(t))
		if err == nil && h.PID == cmd.Process.Pid {
			return true
		}
		_ = c.Close()
		return false
	})
	t.Cleanup(func() { _ = c.Close() })
	return cmd, c
}

func extendFor(t testing.TB, c *Client, session uint64, d time.Duration) int64 {
	t.Helper()
	deadline, err := c.Extend(testCtx(t), session, BootClock{}.NowNS()+int64(d))
	if err != nil {
		t.Fatal(err)
	}
	return deadline
}

func start(t testing.TB, c *Client, req StartRequest) leftover {
	t.Helper()
	st, err := c.Start(testCtx(t), req)
	if err != nil {
		t.Fatal(err)
	}
	l := leftover{vm: req.VM, pid: st.PID, startTicks: st.StartTicks}
	t.Cleanup(l.kill)
	if l.startTicks == 0 || l.gone() {
		t.Fatalf("started, but not there: %+v", l)
	}
	return l
}
