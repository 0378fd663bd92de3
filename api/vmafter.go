// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"fmt"
	"strings"
	"time"
)

// AfterCondition is when a VM that others wait for counts as up.
type AfterCondition string

// The conditions.
const (
	AfterStarted AfterCondition = "started" // QEMU runs its guest
	AfterHealthy AfterCondition = "healthy" // and its guest agent has answered
)

// StartAfter says for which other VMs an automatic start waits: a recovery after
// the loss of a node, and the starts when hosts, or the cluster, power up. A start
// that somebody asks for does not wait.
type StartAfter struct {
	// After are the names of the VMs, of the same project, at most 16. One that does
	// not exist, or is not meant to run, is not waited for.
	After []string `json:"after,omitempty" maxItems:"16"`
	// AfterCondition is started (default) or healthy.
	AfterCondition AfterCondition `json:"afterCondition,omitempty" enum:"started,healthy"`
	// AfterDelaySeconds is how much later it starts: 0 to 3600.
	AfterDelaySeconds int `json:"afterDelaySeconds,omitempty" minimum:"0" maximum:"3600"`
	// AfterWaitSeconds is after which time it starts anyway: 1 to 86400, 120 when
	// left out.
	AfterWaitSeconds int `json:"afterWaitSeconds,omitempty" minimum:"0" maximum:"86400"`
}

// Limits of a StartAfter.
const (
	MaxAfter         = 16
	MaxAfterDelay    = 3600  // seconds
	MaxAfterWait     = 86400 // seconds
	DefaultAfterWait = 120   // seconds
)

// StartAfter is the one in force.
func (s *VMSpec) StartAfter() StartAfter {
	if s.Recovery == nil {
		return StartAfter{}
	}
	return s.Recovery.StartAfter
}

// Wait is how long a start waits at most.
func (a *StartAfter) Wait() time.Duration {
	if a.AfterWaitSeconds > 0 {
		return time.Duration(a.AfterWaitSeconds) * time.Second
	}
	return DefaultAfterWait * time.Second
}

// Delay is how much later the VM starts.
func (a *StartAfter) Delay() time.Duration { return time.Duration(a.AfterDelaySeconds) * time.Second }

// Most is how long a start can be held back.
func (a *StartAfter) Most() time.Duration {
	if len(a.After) == 0 {
		return 0
	}
	return a.Wait() + a.Delay()
}

// String says it for people; "" if it waits for nobody.
func (a *StartAfter) String() string {
	if len(a.After) == 0 {
		return ""
	}
	text := strings.Join(a.After, ", ")
	if a.AfterCondition == AfterHealthy {
		text += " healthy"
	}
	if d := a.Delay(); d > 0 {
		text += fmt.Sprintf(", then %v", d)
	}
	return text + fmt.Sprintf(", at most %v", a.Wait())
}

func (a *StartAfter) validate() error {
	if len(a.After) > MaxAfter {
		return Invalid("spec.recovery.after", "has %d VMs; at most %d are allowed", len(a.After), MaxAfter)
	}
	seen := map[string]bool{}
	for i, name := range a.After {
		field := fmt.Sprintf("spec.recovery.after[%d]", i)
		if err := ValidName(field, name); err != nil {
			return err
		}
		if seen[name] {
			return Invalid(field, "names %s a second time", name)
		}
		seen[name] = true
	}
	switch a.AfterCondition {
	case "", AfterStarted, AfterHealthy:
	default:
		return Invalid("spec.recovery.afterCondition", "is %q; give started or healthy", clip(string(a.AfterCondition)))
	}
	if a.AfterDelaySeconds < 0 || a.AfterDelaySeconds > MaxAfterDelay {
		return Invalid("spec.recovery.afterDelaySeconds", "is %d; give 0 to %d seconds", a.AfterDelaySeconds, MaxAfterDelay)
	}
	if a.AfterWaitSeconds < 0 || a.AfterWaitSeconds > MaxAfterWait {
		return Invalid("spec.recovery.afterWaitSeconds", "is %d; give 1 to %d seconds, or 0 for %d", a.AfterWaitSeconds, MaxAfterWait, DefaultAfterWait)
	}
	return nil
}

// VMAwaits is that an automatic start is held back until other VMs are up.
type VMAwaits struct {
	// Epoch of the binding that this is of.
	Epoch uint64 `json:"epoch"`
	// VMs that are not up yet, and Until when it starts anyway; the owner's word.
	VMs   []string   `json:"vms,omitempty"`
	Until *time.Time `json:"until,omitempty"`
}
