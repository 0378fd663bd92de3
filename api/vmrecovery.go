// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

// VMRecovery says how a protected VM is recovered when its node is lost.
type VMRecovery struct {
	// Priority: VMs of a higher one get their places first, and keep them if not
	// all find one. Medium when left out.
	Priority RecoveryPriority `json:"priority,omitempty" enum:"highest,high,medium,low,lowest"`
}

// RecoveryPriority is the class in which a VM gets its place.
type RecoveryPriority string

// The priorities.
const (
	PriorityHighest RecoveryPriority = "highest"
	PriorityHigh    RecoveryPriority = "high"
	PriorityMedium  RecoveryPriority = "medium"
	PriorityLow     RecoveryPriority = "low"
	PriorityLowest  RecoveryPriority = "lowest"
)

// RecoveryPriorities are all of them, the highest first.
func RecoveryPriorities() []RecoveryPriority {
	return []RecoveryPriority{PriorityHighest, PriorityHigh, PriorityMedium, PriorityLow, PriorityLowest}
}

// RecoveryPriority is the one in force.
func (s *VMSpec) RecoveryPriority() RecoveryPriority {
	if s.Recovery == nil || s.Recovery.Priority == "" {
		return PriorityMedium
	}
	return s.Recovery.Priority
}

// Rank orders priorities: 0 comes first. One that is not known, of a later
// version, is as medium.
func (p RecoveryPriority) Rank() int {
	medium := 0
	for i, known := range RecoveryPriorities() {
		switch known {
		case p:
			return i
		case PriorityMedium:
			medium = i
		}
	}
	return medium
}

func (r *VMRecovery) validate() error {
	if r == nil || r.Priority == "" {
		return nil
	}
	for _, known := range RecoveryPriorities() {
		if r.Priority == known {
			return nil
		}
	}
	return Invalid("spec.recovery.priority", "is %q; give highest, high, medium, low or lowest", clip(string(r.Priority)))
}
