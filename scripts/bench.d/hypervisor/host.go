// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// ticks of /proc/PID/stat and /proc/stat in a second (USER_HZ).
const ticks = 100

// until looks every millisecond.
func until(ctx context.Context, limit time.Duration, what string, ok func() bool) error {
	for end := time.Now().Add(limit); !ok(); time.Sleep(look) {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if time.Now().After(end) {
			return fmt.Errorf("waited %v until %s", limit, what)
		}
	}
	return nil
}

// stat returns the fields of /proc/PID/stat from the third on.
func stat(pid int) ([]string, string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, "", err
	}
	open, end := strings.IndexByte(string(b), '('), strings.LastIndexByte(string(b), ')')
	if open < 0 || end < open {
		return nil, "", errors.New("stat without a name")
	}
	f := strings.Fields(string(b[end+1:]))
	if len(f) < 20 {
		return nil, "", errors.New("stat is short")
	}
	return f, string(b[open+1 : end]), nil
}

func childNamed(parent int, name string) (int, error) {
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range all {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		f, comm, err := stat(pid)
		if err == nil && comm == name && f[1] == strconv.Itoa(parent) {
			return pid, nil
		}
	}
	return 0, fmt.Errorf("process %d has no child %s", parent, name)
}

// endProcess asks a process to end and waits for it; a zombie has ended.
func endProcess(pid int) error {
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		if errors.Is(err, syscall.ESRCH) {
			return nil
		}
		return err
	}
	return until(context.Background(), ready, fmt.Sprintf("process %d has ended", pid), func() bool {
		f, _, err := stat(pid)
		return err != nil || f[0] == "Z"
	})
}

// cpu is what a process has used.
func cpu(pid int) (time.Duration, error) {
	f, _, err := stat(pid)
	if err != nil {
		return 0, err
	}
	user, err1 := strconv.Atoi(f[11])
	system, err2 := strconv.Atoi(f[12])
	return time.Duration(user+system) * time.Second / ticks, errors.Join(err1, err2)
}

// rss in MiB.
func rss(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(b), "VmRSS:")
	f := strings.Fields(rest)
	if len(f) == 0 {
		return 0, fmt.Errorf("process %d has no VmRSS", pid)
	}
	kib, err := strconv.Atoi(f[0])
	return float64(kib) / 1024, err
}

// foreign watches what processes of others take of the machine.
type foreign struct{ worst float64 }

// busy returns the busy time of the machine and the time of all processes below
// this one, living and waited for.
func busy() (all, total, mine time.Duration, err error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0, 0, err
	}
	line, _, _ := strings.Cut(string(b), "\n")
	var sum, idle int
	for i, s := range strings.Fields(line)[1:9] {
		n, err := strconv.Atoi(s)
		if err != nil {
			return 0, 0, 0, err
		}
		sum += n
		if i == 3 || i == 4 {
			idle += n
		}
	}
	return time.Duration(sum-idle) * time.Second / ticks, time.Duration(sum) * time.Second / ticks, family(os.Getpid()), nil
}

// family is the time of a process, of its descendants that live, and of those that
// they waited for. What detached itself from them is missing and counts as foreign.
func family(root int) time.Duration {
	children := map[string][]int{}
	times := map[int]time.Duration{}
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range all {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		f, _, err := stat(pid)
		if err != nil {
			continue
		}
		sum := 0
		for _, s := range f[11:15] {
			n, _ := strconv.Atoi(s)
			sum += n
		}
		times[pid] = time.Duration(sum) * time.Second / ticks
		children[f[1]] = append(children[f[1]], pid)
	}
	var of func(int) time.Duration
	of = func(pid int) time.Duration {
		sum := times[pid]
		for _, c := range children[strconv.Itoa(pid)] {
			sum += of(c)
		}
		return sum
	}
	return of(root)
}

func (f *foreign) during(what string, do func() error) error {
	b0, t0, m0, err := busy()
	if err != nil {
		return err
	}
	if err := do(); err != nil {
		return err
	}
	b1, t1, m1, err := busy()
	if err != nil || t1 == t0 {
		return err
	}
	share := max(0, 100*float64((b1-b0)-(m1-m0))/float64(t1-t0))
	fmt.Printf("   %s: other programs took %.0f %% of the machine\n", what, share)
	f.worst = max(f.worst, share)
	return nil
}
