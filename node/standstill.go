// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"log/slog"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// standstillLook is the pause between two looks at the clock.
	standstillLook = 250 * time.Millisecond
	// standstillMin is how late a look is to be told of: half of what a leader may
	// be silent.
	standstillMin = 500 * time.Millisecond
)

// standstill tells when this process did not run for a while: its host was
// stopped or overloaded, or the process was. Whoever looks for the reason of an
// election or of a lost lease finds it in the log of the node that stood still.
type standstill struct {
	log  *slog.Logger
	now  func() time.Duration // CLOCK_BOOTTIME
	wait func(context.Context, time.Duration) bool
}

func (s *standstill) run(ctx context.Context) error {
	var before, after usage
	before.read()
	at := s.now()
	for s.wait(ctx, standstillLook) {
		now := s.now()
		late := now - at - standstillLook
		at = now
		if late < standstillMin {
			continue // what is told of was used since the last time, roughly
		}
		after.read()
		s.log.Warn("this process stood still", "for", late.Round(time.Millisecond), "since_last",
			slog.GroupValue(
				slog.Duration("cpu", after.cpu-before.cpu), slog.Int64("major_faults", after.faults-before.faults),
				slog.Int64("preempted", after.preempted-before.preempted), slog.Int64("collections", after.collections-before.collections),
				slog.Duration("paused_by_them", after.paused-before.paused),
			))
		before = after
	}
	return nil
}

// usage is what may tell why.
type usage struct {
	cpu, paused                    time.Duration
	faults, preempted, collections int64
}

func (u *usage) read() {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err == nil { // cannot fail for itself
		u.cpu = time.Duration(r.Utime.Nano() + r.Stime.Nano())
		u.faults, u.preempted = r.Majflt, r.Nivcsw
	}
	var gc debug.GCStats
	debug.ReadGCStats(&gc)
	u.collections, u.paused = gc.NumGC, gc.PauseTotal
}

// waitFor returns false when the context ended.
func waitFor(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}
