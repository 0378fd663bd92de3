// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import "time"

// FailbackMode is whether a VM goes back to the node that it was recovered from.
type FailbackMode string

// The modes.
const (
	FailbackNone FailbackMode = "none"
	// FailbackReturn moves it back while it runs.
	FailbackReturn FailbackMode = "return"
)

// Failback is what becomes of a recovered VM when its node is back.
type Failback struct {
	// Failback is none (default) or return.
	Failback FailbackMode `json:"failback,omitempty" enum:"none,return" doc:"whether it is migrated back to the node that it was recovered from"`
	// FailbackAfterMinutes is how long that node must have been back, with the whole
	// cluster well: 1 to 10080, 10 when left out.
	FailbackAfterMinutes int `json:"failbackAfterMinutes,omitempty" minimum:"0" maximum:"10080"`
}

// Limits of a Failback.
const (
	DefaultFailbackAfter = 10    // minutes
	MaxFailbackAfter     = 10080 // minutes
)

// FailsBackAfter is how long the node must have been back; 0: it does not.
func (s *VMSpec) FailsBackAfter() time.Duration {
	if s.Recovery == nil || s.Recovery.Failback.Failback != FailbackReturn {
		return 0
	}
	if m := s.Recovery.FailbackAfterMinutes; m > 0 {
		return time.Duration(m) * time.Minute
	}
	return DefaultFailbackAfter * time.Minute
}

func (f *Failback) validate() error {
	switch f.Failback {
	case "", FailbackNone, FailbackReturn:
	default:
		return Invalid("spec.recovery.failback", "is %q; give none or return", clip(string(f.Failback)))
	}
	if f.FailbackAfterMinutes < 0 || f.FailbackAfterMinutes > MaxFailbackAfter {
		return Invalid("spec.recovery.failbackAfterMinutes", "is %d; give 1 to %d minutes, or 0 for %d", f.FailbackAfterMinutes, MaxFailbackAfter, DefaultFailbackAfter)
	}
	return nil
}

// RecoveredFrom is the node that ha took a VM from.
type RecoveredFrom struct {
	NodeID string `json:"nodeID"`
	Node   string `json:"node"`
	// Epoch of the binding that it counts for: whoever moves the VM otherwise has
	// decided anew where it is.
	Epoch uint64 `json:"epoch"`
}

// Origin is the node that the VM was recovered from and has not been moved by
// anybody since, nil if there is none.
func (b *BindingSpec) Origin() *RecoveredFrom {
	if r := b.RecoveredFrom; r != nil && r.Epoch == b.Epoch && r.NodeID != b.NodeID {
		return r
	}
	return nil
}

// Recovered is what RecoveredFrom is after ha has moved the VM to another node
// under the next epoch: the first node that it was taken from stays. lost is the
// node that it is taken from now, nil if that lives.
func (b *BindingSpec) Recovered(lost *Node, nodeID string) *RecoveredFrom {
	var next RecoveredFrom
	switch o := b.Origin(); {
	case o != nil:
		next = *o
	case lost != nil:
		next.NodeID, next.Node = lost.Meta.ID, lost.Meta.Name
	}
	if next.NodeID == "" || next.NodeID == nodeID {
		return nil
	}
	next.Epoch = b.Epoch + 1
	return &next
}
