// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package plan

import "github.com/muster-vm/muster/api"

// name is how VMs name each other.
type name struct{ project, vm string }

// starts says in which order VMs that get places start: the place of each is held
// from the beginning, and its new owner holds its start back. A VM that is gone or
// not meant to run is not waited for.
func (s *State) starts(steps []Step) {
	waits := false
	for i := range steps {
		waits = waits || steps[i].Outcome == api.HARestarts && len(steps[i].VM.Spec.StartAfter().After) > 0
	}
	if !waits {
		for i := range steps {
			if steps[i].Outcome == api.HARestarts {
				steps[i].Wave = 1
			}
		}
		return
	}
	known, at := make(map[name]*api.VM, len(s.VMs)), map[name]*Step{}
	for _, vm := range s.VMs {
		known[name{vm.Meta.Project, vm.Meta.Name}] = vm
	}
	for i := range steps {
		if st := &steps[i]; st.Outcome == api.HARestarts {
			at[name{st.VM.Meta.Project, st.VM.Meta.Name}] = st
		}
	}
	for _, st := range at {
		for _, other := range st.VM.Spec.StartAfter().After {
			if vm := known[name{st.VM.Meta.Project, other}]; vm != nil && vm.Spec.Power == api.PowerRunning && !vm.Meta.Deleting() {
				st.After = append(st.After, other)
			}
		}
	}
	for i := range steps {
		if steps[i].Outcome == api.HARestarts {
			steps[i].wave(at)
		}
	}
}

// wave finds the wave of a step by those that it waits for. In a circle, which two
// requests at once can make, whoever is asked a second time counts as the first.
func (st *Step) wave(at map[name]*Step) int {
	if st.Wave > 0 {
		return st.Wave
	}
	st.Wave = 1
	most := 0
	for _, other := range st.After {
		if of := at[name{st.VM.Meta.Project, other}]; of != nil && of != st {
			most = max(most, of.wave(at))
		}
	}
	st.Wave = most + 1
	return st.Wave
}
