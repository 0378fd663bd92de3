// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"slices"
	"testing"

	"github.com/muster-vm/muster/api"
)

func TestStepsShowTheOrderOfStartsIfThereIsOne(t *testing.T) {
	steps := []api.HAStep{{Order: 1, VM: "app1", Outcome: api.HARestarts, Wave: 2, StartsAfter: "db1, at most 2m0s"}, {Order: 2, VM: "db1", Outcome: api.HARestarts, Wave: 1}, {Order: 3, VM: "x"}}
	if head := stepTable(steps[1:], 0).head; slices.Contains(head, "AFTER") {
		t.Error(head)
	}
	tab := stepTable(steps, 2)
	if !slices.Contains(tab.head, "AFTER") || len(tab.rows) != 3 || !slices.Contains(tab.rows[0], "db1, at most 2m0s") || !slices.Contains(tab.rows[2], "and 1 more") {
		t.Errorf("%v %v", tab.head, tab.rows)
	}
}
