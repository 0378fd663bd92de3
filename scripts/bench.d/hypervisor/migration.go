// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/muster-vm/muster/scripts/bench.d/configdb/report"
)

// The guest that moves: its memory, what of it is random, and how often its serial
// port says something, which is how exactly a standstill is seen.
const (
	moverMemory = "512M"
	moverFill   = 200 // MiB
	moverPulse  = 2 * time.Millisecond
	mover       = "mover"
	// watchEvery is the pause between two looks at a serial log.
	watchEvery = 200 * time.Microsecond
)

// channelCounts are the numbers of connections that carry the memory.
var channelCounts = []int{1, 2, 4}

// pulse fills memory that only this guest has, says so, and then something every
// moverPulse, without a process for it.
var pulse = fmt.Sprintf("{ dd if=/dev/urandom of=/run/fill bs=1M count=%d; mkfifo /run/beat; exec 3<>/run/beat; echo filled; "+
	"while :; do echo .; read -r -t %.3f _ <&3; done; } >/dev/ttyS0 2>/dev/null &", moverFill, moverPulse.Seconds())

// movers are two daemons with a guest that moves between them, and two QEMUs with
// the same arguments and a copy of its disk, whose monitors this program talks to.
type movers struct {
	first, second *ours
	dir           string // of the bare ones
	argv          original
	at            *bareMover // has the guest now
	n             int        // bare QEMUs so far
}

// beginMovers starts them all; both guests have filled their memory when it returns.
func beginMovers(ctx context.Context, o *options) (m *movers, err error) {
	m = &movers{}
	if m.dir, err = os.MkdirTemp("/run", "bm"); err != nil {
		return m, err
	}
	if m.first, err = spawnDaemon(ctx, o.programs, o.data, "mover1"); err != nil {
		return m, err
	}
	if err = m.first.found(ctx); err != nil {
		return m, err
	}
	if m.second, err = spawnDaemon(ctx, o.programs, o.data, "mover2"); err != nil {
		return m, err
	}
	token, err := m.first.command(ctx, "cluster", "token", "create")
	if err != nil {
		return m, err
	}
	if _, err := m.first.command(ctx, "cluster", "join", strings.TrimSpace(token), "--data-dir", m.second.data); err != nil {
		return m, err
	}
	if err := errors.Join(m.first.settle(ctx), m.second.findGuard(ctx)); err != nil {
		return m, err
	}
	shared := filepath.Join(o.data, "shared")
	if err := os.MkdirAll(shared, 0o755); err != nil {
		return m, err
	}
	if err := m.layGuest(ctx, o, shared); err != nil {
		return m, err
	}
	if m.at, err = m.startBare(ctx); err != nil {
		return m, err
	}
	if err := m.at.begin(ctx); err != nil {
		return m, err
	}
	return m, m.fill(ctx)
}

// layGuest makes the VM, copies its disk for the bare QEMUs and starts it.
func (m *movers) layGuest(ctx context.Context, o *options, shared string) error {
	for _, c := range [][]string{
		{"pool", "create", "shared", "--type", "shared", "--path", shared},
		{"image", "create", "guest", "--pool", "shared", "--file", o.guest},
		{"vm", "create", mover, "--cpu", "1", "--memory", moverMemory, "--image", "guest", "--pool", "shared", "--start"},
	} {
		if err := until(ctx, ready, strings.Join(c[:3], " "), func() bool {
			_, err := m.first.command(ctx, c...)
			return err == nil || strings.Contains(err.Error(), "exists")
		}); err != nil {
			return err
		}
	}
	var err error
	if m.argv, err = m.first.original(ctx, mover, shared); err != nil {
		return err
	}
	if err := m.first.stop(ctx, mover); err != nil {
		return err
	}
	if out, err := exec.Command("cp", m.argv.disk, m.argv.disk+".bare").CombinedOutput(); err != nil {
		return fmt.Errorf("copy the disk: %w: %s", err, out)
	}
	return m.first.start(ctx, mover)
}

// fill tells both guests to fill their memory and to be heard, and waits until
// they are.
func (m *movers) fill(ctx context.Context) error {
	for _, log := range []func() string{m.log, m.at.log} {
		if err := until(ctx, step, "the guest has booted", func() bool { return strings.Contains(read(log()), "counter=") }); err != nil {
			return err
		}
	}
	if err := until(ctx, step, "the guest agent runs", func() bool {
		_, err := m.first.command(ctx, "vm", "exec", mover, "--", "sh", "-c", pulse)
		return err == nil
	}); err != nil {
		return err
	}
	if err := m.at.shell(pulse, "filled"); err != nil {
		return err
	}
	return until(ctx, step, "the guest's memory is filled", func() bool { return strings.Contains(read(m.log()), "filled") })
}

