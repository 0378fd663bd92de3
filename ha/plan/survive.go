// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package plan

import (
	"cmp"
	"slices"

	"github.com/muster-vm/muster/api"
)

// MaxSets is how many sets of nodes are assumed to die together in one look. If
// there are more, all sets of the nodes whose loss costs the most are taken, of
// as many nodes as give no more sets than this.
const MaxSets = 256

// Survival is whether the cluster survives the loss of some nodes together.
type Survival struct {
	Failures int
	// Quorum after the loss of as many voters.
	Quorum api.HAQuorum
	// Worst is the plan with the most VMs that do not restart, nil if there is no
	// set of nodes. It takes the majority for granted.
	Worst *Plan
	// Sets were looked at, OfAll are there.
	Sets, OfAll int
}

// Refused is how many VMs do not restart in the worst case.
func (s *Survival) Refused() int {
	if s.Worst == nil {
		return 0
	}
	return s.Worst.Refused()
}

// Kept reports whether every protected VM restarts.
func (s *Survival) Kept() bool { return s.Quorum.Kept && s.Refused() == 0 }

// Survive makes the plans for the loss of so many nodes together. The fleet is
// of the same view and stays as it is. At most so many sets are looked at. known
// are plans for single nodes, by ID, that need not be made again.
func Survive(s *State, fleet Fleet, voters []string, failures, sets int, known map[string]*Plan) *Survival {
	out := &Survival{Failures: failures, Quorum: s.quorumAfter(voters, failures)}
	nodes := s.candidates()
	n := len(nodes)
	if n == 0 {
		return out
	}
	k := min(failures, n)
	out.OfAll = choose(n, k)
	for choose(n, k) > sets && n > k {
		n--
	}
	combinations(n, k, func(at []int) {
		kill := make([]string, k)
		for i, j := range at {
			kill[i] = nodes[j].Meta.ID
		}
		var p *Plan
		if k == 1 {
			p = known[kill[0]]
		}
		if p == nil {
			p = Make(s, fleet.Fork(), Options{Kill: kill})
		}
		out.Sets++
		if out.Worst == nil || p.Refused() > out.Worst.Refused() {
			out.Worst = p
		}
	})
	return out
}

// quorumAfter is the quorum if so many of the voters are lost together.
func (s *State) quorumAfter(voters []string, failures int) api.HAQuorum {
	gone := map[string]bool{}
	for _, id := range voters {
		if len(gone) < failures && !s.lost(id) {
			gone[id] = true
		}
	}
	return s.quorum(voters, gone)
}

// Alive are the nodes that may be assumed to die, in order of name.
func (s *State) Alive() []*api.Node {
	var out []*api.Node
	for _, n := range s.Nodes {
		if n.Status.Phase == api.NodeReady {
			out = append(out, n)
		}
	}
	slices.SortFunc(out, func(a, b *api.Node) int { return cmp.Compare(a.Meta.Name, b.Meta.Name) })
	return out
}

// candidates are the nodes that run VMs, those first whose loss costs the most.
// The loss of a set costs the memory of its protected VMs, which needs a place,
// and its free memory, which is none any more: for each node what it has for VMs
// but for what unprotected ones take. So the costs of nodes add up, and the first
// ones are the worst set as far as the sum of memory goes.
func (s *State) candidates() []*api.Node {
	var out []*api.Node
	cost := map[string]api.Size{}
	for _, n := range s.Alive() {
		if n.Spec.Role != api.RoleWitness {
			out = append(out, n)
			cost[n.Meta.ID] = n.Status.Memory - n.Spec.ReservedMemory
		}
	}
	for i := range s.Bindings {
		b := &s.Bindings[i]
		if vm := s.VMs[b.Meta.ID]; !b.Spec.Protected && WantsRun(vm) {
			cost[b.Spec.NodeID] -= vm.Status.HeldMemory(&vm.Spec) + api.OverheadPerVM
		}
	}
	slices.SortStableFunc(out, func(a, b *api.Node) int { return cmp.Compare(cost[b.Meta.ID], cost[a.Meta.ID]) })
	return out
}

// choose is the binomial coefficient, or more than MaxSets if it is large.
func choose(n, k int) int {
	const most = 1 << 30
	c := 1
	for i := 1; i <= k; i++ {
		c = c * (n - k + i) / i
		if c > most {
			return most
		}
	}
	return c
}

// combinations calls f with every choice of k of the first n numbers. f must not
// keep what it gets.
func combinations(n, k int, f func([]int)) {
	at := make([]int, k)
	for i := range at {
		at[i] = i
	}
	for {
		f(at)
		i := k - 1
		for i >= 0 && at[i] == n-k+i {
			i--
		}
		if i < 0 {
			return
		}
		at[i]++
		for j := i + 1; j < k; j++ {
			at[j] = at[j-1] + 1
		}
	}
}
