// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

// EvacuationLevel says what is done with VMs that cannot be moved while they run.
type EvacuationLevel string

// The levels. Both keep new VMs away, and move what is stopped, too.
const (
	// EvacuateLive leaves them where they are and says why.
	EvacuateLive EvacuationLevel = "live"
	// EvacuateStop shuts them down and starts them on another node.
	EvacuateStop EvacuationLevel = "stop"
)

// Limits of an evacuation.
const (
	// DefaultEvacuations is how many VMs move at once.
	DefaultEvacuations = 2
	MaxEvacuations     = 16
	// MaxForceStop is the longest wait for a guest that shuts down, in seconds.
	MaxForceStop = 86400
)

// Evacuation empties a node. Its ID is the node's; the leader carries it out. It
// exists until its task has taken over the result.
type Evacuation = Object[EvacuationSpec, EvacuationStatus]

// EvacuationSpec is the wish, written with the task.
type EvacuationSpec struct {
	TaskID   string          `json:"taskID"`
	Node     string          `json:"node"`
	Level    EvacuationLevel `json:"level"`
	Parallel int             `json:"parallel"`
	// MoveStopped moves stopped VMs with the volumes that only the node has.
	MoveStopped bool   `json:"moveStopped,omitempty"`
	Actor       string `json:"actor,omitempty"`
	// ForceStopSeconds is after how long a guest that was told to shut down is ended,
	// 0 for never.
	ForceStopSeconds int `json:"forceStopSeconds,omitempty"`
	// Stay moves nothing; LeaveStopped does not start again what was shut down and
	// is still on the node. Both are of a reboot, which takes the list over.
	Stay         bool `json:"stay,omitempty"`
	LeaveStopped bool `json:"leaveStopped,omitempty"`
	// Cancel ends it when what moves now has moved.
	Cancel bool `json:"cancel,omitempty"`
}

// EvacuationStatus is written by the leader.
type EvacuationStatus struct {
	Phase    TaskPhase `json:"phase,omitempty"`
	Progress int       `json:"progress,omitempty"`
	Message  string    `json:"message,omitempty"`
	Code     Code      `json:"code,omitempty"`
	// Total is the number of VMs at the beginning.
	Total int `json:"total,omitempty"`
	// Stopped are the IDs of VMs that were shut down to be moved; they are started
	// again.
	Stopped []string `json:"stopped,omitempty"`
}

// EvacuateRequest is the body of POST /nodes/{name}/evacuate.
type EvacuateRequest struct {
	// Level is live (default) or stop.
	Level EvacuationLevel `json:"level,omitempty" enum:"live,stop" doc:"what to do with VMs that cannot be moved while they run: leave them (live) or shut them down and start them elsewhere (stop)"`
	// Parallel is how many move at once: 1-16, default 2.
	Parallel int `json:"parallel,omitempty" minimum:"0" maximum:"16"`
	// MoveStopped also moves stopped VMs whose volumes only the node has.
	MoveStopped bool `json:"moveStopped,omitempty" doc:"also move stopped VMs whose disks only the node has, with these"`
	// ForceStopSeconds ends guests that do not shut down: 0 (never) to 86400.
	ForceStopSeconds int `json:"forceStopSeconds,omitempty" minimum:"0" maximum:"86400" doc:"with level stop: after how many seconds a guest that does not shut down is ended; 0 is never"`
}

// Validate sets defaults and checks.
func (r *EvacuateRequest) Validate() error {
	if r.Level == "" {
		r.Level = EvacuateLive
	}
	if r.Parallel == 0 {
		r.Parallel = DefaultEvacuations
	}
	if r.Level != EvacuateLive && r.Level != EvacuateStop {
		return Invalid("level", "is %q; give live or stop", clip(string(r.Level)))
	}
	if r.Parallel < 1 || r.Parallel > MaxEvacuations {
		return Invalid("parallel", "is %d; give 1 to %d", r.Parallel, MaxEvacuations)
	}
	if r.ForceStopSeconds < 0 || r.ForceStopSeconds > MaxForceStop {
		return Invalid("forceStopSeconds", "is %d; give 0 (never) to %d", r.ForceStopSeconds, MaxForceStop)
	}
	if r.ForceStopSeconds > 0 && r.Level != EvacuateStop {
		return Invalid("forceStopSeconds", "has a meaning with level stop only")
	}
	return nil
}
