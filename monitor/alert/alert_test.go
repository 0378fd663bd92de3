// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package alert

import (
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

var t0 = time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)

func rule(name string, spec api.RuleSpec) api.Rule {
	r := api.Rule{Meta: api.NewMeta(api.KindRule, "", name), Spec: spec}
	if err := r.Prepare(); err != nil {
		panic(err)
	}
	return r
}

// world applies evaluations to a set of alerts, as the store does.
type world struct {
	rules  []api.Rule
	alerts map[string]api.Alert
}

func (w *world) at(seconds int, f Facts) []Change {
	f.Now = t0.Add(time.Duration(seconds) * time.Second)
	changes := Evaluate(w.rules, f, w.alerts)
	for _, c := range changes {
		if c.Delete {
			delete(w.alerts, c.Alert.Meta.ID)
		} else {
			w.alerts[c.Alert.Meta.ID] = c.Alert
		}
	}
	return changes
}

func newWorld(rules ...api.Rule) *world { return &world{rules: rules, alerts: map[string]api.Alert{}} }

// phases of all alerts as "target:phase", for comparing.
func (w *world) phases() string {
	var out []string
	for _, a := range w.alerts {
		out = append(out, a.Spec.Target+":"+string(a.Status.Phase))
	}
	return strings.Join(out, " ")
}

func poolFacts(percent float64) Facts {
	return Facts{Pools: []Pool{{ID: "p", Name: "fast", Percent: percent}}}
}

func TestTheLifeOfAnAlert(t *testing.T) {
	type look struct {
		at      int
		percent float64 // below 0: the pool is gone
		want    string
		entered api.AlertPhase
		changes int
	}
	for name, tc := range map[string]struct {
		wait  int
		looks []look
	}{
		"fires at once without a wait": {0, []look{
			{0, 91, "fast:firing", api.AlertFiring, 1}, {1, 92, "fast:firing", "", 0},
		}},
		"exactly the threshold is bad":     {0, []look{{0, 90, "fast:firing", api.AlertFiring, 1}}},
		"just below the threshold is good": {0, []look{{0, 89.999, "", "", 0}}},
		"waits, then fires": {60, []look{
			{0, 91, "fast:pending", api.AlertPending, 1}, {59, 91, "fast:pending", "", 0}, {60, 91, "fast:firing", api.AlertFiring, 1},
		}},
		"a short excursion leaves nothing":                 {60, []look{{0, 91, "fast:pending", api.AlertPending, 1}, {30, 50, "", "", 1}, {70, 50, "", "", 0}}},
		"a pending one needs the threshold, not the slack": {60, []look{{0, 91, "fast:pending", api.AlertPending, 1}, {30, 88, "", "", 1}}},
		"plays around the threshold as one alert": {0, []look{
			{0, 91, "fast:firing", api.AlertFiring, 1}, {1, 89, "fast:firing", "", 0}, {2, 91, "fast:firing", "", 0},
			{3, 85.1, "fast:firing", "", 0}, {4, 85, "fast:resolved", api.AlertResolved, 1}, {5, 89, "fast:resolved", "", 0},
		}},
		"fires again as the same object": {0, []look{
			{0, 91, "fast:firing", api.AlertFiring, 1}, {1, 10, "fast:resolved", api.AlertResolved, 1}, {2, 95, "fast:firing", api.AlertFiring, 1},
		}},
		"a target that is gone resolves": {0, []look{{0, 91, "fast:firing", api.AlertFiring, 1}, {1, -1, "fast:resolved", api.AlertResolved, 1}, {2, -1, "fast:resolved", "", 0}}},
		"a clock that went back does not wait for hours": {60, []look{
			{0, 91, "fast:pending", api.AlertPending, 1}, {-7200, 91, "fast:pending", "", 1}, {-7140, 91, "fast:firing", api.AlertFiring, 1},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(rule("pool-full", api.RuleSpec{Check: api.CheckPoolFull, ForSeconds: tc.wait}))
			ids := map[string]bool{}
			for i, l := range tc.looks {
				f := poolFacts(l.percent)
				if l.percent < 0 {
					f.Pools = nil
				}
				changes := w.at(l.at, f)
				if got := w.phases(); got != l.want || len(changes) != l.changes {
					t.Fatalf("look %d: %q with %d changes, want %q with %d", i, got, len(changes), l.want, l.changes)
				}
				if len(changes) == 1 && changes[0].Entered != l.entered && !changes[0].Delete {
					t.Fatalf("look %d: entered %q, want %q", i, changes[0].Entered, l.entered)
				}
				for id := range w.alerts {
					ids[id] = true
				}
			}
			if len(ids) > 1 {
				t.Fatalf("%d objects for one rule and target", len(ids))
			}
		})
	}
}

