// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/muster-vm/muster/scripts/bench.d/configdb/load"
	"github.com/muster-vm/muster/scripts/bench.d/configdb/system"
	"github.com/muster-vm/muster/scripts/bench.d/configdb/system/etcd"
)

// plan is how much is measured.
type plan struct {
	rounds                int
	writes, reads, watch  load.Window
	watchers              []int
	trialBlocks, perBlock int // of the outage
}

var (
	fullPlan = plan{
		rounds:   3,
		writes:   load.Window{Warmup: 2 * time.Second, Measure: 10 * time.Second},
		reads:    load.Window{Warmup: 2 * time.Second, Measure: 8 * time.Second},
		watch:    load.Window{Measure: 10 * time.Second},
		watchers: []int{100, 1000}, trialBlocks: 2, perBlock: 5,
	}
	quickPlan = plan{
		rounds:   1,
		writes:   load.Window{Warmup: 200 * time.Millisecond, Measure: time.Second},
		reads:    load.Window{Warmup: 200 * time.Millisecond, Measure: time.Second},
		watch:    load.Window{Measure: time.Second},
		watchers: []int{100, 1000}, trialBlocks: 1, perBlock: 3,
	}
	clientCounts = []int{1, 16, 64, 256}
	readClients  = []int{1, 64, 256}
)

// leaderClients is the load of the extra row with all clients on the leader.
const leaderClients = 64

// ours is the name of the system that is compared.
const ours = "muster"

// cluster is a system that runs.
type cluster interface {
	load.Killable
	Usage() ([load.Nodes]system.Usage, error)
	Stop() error
}

// contestant is a system to start.
type contestant struct {
	name    string
	start   func(ctx context.Context, h *system.Host) (cluster, error)
	servers func(cluster) *system.Servers
}

func muster(name string) contestant {
	return contestant{name, func(ctx context.Context, h *system.Host) (cluster, error) {
		return system.StartMuster(ctx, h)
	}, func(c cluster) *system.Servers { return c.(*system.Muster).Servers }}
}

func musterStream(name string) contestant {
	return contestant{name, func(ctx context.Context, h *system.Host) (cluster, error) {
		return system.StartMusterStream(ctx, h)
	}, func(c cluster) *system.Servers { return c.(*system.MusterStream).Servers }}
}

func etcdWith(name string, o etcd.Options) contestant {
	o.Name = name
	return contestant{name, func(ctx context.Context, h *system.Host) (cluster, error) {
		return etcd.Start(ctx, h, o)
	}, func(c cluster) *system.Servers { return c.(*etcd.Cluster).Servers }}
}

func rqlite(name string) contestant {
	return contestant{name, func(ctx context.Context, h *system.Host) (cluster, error) {
		return system.StartRqlite(ctx, h)
	}, func(c cluster) *system.Servers { return c.(*system.Rqlite).Servers }}
}

// systems take part in the rounds, outages in the trials.
var (
	systems = []contestant{muster(ours), musterStream("muster-stream"), etcdWith("etcd", etcd.Options{}), etcdWith("etcd-plain", etcd.Options{Plain: true}), rqlite("rqlite")}
	outages = []contestant{muster(ours), etcdWith("etcd", etcd.Options{}),
		etcdWith("etcd-50-250", etcd.Options{Heartbeat: 50 * time.Millisecond, Election: 250 * time.Millisecond})}
)

// chosen keeps those that -only names.
func chosen(all []contestant, only string) []contestant {
	if only == "" {
		return all
	}
	names := strings.Split(only, ",")
	return slices.DeleteFunc(slices.Clone(all), func(c contestant) bool { return !slices.Contains(names, c.name) })
}

// compare is the bench proper. In each round another system begins.
func (s *session) compare(ctx context.Context, p plan, only string) error {
	list := chosen(systems, only)
	for round := range p.rounds {
		for i := range list {
			c := list[(round+i)%len(list)]
			s.say("round %d of %d: %s", round+1, p.rounds, c.name)
			err := s.with(ctx, c, func(run cluster) error {
				return s.measured(c.servers(run), func() error { return s.round(ctx, p, c.name, run) })
			})
			if err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
		}
		if round+1 < p.rounds {
			fmt.Println()
			if err := s.sheet.Table(os.Stdout); err != nil {
				return err
			}
		}
	}
	list = chosen(outages, only)
	for block := range p.trialBlocks {
		for i := range list {
			c := list[(block+i)%len(list)]
			err := s.with(ctx, c, func(run cluster) error { return s.outages(ctx, c.name, run, block, p.perBlock) })
			if err != nil {
				return fmt.Errorf("outage of %s: %w", c.name, err)
			}
		}
	}
	s.worstOutages(list)
	return nil
}

// with runs f on a new cluster, which is ended in any case.
func (s *session) with(ctx context.Context, c contestant, f func(cluster) error) (err error) {
	run, err := c.start(ctx, s.host)
	if err != nil {
		return err
	}
	defer func() {
		if stopped := run.Stop(); err == nil {
			err = stopped
		}
	}()
	return f(run)
}

// measured runs f and notes what other programs took meanwhile.
func (s *session) measured(servers *system.Servers, f func() error) error {
	foreign, err := system.WatchForeign(servers)
	if err != nil {
		return err
	}
	if err := f(); err != nil {
		return err
	}
	share, err := foreign.Share()
	s.foreign = max(s.foreign, share)
	s.say("  other programs took %.0f %% of the machine", share)
	return err
}
