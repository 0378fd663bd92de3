// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package memory

import (
	"math/big"
	"time"

	"github.com/muster-vm/muster/api"
)

// Limits of decisions.
const (
	// Step is the smallest change of a target: less is not worth the guest's
	// trouble, and would be a write to the database for nothing. A change that
	// reaches a bound, or that the node cannot do without, may be smaller.
	Step = 64 * api.MiB
	// stepFraction is the smallest change as a fraction of the VM's maximum.
	stepFraction = 20
	// Cooldown is how long after a squeeze a VM gets nothing back, so that one
	// that is squeezed and given back in turns does so slowly at worst.
	Cooldown = 30 * time.Second
	// StatsAge is how old the guest's word about itself may be; after that the
	// guest is taken to need what it has.
	StatsAge = 60 * time.Second
	// squeezeFraction bounds what one decision takes from a VM that it has
	// beyond its need: the guest must find it.
	squeezeFraction = 4
	// headroom is added to what a guest says it uses: an eighth, and
	// headroomLeast.
	headroomFraction = 8
	headroomLeast    = 64 * api.MiB
	// marginFraction of the node's memory, at least marginLeast, stays available
	// to the host at any time.
	marginFraction = 20
	marginLeast    = 256 * api.MiB
	// stallParts is what part of the margin one squeeze takes back because of stalls.
	stallParts = 2
	// grain is what targets are multiples of.
	grain = api.MiB
)

// VM is one elastic VM as the node knows it.
type VM struct {
	ID       string
	Min, Max api.Size
	// Target is what its balloon was told last, Actual what the balloon says it
	// leaves to the guest. Both are Max before the first decision.
	Target, Actual api.Size
	// Used is what the guest says it cannot do without, at StatsAt; 0 if it said
	// nothing, or nothing that can be true.
	Used    api.Size
	StatsAt time.Time
	// Fresh is whether its guest has just begun and does not use much yet, so that
	// it can have its share at once.
	Fresh bool
	// SqueezedAt and GrownAt are when its target was lowered and raised last.
	SqueezedAt, GrownAt time.Time
}

// Node is what the VMs share.
type Node struct {
	// Budget is what all elastic VMs may have together: the node's memory without
	// what is reserved, what fixed VMs and QEMU take, and what is to start.
	Budget api.Size
	// Total and Available memory of the host, as its kernel says.
	Total, Available api.Size
	// Stalled asks for a squeeze because processes of the host wait for memory, Rest
	// lets nothing grow; Floor is the available memory at which the host was short
	// lately, 0 if it was not. See [Pressure.Note].
	Stalled, Rest bool
	Floor         api.Size
}

// margin stays available to the host.
func (n Node) margin() api.Size { return max(n.Total/marginFraction, marginLeast) }

// Decision is a new target for one VM.
type Decision struct {
	ID       string
	From, To api.Size
	Why      string
}

// Decide returns the targets to change now, in the order of vms.
func Decide(n Node, vms []VM, now time.Time) []Decision {
	if len(vms) == 0 {
		return nil
	}
	budget, tight := n.budget(vms)
	why := n.shortage(vms)
	aims := Share(budget, vms, now)
	var out []Decision
	short := -budget // what the targets have beyond the budget
	for _, v := range vms {
		short += v.Target
	}
	free := budget // what nobody has, nor is about to give back
	for i := range vms {
		v := &vms[i]
		to, reason := v.squeeze(aims[i], short > 0, now)
		if reason == shortOfMemory {
			reason = why
		}
		if to != v.Target {
			out = append(out, Decision{ID: v.ID, From: v.Target, To: to, Why: reason})
		}
		free -= max(to, min(v.Actual, v.Max))
	}
	if tight || n.warned(vms, now) {
		return out
	}
	if n.Floor > 0 {
		free = min(free, n.margin()) // and then it is seen what that does
	}
	for i := range vms {
		v := &vms[i]
		grow := min(aims[i]-v.Target, free)
		if grow <= 0 || now.Sub(v.SqueezedAt) < Cooldown || grow < v.worth() && v.Target+grow < v.Max || v.Target < v.Min {
			continue
		}
		to := v.Target + grow
		if to < v.Max {
			to = to / grain * grain
		}
		if to > v.Target {
			free -= to - v.Target
			out = append(out, Decision{ID: v.ID, From: v.Target, To: to, Why: "the node has memory for it"})
		}
	}
	return out
}

// worth is the smallest change that is worth a decision.
func (v *VM) worth() api.Size { return max(Step, v.Max/stepFraction) }