func TestANewOccurrenceForgetsTheOldOne(t *testing.T) {
	w := newWorld(rule("pool-full", api.RuleSpec{Check: api.CheckPoolFull}))
	w.at(0, poolFacts(95))
	for id, a := range w.alerts {
		a.Spec.AcknowledgedBy, a.Status.Sent = "alice", []string{"ops/firing"}
		w.alerts[id] = a
	}
	w.at(1, poolFacts(10))
	c := w.at(2, poolFacts(95))
	a := c[0].Alert
	if a.Spec.AcknowledgedBy != "" || a.Status.Sent != nil || a.Status.ResolvedAt != nil || !c[0].Spec || c[0].Create {
		t.Fatalf("the new occurrence is %+v", c[0])
	}
}

func TestRulesThatGo(t *testing.T) {
	for name, change := range map[string]func(w *world){
		"removed":  func(w *world) { w.rules = nil },
		"disabled": func(w *world) { w.rules[0].Spec.Disabled = true },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(rule("pool-full", api.RuleSpec{Check: api.CheckPoolFull}))
			w.at(0, poolFacts(95))
			change(w)
			c := w.at(1, poolFacts(95))
			if len(c) != 1 || c[0].Entered != api.AlertResolved || !strings.Contains(c[0].Alert.Status.Message, "was removed or disabled") {
				t.Fatalf("changes %+v", c)
			}
		})
	}
}

func TestWhatIsNotKnownChangesNothing(t *testing.T) {
	nodes := []Node{{ID: "a", Name: "m1", Phase: api.NodeReady}, {ID: "b", Name: "m2", Phase: api.NodeReady}}
	at := func(p map[string]Probe) Facts { return Facts{Nodes: nodes, Probes: p, Leader: "m1"} }
	leader := Probe{Self: true, CertNotAfter: t0.AddDate(1, 0, 0)}
	for name, tc := range map[string]struct {
		rule api.RuleSpec
		bad  Probe
		good Probe
	}{
		"clock":       {api.RuleSpec{Check: api.CheckClockSkew}, Probe{Offset: -3 * time.Second}, Probe{}},
		"certificate": {api.RuleSpec{Check: api.CheckCertificate}, Probe{CertNotAfter: t0.AddDate(0, 0, 10)}, Probe{CertNotAfter: t0.AddDate(1, 0, 0)}},
		"metric":      {api.RuleSpec{Check: api.CheckMetric, Metric: "x", Threshold: 5}, Probe{Samples: []Sample{{"x", `x{a="1"}`, 6}}}, Probe{}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(rule("r", tc.rule))
			w.at(0, at(map[string]Probe{"a": leader, "b": tc.bad}))
			if got := w.phases(); !strings.HasSuffix(got, ":firing") || !strings.HasPrefix(got, "m2") {
				t.Fatalf("alerts %q", got)
			}
			if c := w.at(1, at(map[string]Probe{"a": leader})); len(c) != 0 {
				t.Fatalf("a node that did not answer changed %+v", c)
			}
			if c := w.at(2, at(nil)); len(c) != 0 {
				t.Fatalf("a new leader without answers changed %+v", c)
			}
			if c := w.at(3, at(map[string]Probe{"a": leader, "b": tc.good})); len(c) != 1 || c[0].Entered != api.AlertResolved {
				t.Fatalf("a good answer changed %+v", c)
			}
		})
	}
}

