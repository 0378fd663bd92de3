// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package guard

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Clock gives the time in CLOCK_BOOTTIME nanoseconds and timers on it.
type Clock interface {
	NowNS() int64
	NewTimer() (Timer, error)
}

// Timer delivers on C at or after the absolute time last given to Set.
type Timer interface {
	// Set arms the timer; a time in the past fires at once, 0 disarms it.
	Set(atNS int64) error
	C() <-chan struct{}
	Close() error
}

// BootClock is the real clock. CLOCK_BOOTTIME counts suspended time and cannot
// be set, so a deadline passes while the host sleeps and never moves.
type BootClock struct{}

// NowNS returns CLOCK_BOOTTIME in nanoseconds.
func (BootClock) NowNS() int64 {
	var ts unix.Timespec
	// The only errors are an unknown clock and a bad pointer. Without time
	// there are no deadlines to keep, hence the panic.
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(fmt.Sprintf("guard: read CLOCK_BOOTTIME: %v", err))
	}
	return ts.Nano()
}

// NewTimer returns a timerfd on CLOCK_BOOTTIME. It owns one goroutine until
// Close.
func (BootClock) NewTimer() (Timer, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_BOOTTIME, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("create timerfd: %w", err)
	}
	t := &bootTimer{f: os.NewFile(uintptr(fd), "timerfd"), c: make(chan struct{}, 1), done: make(chan struct{})}
	go t.read()
	return t, nil
}

type bootTimer struct {
	f    *os.File
	c    chan struct{}
	done chan struct{}
	once sync.Once
}

func (t *bootTimer) read() {
	defer close(t.done)
	var expirations [8]byte
	for {
		if _, err := t.f.Read(expirations[:]); err != nil {
			return // closed
		}
		select {
		case t.c <- struct{}{}:
		default: // one delivery is waiting; it serves this one too
		}
	}
}

func (t *bootTimer) C() <-chan struct{} { return t.c }

func (t *bootTimer) Set(atNS int64) error {
	// A zero it_value disarms; 1 ns after boot is as good as any past time.
	if atNS < 0 {
		atNS = 1
	}
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(atNS)}
	conn, err := t.f.SyscallConn()
	if err != nil {
		return fmt.Errorf("arm timerfd: %w", err)
	}
	var setErr error
	if err := conn.Control(func(fd uintptr) {
		setErr = unix.TimerfdSettime(int(fd), unix.TFD_TIMER_ABSTIME, &spec, nil)
	}); err != nil {
		setErr = err
	}
	if setErr != nil {
		return fmt.Errorf("arm timerfd for %v: %w", time.Duration(atNS), setErr)
	}
	return nil
}

func (t *bootTimer) Close() error {
	var err error
	t.once.Do(func() {
		err = t.f.Close()
		<-t.done
	})
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}
