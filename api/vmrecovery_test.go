// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import "testing"

func TestRecoveryPriorities(t *testing.T) {
	last := -1
	for _, p := range RecoveryPriorities() {
		s := VMSpec{Recovery: &VMRecovery{Priority: p}}
		if err := s.Recovery.validate(); err != nil || p.Rank() != last+1 || s.RecoveryPriority() != p {
			t.Errorf("%s: rank %d after %d, %v", p, p.Rank(), last, err)
		}
		last = p.Rank()
	}
	for _, s := range []VMSpec{{}, {Recovery: &VMRecovery{}}} {
		if s.RecoveryPriority() != PriorityMedium || s.Recovery.validate() != nil {
			t.Errorf("%+v is not medium", s)
		}
	}
	if err := (&VMRecovery{Priority: "urgent"}).validate(); CodeOf(err) != CodeInvalid {
		t.Errorf("urgent: %v", err)
	}
	if RecoveryPriority("of a later version").Rank() != PriorityMedium.Rank() {
		t.Error("an unknown priority is not as medium")
	}
}