func TestClockSkew(t *testing.T) {
	s := time.Second
	for name, tc := range map[string]struct {
		p      Probe
		firing bool
		want   State
	}{
		"ahead":                           {Probe{Offset: 3 * s}, false, Bad},
		"behind":                          {Probe{Offset: -3 * s}, false, Bad},
		"within":                          {Probe{Offset: s}, false, Good},
		"too uncertain to tell":           {Probe{Offset: 2 * s, Uncertain: s / 2}, false, Unknown},
		"uncertain, but bad all the same": {Probe{Offset: 5 * s, Uncertain: s}, false, Bad},
		"firing needs more to be well":    {Probe{Offset: 1700 * time.Millisecond}, true, Bad},
		"firing and well below is good":   {Probe{Offset: 1400 * time.Millisecond}, true, Good},
		"not firing and between is good":  {Probe{Offset: 1700 * time.Millisecond}, false, Good},
	} {
		t.Run(name, func(t *testing.T) {
			r := rule("r", api.RuleSpec{Check: api.CheckClockSkew})
			f := Facts{Now: t0, Nodes: []Node{{ID: "b", Name: "m2"}}, Probes: map[string]Probe{"b": tc.p}}
			if v := clockSkew(&r, f, func(Target) bool { return tc.firing }); len(v) != 1 || v[0].State != tc.want {
				t.Fatalf("verdicts %+v, want %d", v, tc.want)
			}
		})
	}
}

// A certificate is worth an alert when its renewal is late, however long it
// lives; a life that nobody told counts as a long one.
func TestCertificate(t *testing.T) {
	const day = 24 * time.Hour
	for name, tc := range map[string]struct {
		left, life time.Duration
		firing     bool
		want       State
	}{
		"ninety days, about to be renewed":   {28 * day, 90 * day, false, Good},
		"ninety days, late":                  {22 * day, 90 * day, false, Bad},
		"a day, about to be renewed":         {9 * time.Hour, day, false, Good},
		"a day, late":                        {5 * time.Hour, day, false, Bad},
		"a minute, late":                     {10 * time.Second, time.Minute, false, Bad},
		"long life, within the threshold":    {29 * day, 825 * day, false, Bad},
		"unknown life, within the threshold": {29 * day, 0, false, Bad},
		"unknown life, outside":              {31 * day, 0, false, Good},
		"firing needs more to be well":       {23 * day, 90 * day, true, Bad},
		"firing and renewed":                 {90 * day, 90 * day, true, Good},
		"firing, short, renewed":             {time.Minute, time.Minute, true, Good},
		"ended":                              {-time.Hour, 90 * day, false, Bad},
	} {
		t.Run(name, func(t *testing.T) {
			r := rule("r", api.RuleSpec{Check: api.CheckCertificate})
			r.Spec.SetDefaults()
			f := Facts{Now: t0, Nodes: []Node{{ID: "b", Name: "m2"}}, Probes: map[string]Probe{"b": {CertNotAfter: t0.Add(tc.left), CertLife: tc.life}}}
			v := certificate(&r, f, func(Target) bool { return tc.firing })
			if len(v) != 1 || v[0].State != tc.want || tc.want == Bad && !strings.Contains(v[0].Message, "muster node show m2") {
				t.Fatalf("verdicts %+v, want %d", v, tc.want)
			}
		})
	}
}

func members(phases ...api.NodePhase) []api.MemberStatus {
	var out []api.MemberStatus
	for i, p := range phases {
		out = append(out, api.MemberStatus{NodeID: string(rune('a' + i)), Node: "m" + string(rune('1'+i)), Voter: true, Phase: p})
	}
	return out
}

