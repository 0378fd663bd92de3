// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package system

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// Foreign measures how much of the machine other programs take.
type Foreign struct {
	begun      time.Time
	busy, ours time.Duration
	servers    *Servers
}

// WatchForeign begins to measure.
func WatchForeign(servers *Servers) (*Foreign, error) {
	f := &Foreign{servers: servers, begun: time.Now()}
	var err error
	f.busy, f.ours, err = f.look()
	return f, err
}

// Share is what programs that are not part of the bench took since, of all
// cores, in percent.
func (f *Foreign) Share() (float64, error) {
	busy, ours, err := f.look()
	if err != nil {
		return 0, err
	}
	foreign := (busy - f.busy) - (ours - f.ours)
	all := time.Since(f.begun) * time.Duration(runtime.NumCPU())
	return max(0, 100*float64(foreign)/float64(all)), nil
}

func (f *Foreign) look() (busy, ours time.Duration, err error) {
	if busy, err = machineBusy(); err != nil {
		return 0, 0, err
	}
	self, err := usage(os.Getpid())
	if err != nil {
		return 0, 0, err
	}
	all, err := f.servers.Usage()
	if err != nil {
		return 0, 0, err
	}
	ours = self.CPU
	for _, u := range all {
		ours += u.CPU
	}
	return busy, ours, nil
}

// Fields of the first line of /proc/stat that are no work, proc(5).
const (
	statIdle   = 4
	statIOWait = 5
	statGuest  = 9 // is in user, and guest_nice in nice
)

// machineBusy is the time that all cores have worked since boot.
func machineBusy() (time.Duration, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := strings.Cut(string(b), "\n")
	var ticks int64
	for i, f := range strings.Fields(line) {
		if i == 0 || i == statIdle || i == statIOWait || i >= statGuest {
			continue
		}
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/stat: %q: %w", line, err)
		}
		ticks += n
	}
	return time.Duration(ticks) * clockTick, nil
}
