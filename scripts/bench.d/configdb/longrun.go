// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/muster-vm/muster/scripts/bench.d/configdb/load"
	"github.com/muster-vm/muster/scripts/bench.d/configdb/report"
	"github.com/muster-vm/muster/scripts/bench.d/configdb/system"
)

const (
	// steadyClients is the full write load.
	steadyClients = 64
	// termEvery is how often the term is looked at: it only rises, so no
	// election is missed.
	termEvery = time.Second
	// idleSettle is how long a new cluster may still have things to write.
	idleSettle = 30 * time.Second
)

// onMuster runs f on a cluster of the product.
func (s *session) onMuster(ctx context.Context, f func(*system.Muster) error) error {
	return s.with(ctx, muster(ours), func(c cluster) error {
		m := c.(*system.Muster)
		return s.measured(m.Servers, func() error { return f(m) })
	})
}

// steady is full write load for a long time, in which nobody may stand for
// election.
func (s *session) steady(ctx context.Context, d time.Duration) error {
	return s.onMuster(ctx, func(m *system.Muster) error {
		before, err := s.anyStatus(ctx, m)
		if err != nil {
			return err
		}
		s.say("full write load, %d clients, for %s; term %d, leader %s", steadyClients, d, before.Term, before.Leader)
		watch, cancel := context.WithCancel(ctx)
		changes := make(chan int)
		go func() { changes <- s.countTerms(watch, m, before) }()
		r, err := s.load(ours, "steady_64", m, load.Window{Warmup: 5 * time.Second, Measure: d}, func(w load.Window) (*load.Result, error) {
			return load.Writes(ctx, m, "steady", steadyClients, load.All(0), w, true)
		})
		cancel()
		seen := <-changes
		if err != nil {
			return err
		}
		after, err := s.anyStatus(ctx, m)
		if err != nil {
			return err
		}
		s.sheet.Add(ours, "steady_64_p99_9", report.Millis, ms(r.Percentile(0.999)))
		s.sheet.Add(ours, "steady_longest_gap", report.Millis, ms(r.Gap))
		s.sheet.Add(ours, "steady_failed_writes", report.Count, float64(r.Errors))
		s.sheet.Add(ours, "steady_elections", report.Count, float64(after.Term-before.Term))
		s.sheet.Add(ours, "steady_leader_changes", report.Count, float64(seen))
		still, err := m.Logged("stood still", s.say)
		if err != nil {
			return err
		}
		s.sheet.Add(ours, "steady_standstills", report.Count, float64(still))
		return s.memory(ctx, plan{}, ours, m)
	})
}

// countTerms says when the leader or the term changes, and returns how often
// the leader did.
func (s *session) countTerms(ctx context.Context, m *system.Muster, last system.MusterStatus) (changes int) {
	tick := time.NewTicker(termEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return changes
		case <-tick.C:
		}
		now, err := s.anyStatus(ctx, m)
		if err != nil || now.Leader == "" {
			continue // the term tells of it later
		}
		if now.Term != last.Term || now.Leader != last.Leader {
			s.say("  term %d led by %s became term %d led by %s", last.Term, last.Leader, now.Term, now.Leader)
		}
		if now.Leader != last.Leader {
			changes++
		}
		last = now
	}
}

func (s *session) anyStatus(ctx context.Context, m *system.Muster) (system.MusterStatus, error) {
	var failed error
	for i := range load.Nodes {
		st, err := m.Status(ctx, i)
		if err == nil {
			return st, nil
		}
		failed = errors.Join(failed, err)
	}
	return system.MusterStatus{}, failed
}

// idle is a cluster that nobody asks for anything.
func (s *session) idle(ctx context.Context, d time.Duration) error {
	return s.onMuster(ctx, func(m *system.Muster) error {
		s.say("an idle cluster: %s to settle, then %s", idleSettle, d)
		if err := wait(ctx, idleSettle); err != nil {
			return err
		}
		before, err := m.Usage()
		if err != nil {
			return err
		}
		first, err := s.anyStatus(ctx, m)
		if err != nil {
			return err
		}
		begun := time.Now()
		if err := wait(ctx, d); err != nil {
			return err
		}
		after, err := m.Usage()
		if err != nil {
			return err
		}
		took := time.Since(begun)
		last, err := s.anyStatus(ctx, m)
		if err != nil {
			return err
		}
		for i := range after {
			written := after[i].Written - before[i].Written
			cpu := 100 * float64(after[i].CPU-before[i].CPU) / float64(took)
			leads := ""
			if first.Leader == fmt.Sprintf("node%d", i) {
				leads = " (leader)"
			}
			s.say("  node%d%s: %d bytes written to disk, %.2f %% of a core, %d MiB", i, leads, written, cpu, after[i].RSS>>20)
			s.sheet.Add(ours, fmt.Sprintf("idle_written_node%d", i), report.Bytes, float64(written))
			s.sheet.Add(ours, fmt.Sprintf("idle_cpu_node%d", i), report.Percent, cpu)
			s.sheet.Add(ours, fmt.Sprintf("idle_rss_node%d", i), report.MiB, float64(after[i].RSS)/(1<<20))
		}
		s.sheet.Add(ours, "idle_revisions", report.Count, float64(last.Revision-first.Revision))
		return nil
	})
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
