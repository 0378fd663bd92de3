// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package plan

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// Fleet places VMs one after the other; placement has it.
type Fleet interface {
	// Fork returns a copy on which other VMs can be placed.
	Fork() Fleet
	// Avoid lets a node take nothing, for a reason.
	Avoid(nodeID, reason string)
	// Choose returns a node for a VM whose own node is gone, or an error with the
	// reasons. exclude are more nodes to avoid, by ID with the reason; idle says
	// that the VM will not run, so that it takes no memory.
	Choose(vm *api.VM, exclude map[string]string, idle bool) (nodeID, node string, err error)
	// Put counts the VM at the node from now on.
	Put(vm *api.VM, nodeID string)
	// Reserve lets a transaction land only if nobody else was placed on the node
	// since the view of the fleet.
	Reserve(tx *configdb.Txn, nodeID string) error
}

// ErrNotLockedOut is why a guarded VM of a lost node waits.
var ErrNotLockedOut = errors.New("the lost node is not locked out of the VM's pools yet")

// Options say what is assumed besides the state.
type Options struct {
	// Kill are IDs of nodes that are assumed to be lost.
	Kill []string
	// Avoid are nodes that must not be chosen, by ID with the reason.
	Avoid map[string]string
	// Voters are the IDs of the nodes that vote; none: not known, and there is a
	// majority.
	Voters []string
}

// Plan is what becomes of the VMs.
type Plan struct {
	// Killed are the IDs of the nodes that were assumed to be lost.
	Killed []string
	Quorum api.HAQuorum
	// Steps in the order in which they are taken.
	Steps []Step
}

// Step is what becomes of one VM.
type Step struct {
	VM      *api.VM
	Binding *api.Binding
	From    *api.Node
	Outcome api.HAOutcome
	// NodeID and Node are the new ones, if it gets one.
	NodeID, Node string
	// Err says why it has none.
	Err error
	// After are the VMs that its start waits for, and Wave is 1 for one that waits
	// for none that restarts with it, and one more than theirs else.
	After []string
	Wave  int
}

// Refused counts the VMs that ought to restart and do not.
func (p *Plan) Refused() (n int) {
	for i := range p.Steps {
		if p.Steps[i].Outcome == api.HARefused {
			n++
		}
	}
	return n
}

// Make says what becomes of every VM whose node is lost or assumed to be. The
// fleet is of the same view as the state; it is used up.
func Make(s *State, fleet Fleet, o Options) *Plan {
	gone := map[string]bool{}
	p := &Plan{Killed: o.Kill}
	for _, id := range o.Kill {
		gone[id] = true
		fleet.Avoid(id, "is lost")
	}
	for id, why := range o.Avoid {
		if !gone[id] {
			fleet.Avoid(id, why)
		}
	}
	p.Quorum = s.quorum(o.Voters, gone)
	var steps []Step
	for i := range s.Bindings {
		b := &s.Bindings[i]
		if !gone[b.Spec.NodeID] && !s.gone(b) {
			continue
		}
		st := Step{VM: s.VMs[b.Meta.ID], Binding: b, From: s.Nodes[b.Spec.NodeID]}
		if len(b.Spec.Guarding()) > 0 && !gone[b.Spec.NodeID] && !s.lockedOut(b) {
			st.Err = ErrNotLockedOut
		}
		steps = append(steps, st)
	}
	p.Steps = inOrder(steps)
	for i := range p.Steps {
		p.Steps[i].decide(fleet, &p.Quorum)
	}
	s.starts(p.Steps)
	if !p.Quorum.Kept {
		p.Steps = append(p.Steps, s.ending(gone)...)
	}
	return p
}

// WantsRun reports whether the VM is meant to run. A suspended one is not: its
// memory is on disk.
func WantsRun(vm *api.VM) bool {
	return vm.Spec.Power != api.PowerStopped && vm.Spec.Power != api.PowerSuspended && !vm.Meta.Deleting()
}

