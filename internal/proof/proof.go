// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package proof

import (
	"fmt"
	"slices"
	"time"

	"github.com/muster-vm/muster/api"
)

// The times of ha/DESIGN.md, in milliseconds. A record that claims others was
// made by other rules, and this program cannot vouch for them.
const (
	lease    = 10_000
	perMille = 10
	kill     = 2_000
)

// readsOff is how often a power device has to say "off" after the last command.
const readsOff = 2

// What a guard says of a process that it was told to kill, and killed.
const (
	killedByGuard = "kill request"
	sigkill       = 9
)

// Finding is one rule and whether the evidence bears it.
type Finding struct {
	Rule   string `json:"rule"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
}

// Verdict is what the check of one failover found.
type Verdict struct {
	Failover string    `json:"failover"`
	Node     string    `json:"node"`
	OK       bool      `json:"ok"`
	Findings []Finding `json:"findings"`
}

// The rules, in the order in which they are checked.
const (
	RuleCertain    = "the node's protected VMs had ended for certain"
	RuleLeader     = "the moves were decided in the term of the declaration or later"
	RuleAfter      = "every move came after the declaration"
	RuleFromLost   = "every move was away from the lost node, to another"
	RuleEpoch      = "every move raised the epoch by one"
	RuleOnce       = "no VM was moved twice under one epoch"
	RuleReadmitted = "the node was let in again only after the last move"
	RuleGuarded    = "what ended the VMs is what the evidence is about"
	RuleStarted    = "every VM that runs was reported by its new node, under the new epoch, after the move"
	RuleBinding    = "the bindings of today follow from the moves"
)

type verdict struct{ Verdict }

func (v *verdict) say(rule string, ok bool, format string, args ...any) {
	v.Findings = append(v.Findings, Finding{Rule: rule, OK: ok, Detail: fmt.Sprintf(format, args...)})
	v.OK = v.OK && ok
}

// each reports a rule that every move has to keep: bad returns why one does not.
func (v *verdict) each(rule string, moves []api.FailoverMove, bad func(m *api.FailoverMove) string) {
	var why string
	n := 0
	for i := range moves {
		if text := bad(&moves[i]); text != "" {
			if n++; n == 1 {
				why = fmt.Sprintf("vm %s: %s", moves[i].Spec.VM, text)
			}
		}
	}
	switch n {
	case 0:
		v.say(rule, true, "%d of %d", len(moves), len(moves))
	case 1:
		v.say(rule, false, "%s", why)
	default:
		v.say(rule, false, "%s; and %d more", why, n-1)
	}
}

// Check checks the evidence of one failover.
func Check(p *api.FailoverProof) Verdict {
	f := &p.Failover
	v := &verdict{Verdict{Failover: f.Meta.ID, Node: f.Spec.Node, OK: true}}
	v.certain(&f.Spec)
	declared := f.Meta.Revision
	if declared == 0 || f.Spec.NodeID == "" {
		v.say(RuleAfter, false, "the record of the loss has no revision or names no node")
		return v.Verdict
	}
	v.each(RuleLeader, p.Moves, func(m *api.FailoverMove) string {
		if m.Spec.Term < f.Spec.Term {
			return fmt.Sprintf("moved in term %d, the node was declared lost in term %d", m.Spec.Term, f.Spec.Term)
		}
		return ""
	})
	v.each(RuleAfter, p.Moves, func(m *api.FailoverMove) string {
		switch {
		case m.Spec.FailoverID != f.Meta.ID:
			return "the record belongs to another loss"
		case m.Meta.Revision <= declared:
			return fmt.Sprintf("moved at revision %d, the node was declared lost at %d", m.Meta.Revision, declared)
		}
		return ""
	})
	v.each(RuleFromLost, p.Moves, func(m *api.FailoverMove) string {
		switch {
		case m.Spec.FromNodeID != f.Spec.NodeID:
			return "it was not bound to the lost node"
		case m.Spec.NodeID == f.Spec.NodeID || m.Spec.NodeID == "":
			return "it was not moved to another node"
		}
		return ""
	})
	v.each(RuleEpoch, p.Moves, func(m *api.FailoverMove) string {
		if m.Spec.FromEpoch == 0 || m.Spec.Epoch != m.Spec.FromEpoch+1 {
			return fmt.Sprintf("moved from epoch %d to %d", m.Spec.FromEpoch, m.Spec.Epoch)
		}
		return ""
	})
	v.each(RuleGuarded, p.Moves, func(m *api.FailoverMove) string {
		switch {
		case f.Spec.Cause == api.CauseLease && len(m.Spec.Pools) > 0:
			return "it had a storage guard, so the guard of the old node did not end it"
		case f.Spec.Cause == api.CauseStorage && f.Spec.Storage != nil && !slices.Contains(m.Spec.Pools, f.Spec.Storage.PoolID):
			return "it had no storage guard in the pool that locked the node out"
		case f.Spec.Cause == api.CauseDrill && f.Spec.Drill != nil && f.Spec.Drill.VMID != m.Spec.VMID:
			return fmt.Sprintf("the drill ended vm %s", f.Spec.Drill.VM)
		}
		return ""
	})
	v.once(p)
	v.readmitted(p)
	v.started(p.Moves)
	v.bindings(p)
	return v.Verdict
}

// certain checks why the leader might take the VMs for ended.
func (v *verdict) certain(s *api.FailoverSpec) {
	switch s.Cause {
	case api.CauseLease:
		need := lease + lease*perMille/1000 + int64(kill)
		r := s.Rules
		switch {
		case r.LeaseMillis != lease || r.DriftPerMille < perMille || r.KillMillis < kill:
			v.say(RuleCertain, false, "the leader went by a lease of %d ms, a drift of %d per mille and %d ms to kill; this program knows %d, %d and %d",
				r.LeaseMillis, r.DriftPerMille, r.KillMillis, lease, perMille, kill)
		case sinceText(s.Since) == "":
			v.say(RuleCertain, false, "the record does not say what the silence was counted from")
		default:
			v.say(RuleCertain, s.SilentMillis >= need, "%d ms since %s, by the leader's CLOCK_BOOTTIME; %d ms are needed (lease %d, drift %d, kill %d)",
				s.SilentMillis, sinceText(s.Since), need, lease, lease*perMille/1000, kill)
		}
	case api.CausePower:
		v.power(s.Power)
	case api.CauseStorage:
		v.storage(s.Storage)
	case api.CauseDrill:
		v.drill(s.Drill)
	default:
		v.say(RuleCertain, false, "the record names the cause %q, which this program does not know", s.Cause)
	}
}

// sinceText is empty for what this program does not know.
func sinceText(s api.SilenceSince) string {
	switch s {
	case api.SinceGrant:
		return "the last lease was granted"
	case api.SinceEarlier:
		return "an earlier leader may have granted one, as a majority of the voters says"
	case api.SinceLeadership:
		return "the leadership began"
	}
	return ""
}

// power checks what a device answered: off, as often as needed, after the last
// command, and nothing else since.
func (v *verdict) power(p *api.FailoverPower) {
	if p == nil {
		v.say(RuleCertain, false, "the host is said to have been switched off, and there is no answer of a device")
		return
	}
	reads, device, commanded := 0, "", false
	for _, s := range p.Steps {
		switch {
		case s.Do == api.PowerOff:
			// Whatever was read before it does not count.
			reads, device, commanded = 0, s.Device, true // a host that is off may refuse it
		case s.Do == api.PowerOn || s.Do == api.PowerCycle:
			reads, commanded = 0, false
		case s.Do == api.PowerRead && s.OK && s.Answer == "off" && s.Device == device:
			reads++
		case s.Do == api.PowerRead && s.Device == device:
			reads = 0
		}
	}
	v.say(RuleCertain, commanded && reads >= readsOff,
		"the power device %q read %d times in a row as off after the command, %s; %d times are needed (action %s)", device, reads, took(p.BeganAt, p.EndedAt), readsOff, p.Action)
}

// took tells how long something took by the time of day, which proves nothing: whoever
// wrote it may have had its clock set meanwhile.
func took(began, ended time.Time) string {
	if ended.Before(began) {
		return "in a time that is not known, since the clock was set back meanwhile"
	}
	return fmt.Sprintf("in %d ms", ended.Sub(began).Milliseconds())
}

// storage checks what the pool answered that locked the host out.
func (v *verdict) storage(s *api.FailoverStorage) {
	if s == nil {
		v.say(RuleCertain, false, "the host is said to have been locked out of a pool, and there is no answer of the pool")
		return
	}
	v.say(RuleCertain, s.Epoch > 0 && len(s.Addresses) > 0, "the addresses %v of the host are locked out of pool %s by map %d, %s; owners of locks: %v",
		s.Addresses, s.Pool, s.Epoch, took(s.BeganAt, s.EndedAt), s.Owners)
}

// drill checks what the guard said of the one VM that it ended.
func (v *verdict) drill(d *api.FailoverDrill) {
	if d == nil {
		v.say(RuleCertain, false, "a vm is said to have been ended for a drill, and there is no answer of its guard")
		return
	}
	v.say(RuleCertain, d.VMID != "" && d.PID > 0 && d.Reason == killedByGuard && d.Signal == sigkill,
		"the guard reaped QEMU of vm %s, process %d: ended by signal %d, reason %q; signal %d and reason %q are needed", d.VM, d.PID, d.Signal, d.Reason, sigkill, killedByGuard)
}

// once checks that no epoch of a VM was given twice, at this loss and the others.
func (v *verdict) once(p *api.FailoverProof) {
	type claim struct {
		vm    string
		epoch uint64
	}
	at := map[claim]string{}
	for _, m := range slices.Concat(p.Moves, p.Others) {
		c := claim{m.Spec.VMID, m.Spec.Epoch}
		if other, taken := at[c]; taken {
			v.say(RuleOnce, false, "vm %s got epoch %d on node %s and on node %s", m.Spec.VM, m.Spec.Epoch, other, m.Spec.Node)
			return
		}
		at[c] = m.Spec.Node
	}
	v.say(RuleOnce, true, "%d epochs of %d moves at this loss and %d at others", len(at), len(p.Moves), len(p.Others))
}

func (v *verdict) readmitted(p *api.FailoverProof) {
	f := &p.Failover
	if f.Status.ReadmittedAt == nil {
		v.say(RuleReadmitted, true, "it has not been readmitted, as of revision %d", p.Revision)
		return
	}
	back := f.Meta.StatusRevision
	v.each(RuleReadmitted, p.Moves, func(m *api.FailoverMove) string {
		if m.Meta.Revision >= back {
			return fmt.Sprintf("moved at revision %d, the node was readmitted at %d", m.Meta.Revision, back)
		}
		return ""
	})
}

func (v *verdict) started(moves []api.FailoverMove) {
	running := slices.DeleteFunc(slices.Clone(moves), func(m api.FailoverMove) bool { return m.Status.Phase != api.MoveRunning })
	v.each(RuleStarted, running, func(m *api.FailoverMove) string {
		switch {
		case m.Status.Epoch != m.Spec.Epoch:
			return fmt.Sprintf("reported under epoch %d, moved under %d", m.Status.Epoch, m.Spec.Epoch)
		case m.Meta.StatusRevision <= m.Meta.Revision:
			return fmt.Sprintf("seen running at revision %d, moved at %d", m.Meta.StatusRevision, m.Meta.Revision)
		}
		return ""
	})
}

func (v *verdict) bindings(p *api.FailoverProof) {
	now := map[string]*api.Binding{}
	for i := range p.Bindings {
		now[p.Bindings[i].Meta.ID] = &p.Bindings[i]
	}
	v.each(RuleBinding, p.Moves, func(m *api.FailoverMove) string {
		b := now[m.Spec.VMID]
		switch {
		case b == nil && m.Status.Phase != api.MoveGone && m.Status.Phase != "" && !m.Status.Phase.Final():
			return "it has no binding, and nothing says that it was deleted"
		case b == nil:
			return "" // deleted since
		case b.Spec.Epoch < m.Spec.Epoch:
			return fmt.Sprintf("bound under epoch %d, moved under %d", b.Spec.Epoch, m.Spec.Epoch)
		case b.Spec.Epoch == m.Spec.Epoch && b.Spec.NodeID != m.Spec.NodeID:
			return fmt.Sprintf("bound to node %s under epoch %d, moved to %s", b.Spec.Node, b.Spec.Epoch, m.Spec.Node)
		case b.Meta.Revision < m.Meta.Revision:
			return fmt.Sprintf("its binding is of revision %d, the move of %d", b.Meta.Revision, m.Meta.Revision)
		}
		return ""
	})
}
