// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package alert

import (
	"fmt"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
)

// Hysteresis: what fires at a threshold resolves only well on its good side,
// so that a value that plays around the threshold is one alert.
const (
	poolSlack   = 5.0  // percentage points
	skewSlack   = 0.75 // of the threshold
	certSlack   = 1.0  // days
	metricSlack = 0.05 // of the threshold
	// crashMemory is how long a crash that was overcome keeps its alert.
	crashMemory = 5 * time.Minute
	// maxNamed is how many objects a message names.
	maxNamed = 20
)

type isFiring func(Target) bool

// sure says of no target that nothing is known.
func sure(string) bool { return false }

// check applies one rule. unsure tells for an alert without a verdict whether
// that is because nobody knows, or because its target is gone.
func check(r *api.Rule, f Facts, firing isFiring) (verdicts []Verdict, unsure func(targetID string) bool) {
	switch r.Spec.Check {
	case api.CheckNodeLost:
		return nodeLost(f), sure
	case api.CheckQuorumMargin:
		return quorumMargin(f), sure
	case api.CheckQuorumLost:
		return nil, sure // who leads has a quorum; a node without one tells by itself
	case api.CheckVMFailed:
		return vmFailed(f), sure
	case api.CheckVMRecovered:
		return vmRecovered(f), sure
	case api.CheckPoolFull:
		return poolFull(r, f, firing), sure
	case api.CheckClockSkew:
		return clockSkew(r, f, firing), unprobed(f)
	case api.CheckCertificate:
		return certificate(r, f, firing), unprobed(f)
	case api.CheckBackup:
		return backups(f), sure
	case api.CheckDrill:
		return drills(f), sure
	case api.CheckMetric:
		return metric(r, f, firing), unmeasured(f)
	}
	return nil, func(string) bool { return true } // a check of a newer version
}

// unprobed is unsure of what belongs to a node that did not answer.
func unprobed(f Facts) func(string) bool {
	return func(targetID string) bool {
		nodeID, _, _ := strings.Cut(targetID, "/")
		if _, ok := f.Probes[nodeID]; ok {
			return false
		}
		for i := range f.Nodes {
			if f.Nodes[i].ID == nodeID {
				return true
			}
		}
		return false
	}
}

// unmeasured is unsure of a series, too, that the node cannot tell of now.
func unmeasured(f Facts) func(string) bool {
	unprobed := unprobed(f)
	return func(targetID string) bool {
		nodeID, series, _ := strings.Cut(targetID, "/")
		p, probed := f.Probes[nodeID]
		return unprobed(targetID) || probed && (p.Partial || p.Stuck[series])
	}
}

// nodeLost names what became of the node's VMs, so that one message says all
// about a lost host.
func nodeLost(f Facts) []Verdict {
	var out []Verdict
	for _, n := range f.Nodes {
		t := Target{api.KindNode, n.ID, n.Name}
		fate := fateOf(n, f.VMs)
		if n.Phase != api.NodeLost {
			m := fmt.Sprintf("node %s is back", n.Name)
			if !n.LostAt.IsZero() {
				m += fmt.Sprintf("; it was lost for %s", f.Now.Sub(n.LostAt).Round(time.Second))
			}
			out = append(out, Verdict{t, Good, m + fate, false})
			continue
		}
		m := fmt.Sprintf("node %s is lost since %s UTC", n.Name, n.LostAt.UTC().Format(time.TimeOnly))
		m += fate
		if left, voters := margin(f.Members); voters > 2 && left < 1 {
			m += "; no quorum margin: if one more voter fails, nothing can be changed"
		}
		out = append(out, Verdict{t, Bad, m, true})
	}
	return out
}

// fateOf says where the VMs of a lost node are now.
func fateOf(n Node, vms []VM) string {
	var moved, unknown, stuck []string
	for i := range vms {
		vm := &vms[i]
		switch {
		case vm.MovedFromID == n.ID && !n.LostAt.IsZero() && vm.MovedLoss.Equal(n.LostAt):
			moved = append(moved, vm.Name+" on "+vm.Node)
		case n.Phase != api.NodeLost || vm.Node != n.Name:
		case vm.Phase == api.VMUnknown:
			unknown = append(unknown, vm.Name)
		case vm.Phase == api.VMFailed:
			stuck = append(stuck, vm.Name)
		}
	}
	return named("; restarted elsewhere: ", moved) + named("; not protected, state unknown: ", unknown) + named("; no other node fits: ", stuck)
}

func named(title string, list []string) string {
	if len(list) == 0 {
		return ""
	}
	more := ""
	if n := len(list) - maxNamed; n > 0 {
		list, more = list[:maxNamed], fmt.Sprintf(" and %d more", n)
	}
	return title + strings.Join(list, ", ") + more
}

