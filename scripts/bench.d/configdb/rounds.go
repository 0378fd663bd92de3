// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"fmt"
	"time"

	"github.com/muster-vm/muster/scripts/bench.d/configdb/load"
	"github.com/muster-vm/muster/scripts/bench.d/configdb/report"
)

// settle is the pause between two loads, in which a system may finish what it
// does behind.
const settle = 300 * time.Millisecond

// rate notes a throughput with its latencies.
func (s *session) rate(system, name string, r *load.Result) {
	s.sheet.Add(system, name, report.PerSecond, r.Rate())
	s.latency(system, name, r)
	s.say("  %-10s %-16s %8.0f/s   p50 %8.2f ms   p99 %8.2f ms   errors %d", system, name, r.Rate(), ms(r.Percentile(0.5)), ms(r.Percentile(0.99)), r.Errors)
}

func (s *session) latency(system, name string, r *load.Result) {
	s.sheet.Add(system, name+"_p50", report.Millis, ms(r.Percentile(0.5)))
	s.sheet.Add(system, name+"_p99", report.Millis, ms(r.Percentile(0.99)))
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
		got, err := load.Writes(ctx, c, r.name, r.clients, r.spread, p.writes, false)
		if err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
		s.rate(name, r.name, got)
		time.Sleep(settle)
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
		got, err := load.Reads(ctx, c, r.clients, r.spread, p.reads)
		if err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
		s.rate(name, r.name, got)
		time.Sleep(settle)
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
