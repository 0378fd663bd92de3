// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package proof

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

// sound is evidence that holds: m1 was silent, a and b went to m2 and m3, then m1
// came back; a was moved once more at another loss.
func sound() *api.FailoverProof {
	at := time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC)
	f := api.NewFailover(&api.Node{Meta: api.Meta{ID: "n1", Name: "m1"}}, api.CauseLease, at)
	f.Meta.Revision, f.Meta.StatusRevision = 100, 120
	f.Spec.Term, f.Spec.LeaderID, f.Spec.Leader = 7, "n2", "m2"
	f.Spec.SilentMillis, f.Spec.Since = 13_250, api.SinceGrant
	f.Spec.Rules = api.LeaseRules{LeaseMillis: 10_000, DriftPerMille: 10, KillMillis: 2_000, MarginMillis: 1_000}
	back := at.Add(time.Minute)
	f.Status = api.FailoverStatus{ReadmittedAt: &back, ReadmittedTerm: 7}
	move := func(of *api.Failover, vm, from, to string, epoch, rev uint64) api.FailoverMove {
		m := api.NewFailoverMove(of.Meta.ID, &api.VM{Meta: api.Meta{ID: vm, Name: "vm-" + vm, Project: "default"}}, at.Add(time.Second))
		m.Meta.Revision, m.Meta.StatusRevision = rev, rev+5
		m.Spec.Outcome, m.Spec.Term = api.HARestarts, of.Spec.Term
		m.Spec.FromNodeID, m.Spec.FromEpoch, m.Spec.NodeID, m.Spec.Node, m.Spec.Epoch = from, epoch-1, to, to, epoch
		running := at.Add(3 * time.Second)
		m.Status = api.FailoverMoveStatus{Phase: api.MoveRunning, At: &running, Epoch: epoch}
		return m
	}
	other := f.Clone()
	other.Meta.ID, other.Spec.Term = "later", 9
	p := &api.FailoverProof{Failover: f, Revision: 300}
	p.Moves = []api.FailoverMove{move(&f, "a", "n1", "n2", 2, 101), move(&f, "b", "n1", "n3", 4, 102)}
	p.Others = []api.FailoverMove{move(&other, "a", "n2", "n3", 3, 200)}
	binding := func(vm, node string, epoch, rev uint64) api.Binding {
		return api.Binding{Meta: api.Meta{ID: vm, Revision: rev}, Spec: api.BindingSpec{NodeID: node, Node: node, Epoch: epoch}}
	}
	p.Bindings = []api.Binding{binding("a", "n3", 3, 200), binding("b", "n3", 4, 102)}
	return p
}

// switchedOff is evidence that a device said that the host is off.
func switchedOff() *api.FailoverProof {
	p := sound()
	s := &p.Failover.Spec
	s.Cause, s.SilentMillis = api.CausePower, 5_100
	step := func(do api.PowerVerb, answer string) api.PowerStep {
		return api.PowerStep{Device: "bmc1", Do: do, OK: true, Answer: answer}
	}
	s.Power = &api.FailoverPower{Action: "act", BeganAt: s.At.Add(-time.Second), EndedAt: s.At, Steps: []api.PowerStep{
		step(api.PowerConnect, "session opened"), step(api.PowerRead, "on"), step(api.PowerOff, "accepted"),
		step(api.PowerRead, "on"), step(api.PowerRead, "off"), step(api.PowerRead, "off"),
	}}
	return p
}

// lockedOut is evidence that a pool says that the host is locked out.
func lockedOut() *api.FailoverProof {
	p := sound()
	s := &p.Failover.Spec
	s.Cause, s.SilentMillis = api.CauseStorage, 5_100
	s.Storage = &api.FailoverStorage{Fence: "f", PoolID: "p1", Pool: "ceph", BeganAt: s.At.Add(-time.Second), EndedAt: s.At, Epoch: 17, Addresses: []string{"10.0.0.1"}}
	for i := range p.Moves {
		p.Moves[i].Spec.Pools = []string{"p1"}
	}
	return p
}

// drilled is evidence that a guard ended one VM for a drill.
func drilled() *api.FailoverProof {
	p := sound()
	s := &p.Failover.Spec
	s.Cause, s.SilentMillis, s.Term, s.Leader, s.LeaderID = api.CauseDrill, 0, 0, "", ""
	p.Failover.Status = api.FailoverStatus{}
	p.Moves, p.Bindings = p.Moves[:1], p.Bindings[:1]
	s.Drill = &api.FailoverDrill{VMID: p.Moves[0].Spec.VMID, VM: "a", DrillEnd: api.DrillEnd{PID: 7, Reason: "kill request", Signal: 9, At: s.At}}
	return p
}