// margin returns how many voters may fail before the majority is gone.
func margin(members []api.MemberStatus) (left, voters int) {
	alive := 0
	for _, m := range members {
		if !m.Voter {
			continue
		}
		voters++
		if m.Phase == api.NodeReady {
			alive++
		}
	}
	return alive - (voters/2 + 1), voters
}

// quorumMargin is bad when the next failure stops all changes. One or two
// voters never have a margin, which is no event; and while lost nodes explain
// it, their alerts say so.
func quorumMargin(f Facts) []Verdict {
	left, voters := margin(f.Members)
	v := Verdict{Target: Target{api.KindCluster, "quorum", "quorum"}, State: Good, Message: "the quorum has a margin again"}
	if voters == 0 {
		return []Verdict{{Target: v.Target, State: Unknown}}
	}
	if voters < 3 || left >= 1 {
		return []Verdict{v}
	}
	var out []string
	lost := 0
	for _, m := range f.Members {
		if !m.Voter || m.Phase == api.NodeReady {
			continue
		}
		if m.Phase == api.NodeLost {
			lost++
		}
		out = append(out, fmt.Sprintf("%s (%s)", m.Node, m.Phase))
	}
	if left+lost >= 1 {
		return []Verdict{v}
	}
	v.State, v.Refresh = Bad, true
	v.Message = fmt.Sprintf("no quorum margin: if one more of the %d voters fails, nothing can be changed", voters) + named("; not ready: ", out)
	return []Verdict{v}
}

func vmTarget(vm *VM) Target {
	name := vm.Name
	if vm.Project != api.DefaultProject {
		name = vm.Project + "/" + name
	}
	return Target{api.KindVM, vm.ID, name}
}

func vmFailed(f Facts) []Verdict {
	out := make([]Verdict, 0, len(f.VMs))
	for i := range f.VMs {
		vm := &f.VMs[i]
		v := Verdict{vmTarget(vm), Good, fmt.Sprintf("vm %s is %s", vm.Name, vm.Phase), false}
		switch {
		case vm.Phase == api.VMFailed:
			v.State, v.Message = Bad, fmt.Sprintf("vm %s on node %s has failed: %s", vm.Name, vm.Node, vm.Message)
		case vm.GaveUp:
			v.State, v.Message = Bad, fmt.Sprintf("vm %s on node %s stays down: %s", vm.Name, vm.Node, vm.Message)
		case !vm.CrashedAt.IsZero() && f.Now.Sub(vm.CrashedAt) < crashMemory:
			v.State, v.Message = Bad, fmt.Sprintf("vm %s on node %s crashed and is %s again (%d crashes since its last start)", vm.Name, vm.Node, vm.Phase, vm.Crashes)
		}
		out = append(out, v)
	}
	return out
}

// vmRecovered lasts from the move until the VM runs at its new place.
func vmRecovered(f Facts) []Verdict {
	out := make([]Verdict, 0, len(f.VMs))
	for i := range f.VMs {
		vm := &f.VMs[i]
		v := Verdict{vmTarget(vm), Good, fmt.Sprintf("vm %s is %s on node %s", vm.Name, vm.Phase, vm.Node), false}
		if vm.Recovering {
			v.State, v.Message = Bad, fmt.Sprintf("vm %s was moved from the lost node %s to node %s and is %s", vm.Name, vm.MovedFrom, vm.Node, vm.Phase)
		}
		out = append(out, v)
	}
	return out
}

// above is a verdict on a value whose high side is bad.
func above(value, fire, calm float64, firing bool) State {
	if value >= fire || firing && value > calm {
		return Bad
	}
	return Good
}

func poolFull(r *api.Rule, f Facts, firing isFiring) []Verdict {
	var out []Verdict
	for _, p := range f.Pools {
		t := Target{api.KindPool, p.ID, p.Name}
		if p.Unknown {
			out = append(out, Verdict{Target: t, State: Unknown})
			continue
		}
		out = append(out, Verdict{t, above(p.Percent, r.Spec.Threshold, r.Spec.Threshold-poolSlack, firing(t)),
			fmt.Sprintf("pool %s is %.0f %% full (threshold %g %%)", p.Name, p.Percent, r.Spec.Threshold), false})
	}
	return out
}

func clockSkew(r *api.Rule, f Facts, firing isFiring) []Verdict {
	var out []Verdict
	skewed := false
	for _, n := range f.Nodes {
		p, ok := f.Probes[n.ID]
		if !ok || p.Self {
			continue
		}
		t := Target{api.KindNode, n.ID, n.Name}
		way, off := "ahead of", p.Offset
		if off < 0 {
			way, off = "behind", -off
		}
		v := Verdict{Target: t, State: Good, Message: fmt.Sprintf("the clock of node %s is %.1f s %s that of node %s", n.Name, off.Seconds(), way, f.Leader)}
		limit := time.Duration(r.Spec.Threshold * float64(time.Second))
		if firing(t) {
			limit = time.Duration(r.Spec.Threshold * skewSlack * float64(time.Second))
		}
		switch {
		case off-p.Uncertain >= limit:
			v.State, skewed = Bad, true
		case off+p.Uncertain >= limit:
			v.State = Unknown // the answer took too long to tell
		}
		out = append(out, v)
	}
	return append(out, ownClock(f, skewed)...)
}

