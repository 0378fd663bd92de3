// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package series

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Periods and deadlines of the product's own collectors.
const (
	vmPeriod        = 10 * time.Second
	vmDeadline      = 5 * time.Second
	productPeriod   = 5 * time.Second
	productDeadline = 2 * time.Second
	maxGuests       = 500
	maxServices     = 200
)

// Guest is a VM that runs on this host.
type Guest struct {
	Name, Project, ID string
	PID               int
	// Memory as configured and what the balloon leaves, in bytes; 0 when not
	// known.
	Memory, Balloon int64
	// DiskRead and DiskWritten are bytes since QEMU began, if Disks is set.
	Disks                 bool
	DiskRead, DiskWritten uint64
}

// Guests returns the VMs that run on this host.
type Guests interface {
	Guests(ctx context.Context) ([]Guest, error)
}

// ReplicaState is the configuration database as this node sees it.
type ReplicaState struct {
	Leader             bool
	Term               uint64
	Applied, Committed uint64 // Raft indexes
	Revision           uint64
	Staleness          time.Duration
	StalenessKnown     bool
	// Entries applied since the daemon began, and how long that took.
	Entries   uint64
	ApplyTime time.Duration
}

// ServiceState is one supervised service.
type ServiceState struct {
	Name     string
	Running  bool
	Restarts uint64
}

// usage is what a process had used at a time.
type usage struct {
	seconds float64
	at      time.Time
	start   string // of the process, in ticks: a PID may be used again
}

// VMs returns the collector of the VMs on this host.
func (p Proc) VMs(g Guests) Collector {
	before := map[string]usage{}
	return Collector{Name: "vms", Period: vmPeriod, Deadline: vmDeadline, Collect: func(ctx context.Context, r *Report) error {
		guests, err := g.Guests(ctx)
		if err != nil {
			return err
		}
		var errs []error
		seen := map[string]usage{}
		for _, vm := range guests[:min(len(guests), maxGuests)] {
			if vm.PID <= 0 {
				continue
			}
			now, rss, err := p.process(vm.PID, r.At())
			if errors.Is(err, fs.ErrNotExist) {
				continue // it ended meanwhile
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("vm %s: %w", vm.Name, err))
				continue
			}
			labels := []Label{{"vm", vm.Name}, {"project", vm.Project}}
			if was, ok := before[vm.ID]; ok && was.start == now.start && now.at.After(was.at) {
				r.Set(VMCPU, max(0, 100*(now.seconds-was.seconds)/now.at.Sub(was.at).Seconds()), labels...)
			}
			seen[vm.ID] = now
			r.Set(VMCPUSeconds, now.seconds, labels...)
			r.Set(VMRSS, rss, labels...)
			if vm.Memory > 0 {
				r.Set(VMMemory, float64(vm.Memory), labels...)
			}
			if vm.Balloon > 0 {
				r.Set(VMBalloon, float64(vm.Balloon), labels...)
			}
			if vm.Disks {
				r.Set(VMDiskRead, float64(vm.DiskRead), labels...)
				r.Set(VMDiskWritten, float64(vm.DiskWritten), labels...)
			}
		}
		before = seen
		return errors.Join(errs...)
	}}
}

// process reads /proc/PID/stat (proc(5)): utime 14, stime 15, starttime 22 and
// rss 24, counted from 1; the name in field 2 may hold anything.
func (p Proc) process(pid int, at time.Time) (u usage, rss float64, err error) {
	raw, err := p.read(filepath.Join(strconv.Itoa(pid), "stat"))
	if err != nil {
		return u, 0, err
	}
	text := string(raw)
	f := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(f) < 22 {
		return u, 0, fmt.Errorf("read stat of process %d: only %d fields", pid, len(f))
	}
	user, err1 := strconv.ParseFloat(f[11], 64)
	system, err2 := strconv.ParseFloat(f[12], 64)
	pages, err3 := strconv.ParseFloat(f[21], 64)
	if err := errors.Join(err1, err2, err3); err != nil {
		return u, 0, fmt.Errorf("read stat of process %d: %w", pid, err)
	}
	return usage{seconds: (user + system) / userHZ, at: at, start: f[19]}, pages * float64(os.Getpagesize()), nil
}

// Replica returns the collector of the configuration database.
func Replica(get func() ReplicaState) Collector {
	var entries uint64
	var took time.Duration
	return Collector{Name: "configdb", Period: productPeriod, Deadline: productDeadline, Collect: func(_ context.Context, r *Report) error {
		s := get()
		r.Set(RaftApplies, float64(s.Entries))
		r.Set(RaftApplySum, s.ApplyTime.Seconds())
		if s.Entries > entries {
			r.Set(RaftApply, (s.ApplyTime-took).Seconds()/float64(s.Entries-entries))
		}
		entries, took = s.Entries, s.ApplyTime
		leader := 0.0
		if s.Leader {
			leader = 1
		}
		r.Set(RaftLeader, leader)
		r.Set(RaftTerm, float64(s.Term))
		r.Set(RaftApplied, float64(s.Applied))
		r.Set(RaftCommitted, float64(s.Committed))
		r.Set(RaftLag, max(0, float64(s.Committed)-float64(s.Applied)))
		r.Set(ReplicaRevision, float64(s.Revision))
		if s.StalenessKnown {
			r.Set(ReplicaAge, s.Staleness.Seconds())
		}
		return nil
	}}
}

// Lease returns the collector of this node's lease.
func Lease(remaining func() time.Duration) Collector {
	return Collector{Name: "lease", Period: productPeriod, Deadline: productDeadline, Collect: func(_ context.Context, r *Report) error {
		r.Set(LeaseRemaining, remaining().Seconds())
		return nil
	}}
}

// Gossip returns the collector of the nodes by their state in gossip.
func Gossip(count func() map[string]int) Collector {
	return Collector{Name: "gossip", Period: productPeriod, Deadline: productDeadline, Collect: func(_ context.Context, r *Report) error {
		for state, n := range count() {
			r.Set(GossipMembers, float64(n), Label{"state", state})
		}
		return nil
	}}
}

// Services returns the collector of the supervised services.
func Services(list func() []ServiceState) Collector {
	return Collector{Name: "services", Period: productPeriod, Deadline: productDeadline, Collect: func(_ context.Context, r *Report) error {
		all := list()
		for _, s := range all[:min(len(all), maxServices)] {
			up := 0.0
			if s.Running {
				up = 1
			}
			r.Set(ServiceUp, up, Label{"service", s.Name})
			r.Set(ServiceRestarts, float64(s.Restarts), Label{"service", s.Name})
		}
		return nil
	}}
}