func read(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "" // not there yet: it is asked for again
	}
	return string(b)
}

// log is the serial log of the VM where it runs now; logs are all there are.
func (m *movers) log() string {
	for _, l := range m.logs() {
		return l
	}
	return ""
}

func (m *movers) logs() (all []string) {
	for _, o := range []*ours{m.first, m.second} {
		found, _ := filepath.Glob(filepath.Join(o.run, "vm", "*", "log"))
		all = append(all, found...)
	}
	return all
}

// silence watches serial logs that may come and go until end is closed, and
// returns the longest time in which none of them grew.
func silence(logs func() []string, end <-chan struct{}) time.Duration {
	sizes := map[string]int64{}
	last, longest := time.Now(), time.Duration(0)
	for n := 0; ; n++ {
		grew := false
		for _, l := range logs() {
			if st, err := os.Stat(l); err == nil && st.Size() != sizes[l] {
				grew, sizes[l] = grew || st.Size() > sizes[l], st.Size()
			}
		}
		now := time.Now()
		if grew {
			if n > 0 {
				longest = max(longest, now.Sub(last))
			}
			last = now
		}
		select {
		case <-end:
			return max(longest, time.Since(last))
		case <-time.After(watchEvery):
		}
	}
}

// moved is what one move took: from the wish to the running guest, QEMU's own time
// for it, and the longest silence of the guest.
type moved struct{ total, transfer, still time.Duration }

// heard measures a move; it goes on to listen for a moment after it.
func heard(logs func() []string, move func() (time.Duration, error)) (r moved, err error) {
	end, longest := make(chan struct{}), make(chan time.Duration)
	go func() { longest <- silence(logs, end) }()
	began := time.Now()
	r.transfer, err = move()
	r.total = time.Since(began)
	time.Sleep(50 * moverPulse) // the guest must be heard again
	close(end)
	r.still = <-longest
	return r, err
}

var tookMillis = regexp.MustCompile(`after (\d+) ms`)

// move moves the VM to the other daemon.
func (m *movers) move(ctx context.Context, channels int) (moved, error) {
	return heard(m.logs, func() (time.Duration, error) {
		var r struct {
			Task struct {
				Status struct {
					Phase, Message string
				} `json:"status"`
			} `json:"task"`
		}
		if err := m.first.send(ctx, http.MethodPost, "/vms/"+mover+"/migrate?wait=60s", fmt.Sprintf(`{"channels": %d}`, channels), http.StatusOK, &r); err != nil {
			return 0, err
		}
		found := tookMillis.FindStringSubmatch(r.Task.Status.Message)
		if r.Task.Status.Phase != "succeeded" || found == nil {
			return 0, fmt.Errorf("the migration ended with %+v", r.Task.Status)
		}
		ms, err := strconv.Atoi(found[1])
		return time.Duration(ms) * time.Millisecond, err
	})
}

// migrations: a guest that runs, with 200 MiB that are like nothing else, moves
// between two daemons and between two QEMUs, over one, two and four connections.
func (b *bench) migrations(ctx context.Context) (err error) {
	m, err := beginMovers(ctx, &b.options)
	defer func() { err = errors.Join(err, m.end()) }()
	if err != nil {
		return err
	}
	for range b.rounds {
		for _, n := range channelCounts {
			for _, s := range []struct {
				system string
				move   func(context.Context, int) (moved, error)
			}{{muster, m.move}, {bare, m.moveBare}} {
				r, err := s.move(ctx, n)
				if err != nil {
					return fmt.Errorf("%s, %d connections: %w", s.system, n, err)
				}
				for row, d := range map[string]time.Duration{"total": r.total, "transfer": r.transfer, "standstill": r.still} {
					name := "migration_" + row
					if n > 1 {
						name += fmt.Sprintf("_%d_connections", n)
					}
					b.sheet.Add(s.system, name, report.Millis, float64(d.Microseconds())/1000)
				}
				fmt.Printf("   %-10s migration over %d: total %v, transfer %v, standstill %v\n", s.system, n, r.total.Round(time.Millisecond), r.transfer, r.still.Round(100*time.Microsecond))
			}
		}
	}
	return nil
}

// end takes everything down, also after an error.
func (m *movers) end() error {
	var errs []error
	if m.at != nil {
		errs = append(errs, m.at.end())
	}
	for _, o := range []*ours{m.first, m.second} { // the first removes the VM
		if o != nil {
			errs = append(errs, o.end())
		}
	}
	return errors.Join(append(errs, os.RemoveAll(m.dir))...)
}