// Cold is a VM that begins anew on another node: what its QEMU had counts no more.
func Cold(vm *api.VM) api.VM {
	cold := *vm
	cold.Status = api.VMStatus{}
	return cold
}

// decide finds out what becomes of one VM, and counts it where it goes.
func (st *Step) decide(fleet Fleet, quorum *api.HAQuorum) {
	runs := WantsRun(st.VM)
	switch {
	case !st.Binding.Spec.Protected:
		st.Outcome = api.HAWaits
		if !runs {
			st.Outcome = api.HAStays
		}
		return
	case !quorum.Kept && runs:
		st.Outcome, st.Err = api.HARefused, api.Errorf(api.CodeNoQuorum, "%s", quorum.Message)
		return
	case !quorum.Kept:
		st.Outcome = api.HAStays
		return
	case st.Err != nil:
		st.Outcome = api.HAWaits
		return
	}
	cold := Cold(st.VM)
	st.NodeID, st.Node, st.Err = fleet.Choose(&cold, nil, !runs)
	switch {
	case st.Err == nil && st.NodeID == st.From.Meta.ID:
		st.NodeID, st.Node = "", ""
		st.Err = fmt.Errorf("placement chose the lost node %s", st.From.Meta.Name)
		st.Outcome = api.HARefused
	case st.Err == nil && runs:
		st.Outcome = api.HARestarts
		fleet.Put(&cold, st.NodeID)
	case st.Err == nil:
		st.Outcome = api.HAMoves
		fleet.Put(&cold, st.NodeID)
	case runs:
		st.Outcome = api.HARefused
	default:
		st.Outcome = api.HAStays
	}
}

// ending are the protected VMs on the nodes that are left: without a majority
// no lease is renewed, and their guards end them. Those with a storage guard run on.
func (s *State) ending(gone map[string]bool) (out []Step) {
	for i := range s.Bindings {
		b := &s.Bindings[i]
		vm := s.VMs[b.Meta.ID]
		if gone[b.Spec.NodeID] || s.lost(b.Spec.NodeID) || !b.Spec.Protected || len(b.Spec.Guarding()) > 0 || !WantsRun(vm) {
			continue
		}
		out = append(out, Step{VM: vm, Binding: b, From: s.Nodes[b.Spec.NodeID], Outcome: api.HAEnds})
	}
	return out
}

// inOrder is the order in which VMs get their places: protected ones that are
// meant to run first, by priority, and of one priority large ones before small
// ones, so that more of them fit.
func inOrder(steps []Step) []Step {
	rank := func(s *Step) int {
		switch {
		case !s.Binding.Spec.Protected:
			return 2
		case !WantsRun(s.VM):
			return 1
		}
		return 0
	}
	slices.SortStableFunc(steps, func(a, b Step) int {
		return cmp.Or(cmp.Compare(rank(&a), rank(&b)), cmp.Compare(a.VM.Spec.RecoveryPriority().Rank(), b.VM.Spec.RecoveryPriority().Rank()),
			cmp.Compare(b.VM.Spec.Memory, a.VM.Spec.Memory), cmp.Compare(a.VM.Meta.ID, b.VM.Meta.ID))
	})
	return steps
}

// Quorum says whether the voters that are not lost are a majority.
func Quorum(s *State, voters []string) api.HAQuorum { return s.quorum(voters, nil) }

// quorum says whether the voters that are left are a majority.
func (s *State) quorum(voters []string, gone map[string]bool) api.HAQuorum {
	q := api.HAQuorum{Voters: len(voters), Needed: len(voters)/2 + 1}
	for _, id := range voters {
		if !gone[id] && !s.lost(id) && s.Nodes[id] != nil {
			q.Left++
		}
	}
	if len(voters) == 0 {
		q.Needed = 0
	}
	q.Kept = q.Left >= q.Needed
	q.Spare = max(q.Left-q.Needed, 0)
	if !q.Kept {
		q.Message = fmt.Sprintf("no quorum: %d of %d voters are left and %d are needed, so nothing restarts", q.Left, q.Voters, q.Needed)
	}
	return q
}