func TestSoundEvidenceHolds(t *testing.T) {
	for name, p := range map[string]*api.FailoverProof{"lease": sound(), "power": switchedOff(), "storage": lockedOut(), "drill": drilled()} {
		v := Check(p)
		if !v.OK || len(v.Findings) != 10 {
			t.Errorf("%s: %+v", name, v)
		}
		for _, f := range v.Findings {
			if f.Rule == "" || f.Detail == "" {
				t.Errorf("%s: a finding says nothing: %+v", name, f)
			}
		}
	}
	if v := Check(switchedOff()); !v.OK {
		t.Errorf("a host that was off already and refused the command: %+v", v)
	}
}

// The leader's clock may be set back while it fences: the order of what was read is that
// of the records, not that of the time of day.
func TestEvidenceHoldsWhenTheClockWasSetBack(t *testing.T) {
	power, pool := switchedOff(), lockedOut()
	power.Failover.Spec.Power.EndedAt = power.Failover.Spec.Power.BeganAt.Add(-time.Hour)
	pool.Failover.Spec.Storage.EndedAt = pool.Failover.Spec.Storage.BeganAt.Add(-time.Hour)
	for name, p := range map[string]*api.FailoverProof{"power": power, "storage": pool} {
		told := false
		v := Check(p)
		for _, f := range v.Findings {
			told = told || strings.Contains(f.Detail, "the clock was set back")
		}
		if !v.OK || !told {
			t.Errorf("%s: %+v", name, v)
		}
	}
}

func TestWhatASilenceMayBeCountedFrom(t *testing.T) {
	for since, says := range map[api.SilenceSince]string{
		api.SinceGrant: "the last lease was granted", api.SinceLeadership: "the leadership began", api.SinceEarlier: "a majority of the voters",
	} {
		p := sound()
		p.Failover.Spec.Since = since
		v := Check(p)
		told := slices.ContainsFunc(v.Findings, func(f Finding) bool { return strings.Contains(f.Detail, says) })
		if !v.OK || !told {
			t.Errorf("%s: %+v", since, v)
		}
	}
}

