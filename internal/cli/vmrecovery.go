// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"github.com/spf13/pflag"

	"github.com/muster-vm/muster/api"
)

// recoveryFlags say how a VM is recovered when its node is lost.
type recoveryFlags struct{ priority string }

func (f *recoveryFlags) add(fs *pflag.FlagSet) {
	fs.StringVar(&f.priority, "ha-priority", "", "which VMs get a place first when their node is lost: highest, high, medium, low or lowest (default \"medium\")")
}

func (f *recoveryFlags) into(spec map[string]any) {
	if f.priority != "" {
		spec["recovery"] = map[string]any{"priority": f.priority}
	}
}

// haText is the policy, with the priority if it is not the usual one.
func haText(s *api.VMSpec) string {
	if p := s.RecoveryPriority(); s.HA == api.HARestart && p != api.PriorityMedium {
		return string(s.HA) + ", priority " + string(p)
	}
	return string(s.HA)
}
