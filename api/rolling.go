// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import "time"

// MaxRollingNodes bounds the list of a rolling reboot.
const MaxRollingNodes = 1000

// RollingReboot reboots nodes one after the other. Its ID is the cluster's, so there is
// one; the leader carries it out, each node by a Reboot with the same task. It stays
// when it has ended, until the next one, which may go on with what is left.
type RollingReboot = Object[RollingRebootSpec, RollingRebootStatus]

// RollingRebootSpec is the wish, written with the task.
type RollingRebootSpec struct {
	TaskID string `json:"taskID"`
	// Nodes are all that are to run a new boot, in the order of their turns; the one
	// that leads comes last.
	Nodes []RollingNode `json:"nodes"`
	// Evacuate, NoEvacuate and WithinSeconds are those of each node's reboot.
	Evacuate      EvacuateRequest `json:"evacuate"`
	NoEvacuate    bool            `json:"noEvacuate,omitempty"`
	WithinSeconds int             `json:"withinSeconds"`
	Actor         string          `json:"actor,omitempty"`
	// Cancel gives it up: the node under way is the last one.
	Cancel bool `json:"cancel,omitempty"`
}

// RollingNode is a node on the list.
type RollingNode struct {
	ID   string `json:"id"`
	Node string `json:"node"`
	// HostBoot is the boot that is to end. The node is done when it runs another.
	HostBoot string `json:"hostBoot"`
	// Maintenance: it was in maintenance before.
	Maintenance bool `json:"maintenance,omitempty"`
}

// RollingRebootStatus is written by the leader.
type RollingRebootStatus struct {
	Phase    TaskPhase `json:"phase,omitempty"`
	Progress int       `json:"progress,omitempty"`
	Message  string    `json:"message,omitempty"`
	Code     Code      `json:"code,omitempty"`
	// Checked: every node could be emptied, as far as could be known before the first.
	Checked bool `json:"checked,omitempty"`
	// Current is the ID of the node under way.
	Current string `json:"current,omitempty"`
	// Done, Failed and Left are names, for people.
	Done   []string `json:"done,omitempty"`
	Failed string   `json:"failed,omitempty"`
	Left   []string `json:"left,omitempty"`
	// WaitsSince is since when something is not well that has to be, before the next.
	WaitsSince *time.Time `json:"waitsSince,omitempty"`
}

// RollingRebootRequest is the body of POST /cluster/reboot.
type RollingRebootRequest struct {
	// Nodes by name; all if there is none.
	Nodes []string `json:"nodes,omitempty" doc:"names of the nodes, in the order of their turns; all if left out. The one that leads comes last"`
	// Continue goes on with the list of the last rolling reboot.
	Continue bool `json:"continue,omitempty" doc:"go on with the nodes of the last rolling reboot that have not run another boot since it began"`
	// Evacuate is how each node is emptied.
	Evacuate      EvacuateRequest `json:"evacuate,omitzero"`
	NoEvacuate    bool            `json:"noEvacuate,omitempty" doc:"move nothing: with level stop what runs is shut down and started again when its node is back"`
	WithinSeconds int             `json:"withinSeconds,omitempty" minimum:"0" maximum:"86400" doc:"for how many seconds each host may be away before the task fails and ha counts it as lost; default 900"`
}

// Validate sets defaults and checks.
func (r *RollingRebootRequest) Validate() error {
	if r.Nodes != nil && len(r.Nodes) == 0 {
		return Invalid("nodes", "is empty; leave it out for all")
	}
	if r.Continue && len(r.Nodes) > 0 {
		return Invalid("nodes", "goes not with continue, which goes on with the list of before; leave one of them out")
	}
	if n := len(r.Nodes); n > MaxRollingNodes {
		return Invalid("nodes", "has %d names; give %d at most, or none for all", n, MaxRollingNodes)
	}
	one := RebootRequest{Evacuate: r.Evacuate, WithinSeconds: r.WithinSeconds}
	err := one.Validate()
	r.Evacuate, r.WithinSeconds = one.Evacuate, one.WithinSeconds
	return err
}

// RebootPlan is what a reboot or shutdown would do, as far as can be known.
type RebootPlan struct {
	// Nodes in the order of their turns.
	Nodes []PlannedReboot `json:"nodes"`
	// Refusal is why it would be refused as a whole, or fail before the first node.
	Refusal string `json:"refusal,omitempty"`
}

// PlannedReboot is the part of one node.
type PlannedReboot struct {
	Node string `json:"node"`
	// VMs that are on the node at its turn.
	VMs []PlannedVM `json:"vms,omitempty"`
	// Leaders: it leads now, and one of these would lead meanwhile.
	Leaders []string `json:"leaders,omitempty"`
	// Voters would be left while it is away, of which VotersNeeded are needed.
	Voters       int `json:"voters"`
	VotersNeeded int `json:"votersNeeded"`
	// Refusal is why it would be refused, or fail before the host's command.
	Refusal string `json:"refusal,omitempty"`
}

// PlannedVM is what would become of a VM.
type PlannedVM struct {
	VM string `json:"vm"`
	// To is the node where it would be afterwards; the node itself if it stays.
	To string `json:"to"`
	// Fate is migrate (it runs on meanwhile), restart (it is shut down, and started at
	// To), move (it does not run) or stay.
	Fate PlannedFate `json:"fate" enum:"migrate,restart,move,stay"`
	// Reason is why it does not simply move.
	Reason string `json:"reason,omitempty"`
}

// PlannedFate is what would become of a VM.
type PlannedFate string

// The fates.
const (
	FateMigrate PlannedFate = "migrate"
	FateRestart PlannedFate = "restart"
	FateMove    PlannedFate = "move"
	FateStay    PlannedFate = "stay"
)
