// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package alert

import (
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
)

// A node that answers may still not know: its daemon has just begun, what
// measures hangs, or there is more than one answer holds. Only a series that a
// working collector no longer reports is gone.
func TestASeriesThatIsMissingIsGoneOnlyIfTheNodeKnows(t *testing.T) {
	const series = `x{pool="nfs"}`
	nodes := []Node{{ID: "b", Name: "m2", Phase: api.NodeReady}}
	for name, tc := range map[string]struct {
		probe    Probe
		resolved bool
	}{
		"the daemon has just begun": {Probe{Partial: true}, false},
		"its collector hangs":       {Probe{Stuck: map[string]bool{series: true}}, false},
		"another collector hangs":   {Probe{Stuck: map[string]bool{"y": true}}, true},
		"it is gone":                {Probe{}, true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(rule("r", api.RuleSpec{Check: api.CheckMetric, Metric: "x", Threshold: 5}))
			at := func(p Probe) Facts { return Facts{Nodes: nodes, Probes: map[string]Probe{"b": p}} }
			w.at(0, at(Probe{Samples: []Sample{{"x", series, 6}}}))
			if got := w.phases(); !strings.HasSuffix(got, ":firing") {
				t.Fatalf("alerts %q", got)
			}
			if c := w.at(1, at(tc.probe)); (len(c) == 1) != tc.resolved {
				t.Fatalf("changes %+v", c)
			}
		})
	}
}

func TestAPoolThatDoesNotAnswerKeepsItsAlert(t *testing.T) {
	w := newWorld(rule("r", api.RuleSpec{Check: api.CheckPoolFull}))
	w.at(0, poolFacts(95))
	f := poolFacts(0)
	f.Pools[0].Unknown = true
	if c := w.at(1, f); len(c) != 0 {
		t.Fatalf("a pool that is not ready changed %+v", c)
	}
	if c := w.at(2, Facts{}); len(c) != 1 || c[0].Entered != api.AlertResolved {
		t.Fatalf("a pool that was removed changed %+v", c)
	}
}
