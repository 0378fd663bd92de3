// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"fmt"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/limit"
)

// ConditionLimits is there while a limit of the VM is not in force.
const ConditionLimits = "Limits"

// Limits puts the limits of VMs into force; see package limit.
type Limits interface {
	// Apply sets all limits of a VM for its process and returns what is not in
	// force.
	Apply(vm string, pid int, l api.VMLimits) ([]limit.Missing, error)
	// Release forgets a VM that has no process.
	Release(vm string) error
}

// limited is what was applied to a process.
type limited struct {
	pid     int
	limits  api.VMLimits
	missing []limit.Missing
	err     error
}

// limit puts the VM's limits into force, if that has not been done for this
// process, and says what is not.
func (s *step) limit() {
	what := append(s.limitProcess(), s.limitCards()...)
	if len(what) > 0 {
		s.problem(ConditionLimits, fmt.Sprintf("not in force on this node: %s", strings.Join(what, "; ")))
	}
}

// limitCards says why limits of network cards, which the virtual switch puts into
// force, are not.
func (s *step) limitCards() []string {
	limited := func(n api.VMNIC) bool { return n.Limit != (api.NICLimit{}) }
	if !slices.ContainsFunc(s.vm.Spec.NICs, limited) {
		return nil
	}
	st, err := configdb.SwitchStates.Get(s.v, s.h.cfg.NodeID)
	if err != nil || st.Status.LimitsProblem == "" {
		return nil // one that does not work has conditions of its own
	}
	return []string{"nics[].limit (" + st.Status.LimitsProblem + ")"}
}

func (s *step) limitProcess() (what []string) {
	if s.h.cfg.Limits == nil {
		return nil
	}
	var want api.VMLimits
	if s.vm.Spec.Limits != nil {
		want = *s.vm.Spec.Limits
	}
	have := &s.in.limited
	if have.pid != s.proc.PID || have.limits != want || have.err != nil {
		*have = limited{pid: s.proc.PID, limits: want}
		have.missing, have.err = s.h.cfg.Limits.Apply(s.vm.Meta.ID, s.proc.PID, want)
	}
	for _, m := range have.missing {
		what = append(what, m.Limit+" ("+m.Reason+")")
	}
	if have.err != nil && want != (api.VMLimits{}) {
		what = append(what, have.err.Error())
	}
	return what
}

// unlimit forgets the limits of a VM whose process has ended.
func (s *step) unlimit() {
	s.in.limited = limited{}
	if s.h.cfg.Limits == nil {
		return
	}
	if err := s.h.cfg.Limits.Release(s.vm.Meta.ID); err != nil {
		s.h.log.Warn("control groups of a VM are left for now", "vm", s.vm.Meta.ID, "err", err)
	}
}
