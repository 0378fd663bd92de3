// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package monitor

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/contain"
	"github.com/muster-vm/muster/monitor/alert"
	"github.com/muster-vm/muster/monitor/series"
)

// MethodProbe is the call of the leader to every node.
const MethodProbe = "monitor.probe"

// Limits of probing.
const (
	probeEvery    = 15 * time.Second
	probeDeadline = 3 * time.Second
	// probeFresh is how long an answer counts.
	probeFresh = 60 * time.Second
	// maxUncertain is the slowest answer that tells anything about a clock.
	maxUncertain = time.Second
	maxProbes    = 16 // at a time
	maxSamples   = 2000
	maxWanted    = 100 // metrics named by rules
)

type probeRequest struct {
	Metrics []string `json:"metrics,omitempty"`
}

type probeAnswer struct {
	// Time of the node's clock, in nanoseconds since 1970.
	Time         int64         `json:"time"`
	CertNotAfter time.Time     `json:"certNotAfter,omitzero"`
	CertLife     time.Duration `json:"certLife,omitempty"`
	Samples      []probeSample `json:"samples,omitempty"`
	// Partial: there may be series that are not among the samples.
	Partial bool `json:"partial,omitempty"`
	// Stuck are series, by ID, that are not current because their collector
	// fails.
	Stuck []string `json:"stuck,omitempty"`
}

type probeSample struct {
	Metric string            `json:"metric"`
	Labels map[string]string `json:"labels,omitempty"`
	Value  float64           `json:"value"`
}

type probeResult struct {
	alert.Probe
	at time.Time
}

// probeLoop asks every node for its clock, its certificate and the values that
// rules look at.
func (s *Service) probeLoop(ctx context.Context) {
	tick := time.NewTicker(s.timing.probe)
	defer tick.Stop()
	for {
		s.probeAll(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (s *Service) probeAll(ctx context.Context) {
	v := s.db.Local()
	nodes, err := configdb.Nodes.List(v)
	if err != nil {
		s.log.Warn("nodes that cannot be read are not probed", "err", err)
	}
	request, err := json.Marshal(probeRequest{Metrics: wanted(v)})
	if err != nil {
		s.log.Error("probe not made", "err", err)
		return
	}
	places := make(chan struct{}, maxProbes)
	var wg sync.WaitGroup
	for _, n := range nodes {
		if n.Status.Phase != api.NodeReady {
			continue // it would only cost the deadline
		}
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			var p probeResult
			err := contain.Call(func() (err error) {
				p, err = s.probe(ctx, n, request)
				return err
			})
			if err != nil {
				s.log.Debug("node not probed", "node", n.Meta.Name, "err", err)
				return
			}
			s.mu.Lock()
			s.probes[n.Meta.ID] = p
			s.mu.Unlock()
		})
	}
	wg.Wait()
	s.kicked()
}

// wanted are the metrics that rules look at.
func wanted(v *configdb.View) []string {
	rules, _ := configdb.Rules.List(v) // what cannot be read is logged by the evaluation
	out := []string{series.PoolPercent}
	for i := range rules {
		r := &rules[i].Spec
		if r.Check == api.CheckMetric && !r.Disabled && !slices.Contains(out, r.Metric) && len(out) < maxWanted {
			out = append(out, r.Metric)
		}
	}
	return out
}

func (s *Service) probe(ctx context.Context, n api.Node, request []byte) (probeResult, error) {
	ctx, cancel := context.WithTimeout(ctx, probeDeadline)
	defer cancel()
	sent := s.now()
	began := time.Now()
	raw, err := s.cfg.Peers.Call(ctx, n, MethodProbe, request)
	if err != nil {
		return probeResult{}, err
	}
	took := time.Since(began)
	var a probeAnswer
	if err := json.Unmarshal(raw, &a); err != nil {
		return probeResult{}, fmt.Errorf("decode the answer of node %s: %w", n.Meta.Name, err)
	}
	p := probeResult{at: time.Now()}
	p.Self, p.CertNotAfter, p.Partial = n.Meta.ID == s.cfg.NodeID, a.CertNotAfter, a.Partial
	p.Stuck = map[string]bool{}
	for _, id := range a.Stuck[:min(len(a.Stuck), maxSamples)] {
		p.Stuck[id] = true
	}
	p.CertLife = a.CertLife
	p.Uncertain = took / 2
	p.Offset = time.Unix(0, a.Time).Sub(sent.Add(took / 2))
	if p.Uncertain > maxUncertain {
		return probeResult{}, fmt.Errorf("node %s answered only after %s", n.Meta.Name, took)
	}
	for _, sm := range a.Samples[:min(len(a.Samples), maxSamples)] {
		p.Samples = append(p.Samples, alert.Sample{Metric: sm.Metric, Series: seriesName(sm.Metric, sm.Labels), Value: sm.Value})
	}
	return p, nil
}

func seriesName(metric string, labels map[string]string) string {
	list := make([]series.Label, 0, len(labels))
	for k, v := range labels {
		list = append(list, series.Label{Name: k, Value: v})
	}
	slices.SortFunc(list, func(a, b series.Label) int { return cmp.Compare(a.Name, b.Name) })
	return series.ID(metric, list)
}

func poolSample(p alert.Probe, pool string) (float64, bool) {
	want := series.ID(series.PoolPercent, []series.Label{{Name: "pool", Value: pool}})
	for _, sm := range p.Samples {
		if sm.Series == want {
			return sm.Value, true
		}
	}
	return 0, false
}

// sortFacts makes two evaluations of the same facts say the same words.
func sortFacts(f *alert.Facts) {
	slices.SortFunc(f.Nodes, func(a, b alert.Node) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(f.VMs, func(a, b alert.VM) int {
		return cmp.Or(cmp.Compare(a.Project, b.Project), cmp.Compare(a.Name, b.Name))
	})
}
