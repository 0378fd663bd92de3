// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"slices"

	"github.com/muster-vm/muster/api"
)

// addAddresses adds those under which a pool sees this node now, if that is known, to
// those of before: a process that began then has them still. What was before the host's
// boot is over: until the pool has told anew, the old ones are kept without a boot, so
// that they can be taken off its list, and are not relied on.
func addAddresses(st *api.PoolStateStatus, now []string, boot string) {
	if len(now) == 0 {
		if st.HostBoot != boot {
			st.HostBoot = ""
		}
		return
	}
	all := slices.Clone(now)
	if st.HostBoot == boot {
		all = append(all, st.Addresses...)
	}
	slices.Sort(all)
	st.Addresses, st.HostBoot = slices.Compact(all), boot
}