func TestEachFlawIsFoundByItsRule(t *testing.T) {
	flaws := []struct {
		name, rule string
		of         func() *api.FailoverProof
		change     func(p *api.FailoverProof)
	}{
		{"declared too early", RuleCertain, sound, func(p *api.FailoverProof) { p.Failover.Spec.SilentMillis = 12_099 }},
		{"a shorter lease", RuleCertain, sound, func(p *api.FailoverProof) { p.Failover.Spec.Rules.LeaseMillis = 5_000 }},
		{"no time to kill", RuleCertain, sound, func(p *api.FailoverProof) { p.Failover.Spec.Rules.KillMillis = 0 }},
		{"counted from nothing", RuleCertain, sound, func(p *api.FailoverProof) { p.Failover.Spec.Since = "" }},
		{"an unknown cause", RuleCertain, sound, func(p *api.FailoverProof) { p.Failover.Spec.Cause = "hope" }},
		{"no answer of the device", RuleCertain, switchedOff, func(p *api.FailoverProof) { p.Failover.Spec.Power = nil }},
		{"read off once", RuleCertain, switchedOff, func(p *api.FailoverProof) { drop(&p.Failover.Spec.Power.Steps, 5) }},
		{"on between", RuleCertain, switchedOff, func(p *api.FailoverProof) { p.Failover.Spec.Power.Steps[5].Answer = "on" }},
		{"never commanded", RuleCertain, switchedOff, func(p *api.FailoverProof) { drop(&p.Failover.Spec.Power.Steps, 2) }},
		{"another device", RuleCertain, switchedOff, func(p *api.FailoverProof) { p.Failover.Spec.Power.Steps[5].Device = "bmc2" }},
		{"switched on again", RuleCertain, switchedOff, func(p *api.FailoverProof) {
			s := &p.Failover.Spec.Power.Steps
			*s = append(*s, api.PowerStep{Device: "bmc1", Do: api.PowerOn, OK: true})
		}},
		{"no answer of the pool", RuleCertain, lockedOut, func(p *api.FailoverProof) { p.Failover.Spec.Storage = nil }},
		{"in no map", RuleCertain, lockedOut, func(p *api.FailoverProof) { p.Failover.Spec.Storage.Epoch = 0 }},
		{"no address", RuleCertain, lockedOut, func(p *api.FailoverProof) { p.Failover.Spec.Storage.Addresses = nil }},
		{"another pool", RuleGuarded, lockedOut, func(p *api.FailoverProof) { p.Moves[0].Spec.Pools = []string{"p2"} }},
		{"not killed", RuleGuarded, sound, func(p *api.FailoverProof) { p.Moves[0].Spec.Pools = []string{"p1"} }},
		{"no word of the guard", RuleCertain, drilled, func(p *api.FailoverProof) { p.Failover.Spec.Drill = nil }},
		{"it ended otherwise", RuleCertain, drilled, func(p *api.FailoverProof) { p.Failover.Spec.Drill.Reason = "lease ran out" }},
		{"another signal", RuleCertain, drilled, func(p *api.FailoverProof) { p.Failover.Spec.Drill.Signal = 15 }},
		{"no process", RuleCertain, drilled, func(p *api.FailoverProof) { p.Failover.Spec.Drill.PID = 0 }},
		{"another VM", RuleGuarded, drilled, func(p *api.FailoverProof) { p.Failover.Spec.Drill.VMID = "z" }},
		{"an earlier term", RuleLeader, sound, func(p *api.FailoverProof) { p.Moves[1].Spec.Term = 6 }},
		{"moved before", RuleAfter, sound, func(p *api.FailoverProof) { p.Moves[0].Meta.Revision = 99 }},
		{"no record", RuleAfter, sound, func(p *api.FailoverProof) { p.Failover.Meta.Revision = 0 }},
		{"another loss", RuleAfter, sound, func(p *api.FailoverProof) { p.Moves[0].Spec.FailoverID = "x" }},
		{"from another node", RuleFromLost, sound, func(p *api.FailoverProof) { p.Moves[0].Spec.FromNodeID = "n3" }},
		{"to the lost node", RuleFromLost, sound, func(p *api.FailoverProof) { p.Moves[0].Spec.NodeID = "n1" }},
		{"epoch kept", RuleEpoch, sound, func(p *api.FailoverProof) { p.Moves[0].Spec.Epoch = 1 }},
		{"epoch skipped", RuleEpoch, sound, func(p *api.FailoverProof) { p.Moves[1].Spec.Epoch = 5; p.Moves[1].Status.Epoch = 5 }},
		{"one epoch twice", RuleOnce, sound, func(p *api.FailoverProof) { p.Others[0].Spec.Epoch = 2 }},
		{"moved after the return", RuleReadmitted, sound, func(p *api.FailoverProof) { p.Moves[1].Meta.Revision = 120; p.Moves[1].Meta.StatusRevision = 130 }},
		{"runs under another epoch", RuleStarted, sound, func(p *api.FailoverProof) { p.Moves[0].Status.Epoch = 1 }},
		{"ran before", RuleStarted, sound, func(p *api.FailoverProof) { p.Moves[0].Meta.StatusRevision = 101 }},
		{"bound elsewhere", RuleBinding, sound, func(p *api.FailoverProof) { p.Bindings[1].Spec.NodeID = "n2" }},
		{"an older binding", RuleBinding, sound, func(p *api.FailoverProof) { p.Bindings[1].Spec.Epoch = 3 }},
	}
	for _, flaw := range flaws {
		p := flaw.of()
		flaw.change(p)
		v := Check(p)
		found := false
		for _, f := range v.Findings {
			found = found || f.Rule == flaw.rule && !f.OK
		}
		if v.OK || !found {
			t.Errorf("%s: not found by %q: %+v", flaw.name, flaw.rule, v.Findings)
		}
	}
}

func drop(s *[]api.PowerStep, i int) { *s = append((*s)[:i:i], (*s)[i+1:]...) }

func FuzzCheck(f *testing.F) {
	for _, p := range []*api.FailoverProof{sound(), switchedOff(), lockedOut()} {
		b, err := json.Marshal(p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var p api.FailoverProof
		if json.Unmarshal(b, &p) != nil {
			return
		}
		if v := Check(&p); len(v.Findings) == 0 {
			t.Error("nothing was checked")
		}
	})
}