func TestQuorumMargin(t *testing.T) {
	ready, lost, leaving := api.NodeReady, api.NodeLost, api.NodeLeaving
	for name, tc := range map[string]struct {
		members []api.MemberStatus
		want    State
	}{
		"nothing known":                        {nil, Unknown},
		"one voter never has one":              {members(ready), Good},
		"two voters never have one":            {members(ready, lost), Good},
		"three of three":                       {members(ready, ready, ready), Good},
		"one lost: its own alert says so":      {members(ready, ready, lost), Good},
		"one leaves: nobody else says so":      {members(ready, ready, leaving), Bad},
		"five with one lost still have one":    {members(ready, ready, ready, ready, lost), Good},
		"five with one lost and one leaving":   {members(ready, ready, ready, leaving, lost), Good},
		"five with two leaving":                {members(ready, ready, ready, leaving, leaving), Bad},
		"a replica that does not vote is none": {append(members(ready, ready, ready), api.MemberStatus{Phase: lost}), Good},
	} {
		t.Run(name, func(t *testing.T) {
			if v := quorumMargin(Facts{Members: tc.members}); v[0].State != tc.want {
				t.Fatalf("%+v, want %d", v[0], tc.want)
			}
		})
	}
}

func TestALostNodeNamesItsVMs(t *testing.T) {
	lost := t0.Add(-time.Minute)
	vms := []VM{
		{Name: "web1", Node: "m2", Phase: api.VMStarting, MovedFromID: "a", MovedLoss: lost, Recovering: true},
		{Name: "old", Node: "m2", Phase: api.VMRunning, MovedFromID: "a", MovedLoss: lost.Add(-time.Hour)},
		{Name: "db1", Node: "m1", Phase: api.VMUnknown}, {Name: "big", Node: "m1", Phase: api.VMFailed}, {Name: "other", Node: "m2", Phase: api.VMFailed},
	}
	f := Facts{Now: t0, VMs: vms, Members: members(api.NodeLost, api.NodeReady, api.NodeReady), Nodes: []Node{{ID: "a", Name: "m1", Phase: api.NodeLost, LostAt: lost}}}
	want := "node m1 is lost since 09:59:00 UTC; restarted elsewhere: web1 on m2; not protected, state unknown: db1; no other node fits: big; no quorum margin: if one more voter fails, nothing can be changed"
	if v := nodeLost(f); v[0].State != Bad || v[0].Message != want {
		t.Errorf("%q, want %q", v[0].Message, want)
	}
	f.Nodes[0].Phase = api.NodeReady
	if v := nodeLost(f); v[0].State != Good || v[0].Message != "node m1 is back; it was lost for 1m0s; restarted elsewhere: web1 on m2" {
		t.Errorf("%q", v[0].Message)
	}
	for range 30 {
		f.VMs = append(f.VMs, vms[0])
	}
	if v := nodeLost(f); !strings.HasSuffix(v[0].Message, "and 11 more") {
		t.Errorf("%q", v[0].Message)
	}
}

func TestVMs(t *testing.T) {
	for name, tc := range map[string]struct {
		vm                VM
		failed, recovered State
	}{
		"running":              {VM{Phase: api.VMRunning}, Good, Good},
		"failed":               {VM{Phase: api.VMFailed}, Bad, Good},
		"restarted too often":  {VM{Phase: api.VMStopped, GaveUp: true}, Bad, Good},
		"crashed a minute ago": {VM{Phase: api.VMRunning, Crashes: 1, CrashedAt: t0.Add(-time.Minute)}, Bad, Good},
		"crashed an hour ago":  {VM{Phase: api.VMRunning, Crashes: 1, CrashedAt: t0.Add(-time.Hour)}, Good, Good},
		"on its way":           {VM{Phase: api.VMStarting, Recovering: true}, Good, Bad},
		"a plain start":        {VM{Phase: api.VMStarting, MovedFromID: "a"}, Good, Good},
	} {
		t.Run(name, func(t *testing.T) {
			f := Facts{Now: t0, VMs: []VM{tc.vm}}
			if v := vmFailed(f)[0].State; v != tc.failed {
				t.Errorf("failed %d, want %d", v, tc.failed)
			}
			if v := vmRecovered(f)[0].State; v != tc.recovered {
				t.Errorf("recovered %d, want %d", v, tc.recovered)
			}
		})
	}
}

