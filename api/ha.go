// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import "time"

// HAOutcome is what becomes of a VM when its node is lost.
type HAOutcome string

// The outcomes.
const (
	// HARestarts: it is protected and meant to run, and is started on another node.
	HARestarts HAOutcome = "restarts"
	// HAMoves: it is protected and stopped, and is bound to another node.
	HAMoves HAOutcome = "moves"
	// HARefused: it ought to restart, and no node can take it.
	HARefused HAOutcome = "refused"
	// HAWaits: it is not protected, or has a storage guard and its node is not locked
	// out yet; whether it runs is unknown until then, or until its node is back.
	HAWaits HAOutcome = "waits"
	// HAStays: it is stopped and stays bound to its node.
	HAStays HAOutcome = "stays"
	// HAEnds: it is on a node that lives, and is ended because there is no quorum.
	HAEnds HAOutcome = "ends"
)

// HAQuorum is what the loss of nodes leaves of the voters.
type HAQuorum struct {
	Voters int `json:"voters" doc:"nodes that vote"`
	Left   int `json:"left" doc:"voters that are left"`
	Needed int `json:"needed" doc:"voters that make a majority"`
	// Spare is how many more voters may be lost.
	Spare int  `json:"spare" doc:"voters that may be lost besides"`
	Kept  bool `json:"kept" doc:"whether there is a majority"`
	// Message says what follows, if something does.
	Message string `json:"message,omitempty"`
}

// HAStep is what becomes of one VM.
type HAStep struct {
	// Order in which the VMs get their places, from 1.
	Order   int    `json:"order"`
	VM      string `json:"vm"`
	VMID    string `json:"vmID"`
	Project string `json:"project"`
	From    string `json:"from" doc:"the node that it is bound to"`
	// Priority of its recovery.
	Priority RecoveryPriority `json:"priority"`
	Outcome  HAOutcome        `json:"outcome" enum:"restarts,moves,refused,waits,stays,ends"`
	// Node that it gets; empty if it gets none.
	Node   string `json:"node,omitempty"`
	Reason string `json:"reason,omitempty"`
	// After are the VMs that its start waits for, and StartsAfter says it for people.
	After       []string `json:"after,omitempty"`
	StartsAfter string   `json:"startsAfter,omitempty"`
	// Wave in which it starts, from 1, if it restarts.
	Wave int `json:"wave,omitempty"`
}

// HALoss is what becomes of the VMs when nodes die together.
type HALoss struct {
	Killed   []string       `json:"killed" doc:"the nodes that die"`
	Revision uint64         `json:"revision" doc:"of the state that it is true for"`
	Quorum   HAQuorum       `json:"quorum"`
	Counts   map[string]int `json:"counts" doc:"VMs by outcome"`
	Steps    []HAStep       `json:"steps"`
}

// HASimulateRequest asks what would happen.
type HASimulateRequest struct {
	// Kill are the names or IDs of the nodes that die together.
	Kill []string `json:"kill" minItems:"1"`
}

// HAMode is what a start that would break the promise gets.
type HAMode string

// The modes.
const (
	AdmissionOff    HAMode = "off"
	AdmissionWarn   HAMode = "warn"
	AdmissionRefuse HAMode = "refuse"
)

// HASettings is what administrators promise.
type HASettings struct {
	// Failures is how many nodes may die together, so that every protected VM
	// still restarts: 1 to 4.
	Failures int `json:"failures" minimum:"1" maximum:"4"`
	// Admission is what becomes of a start that would break that: off, warn
	// (default) or refuse.
	Admission HAMode `json:"admission" enum:"off,warn,refuse"`
	// StorageHeartbeat keeps leases by notes in pools that all nodes see when the network
	// fails: on (default) or off.
	StorageHeartbeat HAMode `json:"storageHeartbeat,omitempty" enum:"on,off"`
}

// The modes of the storage heartbeat.
const (
	HeartbeatOn  HAMode = "on"
	HeartbeatOff HAMode = "off"
)

