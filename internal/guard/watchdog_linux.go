// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package guard

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Settings of --watchdog besides a path.
const (
	WatchdogAuto = "auto"
	WatchdogNone = "none"

	watchdogDevice = "/dev/watchdog"
	watchdogClass  = "/sys/class/watchdog"

	// watchdogTimeoutS is what the guard asks the device for, in seconds. It pets
	// only while a lease has that, less KillTime, to go: a longer timeout would
	// reset hosts whose leases are renewed slowly.
	watchdogTimeoutS = 5
	// watchdogMostS is the longest timeout of a device that is counted on.
	watchdogMostS = 10
	// petEvery is the pause between two pettings.
	petEvery = time.Second
	// softdogIdentity is what the kernel's softdog module calls itself.
	softdogIdentity = "Software Watchdog"
)

// watchdog is an open watchdog device: it resets the host when it is neither
// petted for its timeout nor closed by magic (Linux watchdog-api).
type watchdog struct {
	f     *os.File
	level Level
	note  string // for Hardening.Watchdog
	// timeout is how long after the last petting the device resets the host. It
	// is 0 for one that takes its time: that is petted as long as the host obeys,
	// and nothing is promised because of it.
	timeout time.Duration
}

// openWatchdog opens the device that setting names. Opening it starts it. No
// watchdog is no error: the level and the note say so.
func openWatchdog(setting string) *watchdog {
	path := setting
	switch setting {
	case WatchdogNone:
		return &watchdog{level: LevelProcess, note: hardenedOff}
	case WatchdogAuto, "":
		path = watchdogDevice
	}
	f, identity, err := openWatchdogDevice(path)
	if err != nil {
		return &watchdog{level: LevelProcess, note: err.Error()}
	}
	w := &watchdog{f: f, level: levelOf(identity)}
	w.note = fmt.Sprintf("%s: %s %q", hardenedOK, path, identity)
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.WDIOC_SETTIMEOUT, watchdogTimeoutS); err != nil {
		w.note += fmt.Sprintf(", its own timeout (%v)", err)
	}
	s, err := unix.IoctlGetInt(int(f.Fd()), unix.WDIOC_GETTIMEOUT)
	w.count(s, err)
	return w
}

// count decides whether the timeout that the device has is short enough for the
// promise.
func (w *watchdog) count(seconds int, err error) {
	switch {
	case err != nil:
		w.level, w.note = LevelProcess, w.note+fmt.Sprintf(", of an unknown timeout (%v), so it is not counted on", err)
	case seconds < 1 || seconds > watchdogMostS:
		w.level, w.note = LevelProcess, w.note+fmt.Sprintf(", timeout %d s, more than the %d s it may have to be counted on", seconds, watchdogMostS)
	default:
		w.timeout, w.note = time.Duration(seconds)*time.Second, w.note+fmt.Sprintf(", timeout %d s", seconds)
	}
}

func openWatchdogDevice(path string) (*os.File, string, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, "", err
	}
	// Looked at before opening: a wrong path must not be written to.
	if fi.Mode()&os.ModeCharDevice == 0 {
		return nil, "", fmt.Errorf("%s is not a character device", path)
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return nil, "", err // EBUSY: somebody else pets it
	}
	info, err := unix.IoctlGetWatchdogInfo(int(f.Fd()))
	if err != nil {
		_ = f.Close()
		return nil, "", fmt.Errorf("%s is not a watchdog: %w", path, err)
	}
	identity := watchdogIdentity(watchdogClass, path)
	if identity == "" {
		name, _, _ := bytes.Cut(info.Identity[:], []byte{0})
		identity = string(name)
	}
	return f, identity, nil
}

// watchdogIdentity reads the identity of a device from sysfs, or returns "".
// /dev/watchdog is the first device, /dev/watchdogN the Nth.
func watchdogIdentity(class, path string) string {
	name := filepath.Base(path)
	if name == filepath.Base(watchdogDevice) {
		name += "0"
	}
	data, err := os.ReadFile(filepath.Join(class, name, "identity"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

func levelOf(identity string) Level {
	if identity == softdogIdentity {
		return LevelSoftdog
	}
	return LevelHardware
}

// pet restarts the device's timer.
func (w *watchdog) pet() error {
	if w.f == nil {
		return nil
	}
	if _, err := w.f.Write([]byte{0}); err != nil {
		return fmt.Errorf("pet watchdog: %w", err)
	}
	return nil
}

// close disarms the device when clean; otherwise it is left to bite.
func (w *watchdog) close(clean bool) error {
	if w.f == nil {
		return nil
	}
	var err error
	if clean {
		_, err = w.f.Write([]byte{'V'})
	}
	return errors.Join(err, w.f.Close())
}
