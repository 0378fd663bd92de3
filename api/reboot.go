// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import "time"

// RebootAction is what a host does at the end.
type RebootAction string

// The actions.
const (
	RebootHost   RebootAction = "reboot"
	ShutdownHost RebootAction = "shutdown"
)

// Limits of a reboot.
const (
	// DefaultRebootSeconds is for how long a host that reboots may be away.
	DefaultRebootSeconds = 15 * 60
	MinRebootSeconds     = 30
	MaxRebootSeconds     = 86400
)

// RebootStep is how far a planned reboot or shutdown is.
type RebootStep string

// The steps, in their order.
const (
	RebootEmptying  RebootStep = "emptying"
	RebootLeaving   RebootStep = "leaving"   // the command is the node's
	RebootOff       RebootStep = "off"       // of a shutdown: the task is over
	RebootReturning RebootStep = "returning" // it is back, or will not leave: all as before
)

// Reboot is the planned reboot or shutdown of a node. Its ID is the node's; the
// leader carries it out, the node runs the command. It exists until its task has taken
// over the result and the node is back.
type Reboot = Object[RebootSpec, RebootStatus]

// RebootSpec is the wish, written with the task.
type RebootSpec struct {
	TaskID string       `json:"taskID"`
	Node   string       `json:"node"`
	Action RebootAction `json:"action"`
	// Evacuate is how the node is emptied. NoEvacuate moves nothing.
	Evacuate   EvacuateRequest `json:"evacuate"`
	NoEvacuate bool            `json:"noEvacuate,omitempty"`
	// WithinSeconds is for how long a host that reboots may be away.
	WithinSeconds int `json:"withinSeconds,omitempty"`
	// KeepMaintenance: the node was in maintenance before.
	KeepMaintenance bool   `json:"keepMaintenance,omitempty"`
	Actor           string `json:"actor,omitempty"`
	// Cancel gives it up, before the node has the command.
	Cancel bool `json:"cancel,omitempty"`
}

// RebootStatus is written by the leader, but for Refusal, which is the node's.
type RebootStatus struct {
	Step     RebootStep `json:"step,omitempty"`
	Phase    TaskPhase  `json:"phase,omitempty"`
	Progress int        `json:"progress,omitempty"`
	Message  string     `json:"message,omitempty"`
	Code     Code       `json:"code,omitempty"`
	// Outcome is how it ends when all is as before; succeeded if it is empty.
	Outcome TaskPhase `json:"outcome,omitempty"`
	// HostBoot is the boot that is to end, CommandedAt when the node got the command.
	HostBoot    string     `json:"hostBoot,omitempty"`
	CommandedAt *time.Time `json:"commandedAt,omitempty"`
	// Refusal is why the command failed on the node.
	Refusal string `json:"refusal,omitempty"`
	// Stopped are the IDs of VMs that were shut down and are started again.
	Stopped []string `json:"stopped,omitempty"`
}

// RebootRequest is the body of POST /nodes/{name}/actions/reboot and shutdown.
type RebootRequest struct {
	// Evacuate is how the node is emptied before.
	Evacuate   EvacuateRequest `json:"evacuate,omitzero"`
	NoEvacuate bool            `json:"noEvacuate,omitempty" doc:"move nothing: with level stop what runs is shut down and started again when the node is back, else the node must have no running VM"`
	// WithinSeconds is for how long the host may be away: 30 to 86400, default 900.
	WithinSeconds int  `json:"withinSeconds,omitempty" minimum:"0" maximum:"86400" doc:"of a reboot: for how many seconds the host may be away before the task fails and ha counts it as lost; default 900"`
	Force         bool `json:"force,omitempty" doc:"also while another node is being rebooted or shut down; a majority of the voters must stay in any case"`
}

// Validate sets defaults and checks.
func (r *RebootRequest) Validate() error {
	if r.WithinSeconds == 0 {
		r.WithinSeconds = DefaultRebootSeconds
	}
	if r.WithinSeconds < MinRebootSeconds || r.WithinSeconds > MaxRebootSeconds {
		return Invalid("withinSeconds", "is %d; give %d to %d", r.WithinSeconds, MinRebootSeconds, MaxRebootSeconds)
	}
	return r.Evacuate.Validate()
}
