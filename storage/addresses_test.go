// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"slices"
	"testing"

	"github.com/muster-vm/muster/api"
)

func TestAddressesBelongToABootOfTheHost(t *testing.T) {
	st := api.PoolStateStatus{}
	for _, step := range []struct {
		now   []string
		boot  string
		want  []string
		known bool // of this boot
	}{
		{nil, "a", nil, false},
		{[]string{"10.0.0.1"}, "a", []string{"10.0.0.1"}, true},
		{nil, "a", []string{"10.0.0.1"}, true}, // not asked for, or no answer
		{[]string{"10.0.0.2"}, "a", []string{"10.0.0.1", "10.0.0.2"}, true},
		{nil, "b", []string{"10.0.0.1", "10.0.0.2"}, false}, // booted, and the pool has not told
		{nil, "b", []string{"10.0.0.1", "10.0.0.2"}, false},
		{[]string{"10.0.0.3"}, "b", []string{"10.0.0.3"}, true},
	} {
		addAddresses(&st, step.now, step.boot)
		if !slices.Equal(st.Addresses, step.want) || (st.HostBoot == step.boot) != step.known {
			t.Fatalf("%+v: %v of boot %q", step, st.Addresses, st.HostBoot)
		}
	}
}
