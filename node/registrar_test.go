// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/hypervisor"
)

func TestFactsOfAnEarlierDaemonStandUntilThereAreNewOnes(t *testing.T) {
	detecting := api.Condition{Type: hypervisor.ConditionHypervisor, Reason: "Detecting", Message: "being found out"}
	usable := api.Condition{Type: hypervisor.ConditionHypervisor, OK: true, Reason: "Usable"}
	var s api.NodeStatus
	look := func(what, version string, ok bool, facts hypervisor.Facts) {
		t.Helper()
		facts.CPUs = 2
		setFacts(&s, facts)
		c, found := api.FindCondition(s.Conditions, hypervisor.ConditionHypervisor)
		if s.QEMUVersion != version || !found || c.OK != ok || s.CPUs != 2 {
			t.Fatalf("%s: QEMU %q, condition %+v", what, s.QEMUVersion, c)
		}
	}
	look("the first daemon", "", false, hypervisor.Facts{Conditions: []api.Condition{detecting}})
	look("it found QEMU", "7.2.22", true, hypervisor.Facts{Known: true, QEMUVersion: "7.2.22", Conditions: []api.Condition{usable}})
	look("the next daemon", "7.2.22", true, hypervisor.Facts{Conditions: []api.Condition{detecting}})
	look("it found none", "", false, hypervisor.Facts{Known: true, Conditions: []api.Condition{{Type: hypervisor.ConditionHypervisor, Reason: "NoQEMU"}}})
}