func TestANodeThatKeepsNoBackups(t *testing.T) {
	w := newWorld(rule("backup", api.RuleSpec{Check: api.CheckBackup}))
	facts := func(c *api.Condition) Facts { return Facts{Nodes: []Node{{ID: "n", Name: "n1", Backup: c}}} }
	for i, step := range []struct {
		c    *api.Condition
		want int
	}{
		{nil, 0},
		{&api.Condition{OK: true}, 0},
		{&api.Condition{Message: "the disk is full"}, 1},
		{&api.Condition{Message: "the disk is full"}, 0},
		{&api.Condition{OK: true}, 1},
	} {
		changes := w.at(i, facts(step.c))
		if len(changes) != step.want {
			t.Fatalf("step %d: %d changes: %+v", i, len(changes), changes)
		}
		if step.c != nil && !step.c.OK && step.want == 1 && !strings.Contains(changes[0].Alert.Status.Message, "node n1 cannot keep backups of the configuration database: the disk is full") {
			t.Errorf("message %q", changes[0].Alert.Status.Message)
		}
	}
}

func TestADrillThatFailed(t *testing.T) {
	w := newWorld(rule("drill", api.RuleSpec{Check: api.CheckDrill}))
	drill := func(phase api.TaskPhase, task string) Facts {
		d := api.Drill{Spec: api.DrillSpec{VM: "web1", TaskID: task}, Status: api.DrillStatus{Phase: phase, Message: "no room"}}
		d.Meta.ID = "v"
		return Facts{Drills: []api.Drill{d}}
	}
	for i, step := range []struct {
		f    Facts
		want int
	}{
		{drill(api.TaskRunning, "t"), 0},
		{drill(api.TaskFailed, "t"), 1},
		{drill(api.TaskRunning, "t2"), 0}, // the alert stays
		{drill(api.TaskSucceeded, "t2"), 1},
		{drill(api.TaskCancelled, "t3"), 0}, // by a person
		{drill(api.TaskCancelled, ""), 1},   // left out
	} {
		changes := w.at(i, step.f)
		if len(changes) != step.want {
			t.Fatalf("step %d: %d changes: %+v", i, len(changes), changes)
		}
		if i == 1 && changes[0].Alert.Status.Message != "the last drill of vm web1: no room" {
			t.Errorf("message %q", changes[0].Alert.Status.Message)
		}
	}
}

func TestMetricRules(t *testing.T) {
	for name, tc := range map[string]struct {
		threshold, value float64
		below, firing    bool
		want             State
	}{
		"above":                    {90, 91, false, false, Bad},
		"not above":                {90, 89, false, false, Good},
		"within the slack, firing": {90, 86, false, true, Bad},
		"past the slack":           {90, 85, false, true, Good},
		"below":                    {10, 9, true, false, Bad},
		"not below":                {10, 11, true, false, Good},
		"below, slack, firing":     {10, 10.4, true, true, Bad},
		"below, past the slack":    {10, 10.6, true, true, Good},
		"negative threshold":       {-5, -4, false, false, Bad},
		"zero threshold":           {0, 0, true, false, Bad},
	} {
		t.Run(name, func(t *testing.T) {
			r := rule("r", api.RuleSpec{Check: api.CheckMetric, Metric: "x", Threshold: tc.threshold, Below: tc.below})
			f := Facts{Now: t0, Nodes: []Node{{ID: "a"}}, Probes: map[string]Probe{"a": {Samples: []Sample{{"x", "x", tc.value}, {"y", "y", 1e9}}}}}
			if v := metric(&r, f, func(Target) bool { return tc.firing }); len(v) != 1 || v[0].State != tc.want {
				t.Fatalf("verdicts %+v, want %d", v, tc.want)
			}
		})
	}
}

func TestIDsAreUUIDsOfRuleAndTarget(t *testing.T) {
	a := ID("r", Target{api.KindNode, "1", "m1"})
	if !api.IsID(a) || a[14] != '8' {
		t.Errorf("%s is no UUID of version 8", a)
	}
	if a != ID("r", Target{api.KindNode, "1", "renamed"}) || a == ID("r", Target{api.KindVM, "1", "m1"}) || a == ID("s", Target{api.KindNode, "1", "m1"}) {
		t.Error("the ID does not follow rule, kind and target ID")
	}
}