// squeeze is the lower target that a VM gets now, or the one it has. Without a
// need of the node it is lowered only for the sake of another VM that needs the
// memory more, and not soon after it got some.
func (v *VM) squeeze(aim api.Size, short bool, now time.Time) (api.Size, string) {
	switch {
	case v.Target > v.Max || v.Target < v.Min:
		return min(max(v.Target, v.Min), v.Max), "its bounds were changed"
	case aim >= v.Target:
		return v.Target, ""
	case !short && (v.Target-aim < v.worth() || now.Sub(v.GrownAt) < Cooldown):
		return v.Target, ""
	}
	to := max(aim, v.Target-max((v.Target-v.Min)/squeezeFraction, v.worth()))
	if v.Fresh {
		to = aim
	}
	if short {
		return max(to/grain*grain, v.Min), shortOfMemory
	}
	return max(to/grain*grain, v.Min), "another vm needs the memory more"
}

// Reasons of squeezes for the node's sake.
const (
	shortOfMemory    = "the node is short of memory"
	waitingForMemory = "processes of the node wait for memory"
)

// shortage is why the node needs memory back.
func (n Node) shortage(vms []VM) string {
	var targets api.Size
	for _, v := range vms {
		targets += v.Target
	}
	if n.Stalled && targets <= n.Budget && n.Available >= n.margin() {
		return waitingForMemory
	}
	return shortOfMemory
}

// warned reports that a node that was short lately gives nothing back yet: it has
// not much more available than it had then, or has just given something back whose
// effect is not known.
func (n Node) warned(vms []VM, now time.Time) bool {
	if n.Floor == 0 {
		return false
	}
	for _, v := range vms {
		if now.Sub(v.GrownAt) < Cooldown {
			return true
		}
	}
	return n.Available < n.Floor+2*n.margin()
}

// budget is the static one, or less when the host is short of memory all the
// same; tight then forbids to give anything back.
func (n Node) budget(vms []VM) (budget api.Size, tight bool) {
	margin := n.margin()
	budget = n.Budget
	lack := api.Size(0) // that has to be given back now
	switch {
	case n.Total == 0:
		return budget, false
	case n.Available < margin:
		lack = margin - n.Available
	case n.Stalled:
		lack = margin / stallParts
	default: // below the upper line nothing moves
		return budget, n.Rest || n.Available < 2*margin
	}
	var now api.Size
	for _, v := range vms {
		now += min(v.Actual, v.Target)
	}
	return min(budget, now-lack), true
}

// need is what a VM should have at least if that is possible.
func (v *VM) need(now time.Time) api.Size {
	if v.Used <= 0 || now.Sub(v.StatsAt) > StatsAge {
		return min(max(v.Target, v.Min), v.Max)
	}
	return min(max(v.Used+max(v.Used/headroomFraction, headroomLeast), v.Min), v.Max)
}

// Share divides a budget. If it suffices, everybody has the maximum. Else
// everybody has what it needs, and the rest goes by what is missing to the
// maximum; if not even that suffices, what is above the minimums is cut in
// proportion. Nobody gets less than its minimum, even if the sum of those does
// not fit.
func Share(budget api.Size, vms []VM, now time.Time) []api.Size {
	var sumMin, sumNeed, sumMax api.Size
	needs := make([]api.Size, len(vms))
	for i := range vms {
		needs[i] = vms[i].need(now)
		sumMin, sumNeed, sumMax = sumMin+vms[i].Min, sumNeed+needs[i], sumMax+vms[i].Max
	}
	out := make([]api.Size, len(vms))
	for i, v := range vms {
		switch {
		case budget >= sumMax:
			out[i] = v.Max
		case budget >= sumNeed:
			out[i] = needs[i] + part(budget-sumNeed, v.Max-needs[i], sumMax-sumNeed)
		case budget > sumMin:
			out[i] = v.Min + part(budget-sumMin, needs[i]-v.Min, sumNeed-sumMin)
		default:
			out[i] = v.Min
		}
		if out[i] < v.Max {
			out[i] = max(out[i]/grain*grain, v.Min)
		}
	}
	return out
}

// part is whole × a / b, rounded down, without overflow.
func part(whole, a, b api.Size) api.Size {
	if b <= 0 {
		return 0
	}
	n := new(big.Int).Mul(big.NewInt(int64(whole)), big.NewInt(int64(a)))
	return api.Size(n.Div(n, big.NewInt(int64(b))).Int64())
}
