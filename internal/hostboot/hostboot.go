// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hostboot

import (
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const path = "/proc/sys/kernel/random/boot_id"

// ID is that of the present boot; empty if nobody knows.
func ID() string {
	b, _ := os.ReadFile(path)
	return strings.TrimSpace(string(b))
}

// Clock is CLOCK_BOOTTIME: it cannot be set and goes on during suspend.
func Clock() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("hostboot: CLOCK_BOOTTIME: " + err.Error()) // cannot fail on Linux ≥ 2.6.39
	}
	return time.Duration(ts.Nano())
}
