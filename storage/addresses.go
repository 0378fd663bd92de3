// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"os"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
)

const bootIDPath = "/proc/sys/kernel/random/boot_id"

// boot is that of this host; empty if nobody knows.
func (s *Service) boot() string {
	b, _ := os.ReadFile(bootIDPath)
	return strings.TrimSpace(string(b))
}

// addAddresses adds those under which a pool sees this node now to those of before: a
// process that began then has them still. What was before the host's boot is over.
func addAddresses(st *api.PoolStateStatus, now []string, boot string) {
	all := slices.Clone(now)
	if st.HostBoot == boot {
		all = append(all, st.Addresses...)
	}
	slices.Sort(all)
	st.Addresses, st.HostBoot = slices.Compact(all), boot
}