// MaxHAFailures is how many failures can be promised to be survived: with five
// voters the third takes the quorum.
const MaxHAFailures = 4

// SetDefaults fills in what is left out.
func (s *HASettings) SetDefaults() {
	if s.Failures == 0 {
		s.Failures = 1
	}
	if s.Admission == "" {
		s.Admission = AdmissionWarn
	}
	if s.StorageHeartbeat == "" {
		s.StorageHeartbeat = HeartbeatOn
	}
}

// Validate checks the settings.
func (s *HASettings) Validate() error {
	if s.Failures < 1 || s.Failures > MaxHAFailures {
		return Invalid("ha.failures", "is %d; give 1 to %d, or set ha.admission to off", s.Failures, MaxHAFailures)
	}
	switch s.Admission {
	case AdmissionOff, AdmissionWarn, AdmissionRefuse:
	default:
		return Invalid("ha.admission", "is %q; give off, warn or refuse", clip(string(s.Admission)))
	}
	switch s.StorageHeartbeat {
	case "", HeartbeatOn, HeartbeatOff:
		return nil
	}
	return Invalid("ha.storageHeartbeat", "is %q; give on or off", clip(string(s.StorageHeartbeat)))
}

// HAAdmission is whether the promise to survive failures can be kept.
type HAAdmission struct {
	HASettings
	Kept bool `json:"kept"`
	// Message says why not.
	Message string `json:"message,omitempty"`
	// Sets of nodes that were assumed to die together, of so many that there are.
	Sets  int `json:"sets"`
	OfAll int `json:"ofAll"`
	// Worst are the nodes whose loss is the worst that was found.
	Worst []string `json:"worst,omitempty"`
	// RefusedVMs is how many VMs would then not restart; Refused are the first of
	// them.
	RefusedVMs int      `json:"refusedVMs"`
	Refused    []HAStep `json:"refused,omitempty"`
}

// HANode is one node and what its death would mean.
type HANode struct {
	Node       string    `json:"node"`
	Role       NodeRole  `json:"role,omitempty"`
	Phase      NodePhase `json:"phase,omitempty"`
	Voter      bool      `json:"voter"`
	Leader     bool      `json:"leader"`
	GuardLevel string    `json:"guardLevel,omitempty"`
	// Protected and Unprotected VMs that are meant to run there.
	Protected   int `json:"protected"`
	Unprotected int `json:"unprotected"`
	// Loss is what its death would mean now; nil if it is lost already.
	Loss *HALoss `json:"loss,omitempty"`
}

// HAQuorumLost counts the VMs that are meant to run, by what the loss of the quorum
// does to them. Nothing restarts meanwhile.
type HAQuorumLost struct {
	// Ends are protected ones, which end with the leases of their nodes, unless the
	// storage heartbeat keeps these.
	Ends int `json:"ends" doc:"protected VMs, which end with the leases of their nodes"`
	// RunsOn are those that are not protected or have a storage guard.
	RunsOn int `json:"runsOn" doc:"VMs that run on: not protected, or with a storage guard"`
}

// HAStatus is what would happen now if nodes died, as the node that answers sees
// it.
type HAStatus struct {
	Node       string    `json:"node"`
	Revision   uint64    `json:"revision"`
	ComputedAt time.Time `json:"computedAt"`
	// Seconds that it took to compute.
	Seconds float64  `json:"seconds"`
	Quorum  HAQuorum `json:"quorum"`
	// IfQuorumLost is what would become of the running VMs if no majority of the
	// voters were left now.
	IfQuorumLost HAQuorumLost `json:"ifQuorumLost"`
	// Witness is the name of a witness that votes.
	Witness   string      `json:"witness,omitempty"`
	Admission HAAdmission `json:"admission"`
	Nodes     []HANode    `json:"nodes"`
	// Lost is what becomes of the VMs of nodes that are lost already; nil if
	// there are none.
	Lost *HALoss `json:"lost,omitempty"`
}
