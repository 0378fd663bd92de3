// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"fmt"
	"time"

	"github.com/muster-vm/muster/scripts/bench.d/configdb/load"
	"github.com/muster-vm/muster/scripts/bench.d/configdb/report"
	"github.com/muster-vm/muster/scripts/bench.d/configdb/system"
)

// settle is the pause between two loads, in which a system may finish what it
// does behind.
const settle = 300 * time.Millisecond

// load runs one load and notes its throughput, its latencies and what a call
// cost the servers. The last tells more than the first on a machine that others
// use too.
func (s *session) load(name, row string, c cluster, w load.Window, run func(load.Window) (*load.Result, error)) (*load.Result, error) {
	var before, client time.Duration
	var failed error
	w.Begun = func() { before, client, failed = cpu(c) }
	r, err := run(w)
	if err == nil {
		err = failed
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", row, err)
	}
	after, clientAfter, err := cpu(c)
	if err != nil {
		return nil, err
	}
	each := func(d time.Duration) float64 { return float64(d.Microseconds()) / float64(r.Calls) }
	s.sheet.Add(name, row, report.PerSecond, r.Rate())
	s.latency(name, row, r)
	s.sheet.Add(name, row+"_cpu", report.Micros, each(after-before))
	s.say("  %-10s %-17s %7.0f/s  p50 %7.2f ms  p99 %7.2f ms  CPU per call: servers %4.0f us, client %3.0f us  errors %d", name, row,
		r.Rate(), ms(r.Percentile(0.5)), ms(r.Percentile(0.99)), each(after-before), each(clientAfter-client), r.Errors)
	time.Sleep(settle)
	return r, nil
}

// cpu is what the servers and this program have used.
func cpu(c cluster) (servers, client time.Duration, err error) {
	all, err := c.Usage()
	if err != nil {
		return 0, 0, err
	}
	for _, u := range all {
		servers += u.CPU
	}
	self, err := system.OwnUsage()
	return servers, self.CPU, err
}

func (s *session) latency(name, row string, r *load.Result) {
	s.sheet.Add(name, row+"_p50", report.Millis, ms(r.Percentile(0.5)))
	s.sheet.Add(name, row+"_p99", report.Millis, ms(r.Percentile(0.99)))
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// round measures one system once.
func (s *session) round(ctx context.Context, p plan, name string, c cluster) error {
	for _, step := range []func(context.Context, plan, string, cluster) error{s.writes, s.reads, s.watches, s.memory} {
		if err := step(ctx, p, name, c); err != nil {
			return err
		}
	}
	return nil
}

// A row of a round: so many clients, connected to these nodes.
type row struct {
	name    string
	clients int
	spread  load.Spread
}

func (s *session) writes(ctx context.Context, p plan, name string, c cluster) error {
	leader, err := c.Leader(ctx)
	if err != nil {
		return err
	}
	var rows []row
	for _, n := range clientCounts {
		rows = append(rows, row{fmt.Sprintf("writes_%d", n), n, load.All(leader)})
	}
	rows = append(rows, row{"writes_follower_1", 1, load.Only((leader + 1) % load.Nodes)},
		row{fmt.Sprintf("writes_leader_%d", leaderClients), leaderClients, load.Only(leader)})
	for _, r := range rows {
		_, err := s.load(name, r.name, c, p.writes, func(w load.Window) (*load.Result, error) {
			return load.Writes(ctx, c, r.name, r.clients, r.spread, w, false)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *session) reads(ctx context.Context, p plan, name string, c cluster) error {
	if err := load.PrepareReads(ctx, c); err != nil {
		return err
	}
	leader, err := c.Leader(ctx)
	if err != nil {
		return err
	}
	var rows []row
	for _, n := range readClients {
		rows = append(rows, row{fmt.Sprintf("reads_one_%d", n), n, load.Only((leader + 1) % load.Nodes)})
	}
	for _, n := range readClients {
		rows = append(rows, row{fmt.Sprintf("reads_all_%d", n), n, load.All(leader)})
	}
	for _, r := range rows {
		_, err := s.load(name, r.name, c, p.reads, func(w load.Window) (*load.Result, error) {
			return load.Reads(ctx, c, r.clients, r.spread, w)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *session) watches(ctx context.Context, p plan, name string, c cluster) error {
	w, ok := c.(load.Watched)
	if !ok {
		return nil // the system has no watches
	}
	for _, n := range p.watchers {
		row := fmt.Sprintf("watch_%d", n)
		r, err := load.Watches(ctx, w, n, p.watch)
		if err != nil {
			return fmt.Errorf("%s: %w", row, err)
		}
		s.latency(name, row, r)
		s.say("  %-10s %-16s %8d got   p50 %8.2f ms   p99 %8.2f ms", name, row, r.Count(), ms(r.Percentile(0.5)), ms(r.Percentile(0.99)))
		time.Sleep(settle)
	}
	return nil
}

// memory notes what the servers hold after all that, with what they started.
func (s *session) memory(_ context.Context, _ plan, name string, c cluster) error {
	all, err := c.Usage()
	if err != nil {
		return err
	}
	var sum, most int64
	for _, u := range all {
		sum += u.RSS
		most = max(most, u.RSS)
	}
	const mib = 1 << 20
	s.sheet.Add(name, "rss_three_servers", report.MiB, float64(sum)/mib)
	s.sheet.Add(name, "rss_largest_server", report.MiB, float64(most)/mib)
	s.say("  %-10s memory of the servers %d MiB", name, sum/mib)
	return nil
}

// outages are trials of one system on one cluster.
func (s *session) outages(ctx context.Context, name string, c cluster, block, trials int) error {
	for i := range trials {
		gap, err := load.Outage(ctx, c, fmt.Sprintf("outage%d-%d", block, i))
		if err != nil {
			return err
		}
		s.sheet.Add(name, "outage_median", report.Millis, ms(gap))
		s.say("  %-12s no write for %6.0f ms after kill -9 of the leader", name, ms(gap))
		time.Sleep(outageSettle)
	}
	return nil
}

// outageSettle is the pause after a node has come back.
const outageSettle = time.Second

// worstOutages adds the longest of all trials as a row of its own.
func (s *session) worstOutages(list []contestant) {
	for _, c := range list {
		if worst, ok := s.sheet.Worst(c.name, "outage_median"); ok {
			s.sheet.Add(c.name, "outage_max", report.Millis, worst)
		}
	}
}
