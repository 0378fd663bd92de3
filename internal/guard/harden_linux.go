// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package guard

import (
	"fmt"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	hardenedOK  = "ok"
	hardenedOff = "off"
	// rrPriority is low among the real-time priorities: the kernel's own
	// threads go first.
	rrPriority = 10
	// oomNever exempts from the OOM killer (proc_pid_oom_score_adj(5)).
	oomNever = -1000
)

// harden applies the measures that keep the guard running on a sick host. Each
// is best effort; the result is shown to the administrator.
func harden() Hardening {
	return Hardening{
		Mlockall: outcome(lockMemory()),
		SchedRR:  outcome(realtimeThreads()),
		OOMScore: outcome(setOOMScore(os.Getpid(), oomNever)),
	}
}

func outcome(err error) string {
	if err != nil {
		return err.Error()
	}
	return hardenedOK
}

// lockMemory keeps the guard's pages in memory. MCL_ONFAULT, because the Go heap
// reserves 64 MiB arenas that would all become resident; so the program text is
// brought in by hand.
func lockMemory() error {
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		return fmt.Errorf("mlockall: %w", err)
	}
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("find own program: %w", err)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return fmt.Errorf("read own mappings: %w", err)
	}
	for line := range strings.Lines(string(maps)) {
		f := strings.Fields(line)
		if len(f) < 6 || f[5] != exe || !strings.HasPrefix(f[1], "r") {
			continue
		}
		lo, hi, _ := strings.Cut(f[0], "-")
		start, err1 := strconv.ParseUint(lo, 16, 64)
		end, err2 := strconv.ParseUint(hi, 16, 64)
		if err1 != nil || err2 != nil {
			continue
		}
		// Kernels before 5.14 know no MADV_POPULATE_READ: faulted on use then.
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, uintptr(start), uintptr(end-start), unix.MADV_POPULATE_READ)
	}
	return nil
}

// realtimeThreads gives SCHED_RR to all threads of the process. RESET_ON_FORK
// keeps the children normal, but also every thread the Go runtime adds later:
// therefore the enforcer calls this again each second.
func realtimeThreads() error {
	entries, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return fmt.Errorf("list own threads: %w", err)
	}
	attr := unix.SchedAttr{
		Size: uint32(unsafe.Sizeof(unix.SchedAttr{})), Policy: unix.SCHED_RR,
		Flags: unix.SCHED_FLAG_RESET_ON_FORK, Priority: rrPriority,
	}
	for _, e := range entries {
		tid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if err := unix.SchedSetAttr(tid, &attr, 0); err != nil && err != unix.ESRCH {
			return fmt.Errorf("sched_setattr: %w", err)
		}
	}
	return nil
}

// setOOMScore writes /proc/PID/oom_score_adj.
func setOOMScore(pid, score int) error {
	path := filepath.Join("/proc", strconv.Itoa(pid), "oom_score_adj")
	return os.WriteFile(path, []byte(strconv.Itoa(score)), 0)
}

// DetachFromCaller makes the signals of terminals and broken pipes harmless to
// the whole process and keeps inherited descriptors from its children. It is
// for the program's main, before NewServer; its goroutine ends with the process.
//
// The signals are caught and thrown away rather than ignored: an ignored signal
// would stay ignored in every child.
func DetachFromCaller() {
	unwanted := make(chan os.Signal, 1)
	signal.Notify(unwanted, unix.SIGHUP, unix.SIGINT, unix.SIGPIPE)
	go func() {
		for range unwanted {
		}
	}()
	// Kernels before 5.11 lack the flag; Go's own descriptors are safe anyway.
	_ = unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC)
}
