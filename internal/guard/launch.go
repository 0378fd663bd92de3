// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package guard

import (
	"context"
	"fmt"
	"math"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// launchWait bounds Launch when ctx has no earlier end: a guard that finds
	// leftovers takes LeftoverWait before it serves.
	launchWait = LeftoverWait + 10*time.Second
	// launchPoll is the pause between two looks for an answering guard.
	launchPoll = 20 * time.Millisecond
	// launchAgain is the pause before another guard is started after one found
	// the directory locked (by a guard that is just dying, perhaps).
	launchAgain = 200 * time.Millisecond
	// helloWait bounds one hello.
	helloWait = 2 * time.Second
	// firstOther is the first descriptor after stdin, stdout and stderr.
	firstOther = 3
	// logTailBytes of the guard's log go into the error of a failed launch.
	logTailBytes = 1024
)

// Exit codes of the muster-guard program.
const (
	ExitOK     = 0
	ExitLocked = 1 // another guard has the run directory
	ExitUsage  = 2
	ExitFailed = 3
)

// Launch makes sure that a guard answers in runDir: it starts binary, detached
// and with its output appended to logPath, if none does. extraArgs, such as
// "--watchdog=none", follow --run-dir. It is safe to call from several processes
// at once; the lock decides which guard stays. It returns when hello was answered,
// or with an error when ctx ends (20 s at most) or the guard fails.
//
// The guard is a child of the caller until the caller ends; Launch leaves a
// goroutine to reap it.
func Launch(ctx context.Context, binary, runDir, logPath string, extraArgs ...string) error {
	ctx, cancel := context.WithTimeout(ctx, launchWait)
	defer cancel()
	if _, err := prepareRunDir(runDir); err != nil {
		return err
	}
	var ours *spawned // nil: none of ours is alive
	var lastErr error
	pause := time.Duration(0)
	for {
		select {
		case <-ctx.Done():
			return fmt.Errorf("guard: launch: %w (last: %w)", ctx.Err(), lastErr)
		case <-time.After(pause):
		}
		pid, err := answers(ctx, runDir)
		// When another one answers, ours must end first: it may not have tried
		// the lock yet and would serve when the other one stops.
		if err == nil && (ours == nil || ours.pid == pid) {
			return nil
		}
		lastErr = err
		pause = launchPoll
		if ours == nil {
			if ours, err = spawn(binary, runDir, logPath, extraArgs); err != nil {
				return err
			}
			continue
		}
		select {
		case code := <-ours.exited:
			if code != ExitLocked {
				return fmt.Errorf("guard: %s ended with code %d: %s", binary, code, logTail(logPath))
			}
			ours, pause = nil, launchAgain
		default:
		}
	}
}

// spawned is a guard that Launch has started.
type spawned struct {
	pid    int
	exited <-chan int // its exit code
}

// answers returns the pid of the guard that says hello.
func answers(ctx context.Context, runDir string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, helloWait)
	defer cancel()
	c, err := Dial(ctx, runDir)
	if err != nil {
		return 0, err
	}
	defer func() { _ = c.Close() }()
	h, err := c.Hello(ctx)
	return h.PID, err
}

// spawn starts one guard in a session of its own, with nothing inherited but
// its output.
func spawn(binary, runDir, logPath string, extraArgs []string) (*spawned, error) {
	dir, err := runDirName(runDir)
	if err != nil {
		return nil, err
	}
	logFile, err := os.OpenFile(logPath, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("guard: launch: %w", err)
	}
	defer func() { _ = logFile.Close() }()
	// Not CommandContext: the guard must outlive ctx and the caller.
	cmd := exec.Command(binary, append([]string{"--run-dir", dir}, extraArgs...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"}
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// What this process opened is closed on exec already; what it inherited,
	// such as the lock of a script, would live on in the guard and in the VMs.
	if err := unix.CloseRange(firstOther, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, fmt.Errorf("guard: launch: keep descriptors from the guard: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("guard: launch: %w", err)
	}
	exited := make(chan int, 1)
	go func() {
		_ = cmd.Wait() // the exit code says it all
		exited <- cmd.ProcessState.ExitCode()
	}()
	return &spawned{pid: cmd.Process.Pid, exited: exited}, nil
}

// logTail returns the end of the guard's log.
func logTail(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(data[max(0, len(data)-logTailBytes):])
}