// ownClock judges the leader, which cannot compare with itself: if all others
// agree with it, it is well.
func ownClock(f Facts, skewed bool) []Verdict {
	for _, n := range f.Nodes {
		if p, ok := f.Probes[n.ID]; ok && p.Self {
			v := Verdict{Target: Target{api.KindNode, n.ID, n.Name}, State: Unknown}
			if !skewed && len(f.Probes) > 1 {
				v.State, v.Message = Good, fmt.Sprintf("the clock of node %s agrees with those of the others", n.Name)
			}
			return []Verdict{v}
		}
	}
	return nil
}

func certificate(r *api.Rule, f Facts, firing isFiring) []Verdict {
	var out []Verdict
	for _, n := range f.Nodes {
		p, ok := f.Probes[n.ID]
		if !ok || p.CertNotAfter.IsZero() {
			continue
		}
		t := Target{api.KindNode, n.ID, n.Name}
		days := p.CertNotAfter.Sub(f.Now).Hours() / 24
		limit, slack := certLimit(r.Spec.Threshold, p.CertLife)
		v := Verdict{Target: t, State: Good, Message: fmt.Sprintf("the certificate of node %s is valid until %s", n.Name, p.CertNotAfter.UTC().Format(time.DateOnly))}
		if days <= limit || firing(t) && days < limit+slack {
			v.State = Bad
			v.Message = fmt.Sprintf("the certificate of node %s ends on %s, in %.0f days, and was not renewed; see: muster node show %s", n.Name, p.CertNotAfter.UTC().Format(time.DateOnly), days, n.Name)
		}
		out = append(out, v)
	}
	return out
}

// certLimit is how many days before its end a certificate is bad. A node renews
// its own after two thirds of the life, so what has less than a quarter left is
// late, and only that is worth an alert, however short the life.
func certLimit(days float64, life time.Duration) (limit, slack float64) {
	if life > 0 {
		days = min(days, life.Hours()/24/4)
	}
	return days, min(certSlack, days/10)
}

// backups is bad for a node that cannot keep backups of the database. A node
// that is lost says nothing new.
func backups(f Facts) []Verdict {
	var out []Verdict
	for _, n := range f.Nodes {
		if n.Backup == nil {
			continue
		}
		v := Verdict{Target{api.KindNode, n.ID, n.Name}, Good, fmt.Sprintf("node %s keeps backups of the configuration database again", n.Name), false}
		if !n.Backup.OK {
			v.State, v.Message = Bad, fmt.Sprintf("node %s cannot keep backups of the configuration database: %s", n.Name, n.Backup.Message)
		}
		out = append(out, v)
	}
	return out
}

// drills are bad when the last one of a VM failed or was left out. One that goes on, or
// that a person gave up, says nothing.
func drills(f Facts) []Verdict {
	var out []Verdict
	for i := range f.Drills {
		d := &f.Drills[i]
		v := Verdict{Target: Target{api.KindVM, d.Meta.ID, d.Spec.VM}, State: Unknown}
		switch {
		case d.Status.Phase == api.TaskSucceeded:
			v.State, v.Message = Good, fmt.Sprintf("the drill of vm %s succeeded again", d.Spec.VM)
		case d.Status.Phase == api.TaskFailed, d.Status.Phase == api.TaskCancelled && d.Spec.TaskID == "":
			v.State, v.Message = Bad, fmt.Sprintf("the last drill of vm %s: %s", d.Spec.VM, d.Status.Message)
		}
		out = append(out, v)
	}
	return out
}

func metric(r *api.Rule, f Facts, firing isFiring) []Verdict {
	var out []Verdict
	th := r.Spec.Threshold
	slack := th * metricSlack
	if slack < 0 {
		slack = -slack
	}
	for _, n := range f.Nodes {
		for _, s := range f.Probes[n.ID].Samples {
			if s.Metric != r.Spec.Metric {
				continue
			}
			t := Target{api.KindNode, n.ID + "/" + s.Series, n.Name + " " + s.Series}
			v := Verdict{Target: t}
			if r.Spec.Below {
				v.State = above(-s.Value, -th, -(th + slack), firing(t))
				v.Message = fmt.Sprintf("%s on node %s is %.4g (threshold below %g)", s.Series, n.Name, s.Value, th)
			} else {
				v.State = above(s.Value, th, th-slack, firing(t))
				v.Message = fmt.Sprintf("%s on node %s is %.4g (threshold %g)", s.Series, n.Name, s.Value, th)
			}
			out = append(out, v)
		}
	}
	return out
}
