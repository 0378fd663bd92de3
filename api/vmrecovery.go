// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"slices"
	"time"
)

// VMRecovery says how a VM is recovered when its node is lost, for which it must be
// protected, and when it ends by itself.
type VMRecovery struct {
	// Priority: VMs of a higher one get their places first, and keep them if not
	// all find one. Medium when left out.
	Priority RecoveryPriority `json:"priority,omitempty" enum:"highest,high,medium,low,lowest"`
	// StartAttempts is how often a node tries to start the VM before another node
	// does: 1 to 20, 3 when left out.
	StartAttempts int `json:"startAttempts,omitempty" minimum:"1" maximum:"20"`
	// Drill makes it a canary: it may be failed over on purpose, as by a power cut of
	// its node. "manual", or a time in UTC: "daily 03:00", "weekly sun 03:00".
	Drill string `json:"drill,omitempty" doc:"it may be failed over on purpose: manual (when asked for), daily HH:MM or weekly mon|tue|wed|thu|fri|sat|sun HH:MM, in UTC"`
	EndPolicy
	StartAfter
	Failback
}

// Limits of spec.recovery.startAttempts.
const (
	DefaultStartAttempts = 3
	MaxStartAttempts     = 20
)

// StartAttempts is the number in force.
func (s *VMSpec) StartAttempts() int {
	if s.Recovery == nil || s.Recovery.StartAttempts == 0 {
		return DefaultStartAttempts
	}
	return s.Recovery.StartAttempts
}

// VMTries are the starts of a VM with ha: restart that have not led to a VM that
// runs; see ha/DESIGN.md.
type VMTries struct {
	// Epoch of the binding and Generation of the VM that these are of.
	Epoch      uint64 `json:"epoch"`
	Generation uint64 `json:"generation"`
	// Begun counts the starts that the owner began; each is committed before.
	Begun int `json:"begun,omitempty"`
	// Failed counts those that failed.
	Failed int `json:"failed,omitempty"`
	// GivenUp is the owner's word that no process of the VM is there and that it
	// begins none under this epoch and generation, unless it takes that back.
	GivenUp bool       `json:"givenUp,omitempty"`
	At      *time.Time `json:"at,omitempty"`
	// Drill: it was given up on purpose, see Drill.
	Drill bool `json:"drill,omitempty"`
	// Nodes that gave the VM up, by ID, and Rounds in which all of them did.
	Nodes  []string `json:"nodes,omitempty"`
	Rounds int      `json:"rounds,omitempty"`
}

// TriesOf returns the tries that count for a binding, perhaps none yet.
func TriesOf(vm *VM, epoch uint64) VMTries {
	t := vm.Status.Tries
	if t == nil || t.Epoch != epoch || t.Generation != vm.Meta.Generation {
		return VMTries{Epoch: epoch, Generation: vm.Meta.Generation}
	}
	out := *t
	out.Nodes = slices.Clone(t.Nodes)
	return out
}

// GivenUp reports whether the owner under an epoch gave the VM up.
func GivenUp(vm *VM, epoch uint64) bool {
	return vm.Spec.HA == HARestart && TriesOf(vm, epoch).GivenUp
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
	if r == nil {
		return nil
	}
	if r.StartAttempts < 0 || r.StartAttempts > MaxStartAttempts {
		return Invalid("spec.recovery.startAttempts", "is %d; give 1 to %d, or leave it out for %d", r.StartAttempts, MaxStartAttempts, DefaultStartAttempts)
	}
	if _, _, err := ParseDrill(r.Drill); err != nil {
		return err
	}
	if err := r.EndPolicy.validate(); err != nil {
		return err
	}
	if err := r.StartAfter.validate(); err != nil {
		return err
	}
	if err := r.Failback.validate(); err != nil {
		return err
	}
	if r.Priority == "" {
		return nil
	}
	for _, known := range RecoveryPriorities() {
		if r.Priority == known {
			return nil
		}
	}
	return Invalid("spec.recovery.priority", "is %q; give highest, high, medium, low or lowest", clip(string(r.Priority)))
}
