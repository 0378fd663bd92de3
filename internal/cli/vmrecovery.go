// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"fmt"

	"github.com/spf13/pflag"

	"github.com/muster-vm/muster/api"
)

// recoveryFlags say how a VM is recovered when its node is lost.
type recoveryFlags struct {
	priority string
	attempts int
}

func (f *recoveryFlags) add(fs *pflag.FlagSet) {
	fs.StringVar(&f.priority, "ha-priority", "", "which VMs get a place first when their node is lost: highest, high, medium, low or lowest (default \"medium\")")
	fs.IntVar(&f.attempts, "ha-start-attempts", 0, fmt.Sprintf("how often a node tries to start a VM with --ha restart before another does, 1 to %d (default %d)", api.MaxStartAttempts, api.DefaultStartAttempts))
}

func (f *recoveryFlags) into(spec map[string]any) {
	r := map[string]any{}
	set(r, "priority", f.priority)
	if f.attempts != 0 {
		r["startAttempts"] = f.attempts
	}
	if len(r) > 0 {
		spec["recovery"] = r
	}
}

// haText is the policy, with the priority if it is not the usual one.
func haText(s *api.VMSpec) string {
	if p := s.RecoveryPriority(); s.HA == api.HARestart && p != api.PriorityMedium {
		return string(s.HA) + ", priority " + string(p)
	}
	return string(s.HA)
}
