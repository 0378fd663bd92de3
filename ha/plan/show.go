// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package plan

import "github.com/muster-vm/muster/api"

// Loss is the plan as people see it.
func (p *Plan) Loss(s *State) *api.HALoss {
	out := &api.HALoss{Killed: s.Names(p.Killed), Revision: s.View.Revision(), Quorum: p.Quorum, Counts: map[string]int{}, Steps: make([]api.HAStep, 0, len(p.Steps))}
	for i := range p.Steps {
		out.Counts[string(p.Steps[i].Outcome)]++
		out.Steps = append(out.Steps, p.Steps[i].show(i+1))
	}
	return out
}

func (st *Step) show(order int) api.HAStep {
	out := api.HAStep{
		Order: order, VM: st.VM.Meta.Name, VMID: st.VM.Meta.ID, Project: st.VM.Meta.Project, From: st.From.Meta.Name,
		Priority: st.VM.Spec.RecoveryPriority(),
		Outcome:  st.Outcome, Node: st.Node,
	}
	if len(st.After) > 0 {
		a := st.VM.Spec.StartAfter()
		a.After = st.After
		out.After, out.StartsAfter = st.After, a.String()
	}
	out.Wave = st.Wave
	switch {
	case st.Err != nil:
		out.Reason = st.Err.Error()
	case st.Outcome == api.HAWaits:
		out.Reason = "it is not protected (--ha restart), so nobody knows whether it runs until its node is back"
	case st.Outcome == api.HAEnds:
		out.Reason = "without a quorum its node gets no lease, and the guard there ends it"
	}
	return out
}

// IfQuorumLost counts the VMs that are meant to run by what becomes of them when no
// majority of the voters is left.
func (s *State) IfQuorumLost() (out api.HAQuorumLost) {
	protected, unprotected := s.Running()
	for id := range s.Nodes {
		if !s.lost(id) {
			out.RunsOn += protected[id] + unprotected[id]
		}
	}
	out.Ends = len(s.ending(nil))
	out.RunsOn -= out.Ends
	return out
}

// RefusedSteps are the VMs that ought to restart and do not, at most so many.
func (p *Plan) RefusedSteps(most int) (out []api.HAStep) {
	for i := range p.Steps {
		if p.Steps[i].Outcome == api.HARefused && len(out) < most {
			out = append(out, p.Steps[i].show(i+1))
		}
	}
	return out
}
