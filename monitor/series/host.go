// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package series

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/muster-vm/muster/internal/contain"
)

// Periods and deadlines of the host's collectors.
const (
	hostPeriod   = 10 * time.Second
	hostDeadline = 2 * time.Second
	diskDeadline = 3 * time.Second
	maxNICs      = 64
	maxMounts    = 64
	// userHZ is the unit of times in /proc (USER_HZ, 100 on every Linux).
	userHZ = 100
)

// Proc is a /proc file system; tests use a copy.
type Proc string

func (p Proc) read(name string) ([]byte, error) { return os.ReadFile(filepath.Join(string(p), name)) }

// CPU returns the collector of CPU time, load and memory.
func (p Proc) CPU() Collector {
	var busy, total float64
	return Collector{Name: "node", Period: hostPeriod, Deadline: hostDeadline, Collect: func(_ context.Context, r *Report) error {
		b, t, err := p.cpuTimes()
		if err != nil {
			return err
		}
		if total > 0 && t > total {
			r.Set(NodeCPU, 100*(b-busy)/(t-total))
		}
		busy, total = b, t
		return errors.Join(p.load(r), p.memory(r))
	}}
}

// cpuTimes reads the first line of /proc/stat (proc(5)): user nice system idle
// iowait irq softirq steal.
func (p Proc) cpuTimes() (busy, total float64, err error) {
	raw, err := p.read("stat")
	if err != nil {
		return 0, 0, err
	}
	line, _, _ := strings.Cut(string(raw), "\n")
	f := strings.Fields(line)
	if len(f) < 9 || f[0] != "cpu" {
		return 0, 0, fmt.Errorf("read stat: first line is %q", line)
	}
	for i, s := range f[1:9] {
		v, err := strconv.ParseFloat(s, 64)
		if err != nil {
			return 0, 0, fmt.Errorf("read stat: %w", err)
		}
		total += v
		if i != 3 && i != 4 { // idle, iowait
			busy += v
		}
	}
	return busy, total, nil
}

func (p Proc) load(r *Report) error {
	raw, err := p.read("loadavg")
	if err != nil {
		return err
	}
	first, _, _ := strings.Cut(string(raw), " ")
	v, err := strconv.ParseFloat(first, 64)
	if err != nil {
		return fmt.Errorf("read loadavg: %w", err)
	}
	r.Set(NodeLoad1, v)
	return nil
}

func (p Proc) memory(r *Report) error {
	raw, err := p.read("meminfo")
	if err != nil {
		return err
	}
	kib := map[string]float64{}
	for line := range strings.Lines(string(raw)) {
		name, rest, _ := strings.Cut(line, ":")
		if f := strings.Fields(rest); len(f) > 0 {
			kib[name], _ = strconv.ParseFloat(f[0], 64) // an odd line is not one of the two below
		}
	}
	total, free := kib["MemTotal"]*1024, kib["MemAvailable"]*1024
	if total <= 0 {
		return errors.New("read meminfo: no MemTotal")
	}
	r.Set(NodeMemTotal, total)
	r.Set(NodeMemUsed, total-free)
	r.Set(NodeMemPercent, 100*(total-free)/total)
	return nil
}

// guestNIC matches the names of guests' taps: ours (package vswitch), and those
// that people and libvirt make.
var guestNIC = regexp.MustCompile(`^(mt[0-9a-f]{10}n[0-9]+$|tap|vnet)`)

// NICs returns the collector of the host's network interfaces. Those that
// belong to guests (taps) are left out; there may be thousands.
func (p Proc) NICs() Collector {
	return Collector{Name: "nics", Period: hostPeriod, Deadline: hostDeadline, Collect: func(_ context.Context, r *Report) error {
		raw, err := p.read("net/dev")
		if err != nil {
			return err
		}
		n := 0
		sc := bufio.NewScanner(bytes.NewReader(raw))
		for sc.Scan() {
			name, rest, ok := strings.Cut(sc.Text(), ":")
			f := strings.Fields(rest)
			name = strings.TrimSpace(name)
			if !ok || len(f) < 12 || name == "lo" || guestNIC.MatchString(name) {
				continue
			}
			if n++; n > maxNICs {
				break
			}
			v := make([]float64, len(f))
			for i := range f {
				v[i], _ = strconv.ParseFloat(f[i], 64) // the kernel writes numbers
			}
			nic := Label{"nic", name}
			r.Set(NICReceived, v[0], nic)
			r.Set(NICSent, v[8], nic)
			r.Set(NICErrors, v[2]+v[3]+v[10]+v[11], nic)
		}
		return sc.Err()
	}}
}

// Mount is a directory whose file system is watched.
type Mount struct{ Name, Path string }

// statfs is replaced by tests of a file system that hangs.
type statfsFunc func(path string, buf *syscall.Statfs_t) error

// DataDir returns the collector of the file system of a directory.
func DataDir(path string) Collector {
	return Collector{Name: "disk", Period: hostPeriod, Deadline: diskDeadline, Collect: func(_ context.Context, r *Report) error {
		return measure(r, syscall.Statfs, path, DiskTotal, DiskFree, DiskPercent, Label{"path", "data"})
	}}
}

// Pools returns the collector of pools. Each is asked in a goroutine of its
// own, because a dead NFS server makes statfs hang for good.
func Pools(list func() []Mount) Collector { return pools(list, syscall.Statfs) }

func pools(list func() []Mount, statfs statfsFunc) Collector {
	var mu sync.Mutex
	asked := map[string]bool{}
	return Collector{Name: "pools", Period: hostPeriod, Deadline: diskDeadline, Collect: func(ctx context.Context, r *Report) error {
		mounts := list()
		answers := make(chan error, len(mounts))
		waiting := 0
		var errs []error
		for _, m := range mounts[:min(len(mounts), maxMounts)] {
			mu.Lock()
			stuck := asked[m.Name]
			asked[m.Name] = true
			mu.Unlock()
			if stuck {
				errs = append(errs, fmt.Errorf("pool %s: its file system does not answer", m.Name))
				continue
			}
			waiting++
			go func() {
				err := contain.Call(func() error {
					return measure(r, statfs, m.Path, PoolTotal, PoolFree, PoolPercent, Label{"pool", m.Name})
				})
				mu.Lock()
				delete(asked, m.Name)
				mu.Unlock()
				if err != nil {
					err = fmt.Errorf("pool %s: %w", m.Name, err)
				}
				answers <- err
			}()
		}
		for range waiting {
			select {
			case err := <-answers:
				errs = append(errs, err)
			case <-ctx.Done():
				return errors.Join(append(errs, errLate)...)
			}
		}
		return errors.Join(errs...)
	}}
}

func measure(r *Report, statfs statfsFunc, path, total, free, percent string, label Label) error {
	var st syscall.Statfs_t
	if err := statfs(path, &st); err != nil {
		return fmt.Errorf("statfs %s: %w", path, err)
	}
	size, avail := float64(st.Blocks)*float64(st.Bsize), float64(st.Bavail)*float64(st.Bsize)
	r.Set(total, size, label)
	r.Set(free, avail, label)
	// As df(1): what is reserved for root is neither used nor free.
	if used := float64(st.Blocks-st.Bfree) * float64(st.Bsize); used+avail > 0 {
		r.Set(percent, 100*used/(used+avail), label)
	}
	return nil
}
