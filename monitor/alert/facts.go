// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package alert

import (
	"time"

	"github.com/muster-vm/muster/api"
)

// Facts are what the rules are evaluated on.
type Facts struct {
	Now     time.Time
	Nodes   []Node
	VMs     []VM
	Members []api.MemberStatus
	Pools   []Pool
	Drills  []api.Drill
	// Probes are the answers of the nodes, by ID; those that are too old are
	// left out.
	Probes map[string]Probe
	// Leader is the name of the node that probed.
	Leader string
}

// Node is a node as far as rules need it.
type Node struct {
	ID, Name, Message string
	Phase             api.NodePhase
	LostAt            time.Time // when it was last lost
	// Backup is the condition of the node's own backups; nil when it has none.
	Backup *api.Condition
}

// VM is a VM as far as rules need it.
type VM struct {
	ID, Name, Project, Node, Message string
	Phase                            api.VMPhase
	Crashes                          uint32
	CrashedAt                        time.Time // last seen to crash, zero if never
	// GaveUp: it was restarted too often and stays down.
	GaveUp bool
	// MovedFrom is the lost node that ha last took the VM from, and MovedLoss
	// the loss (Node.LostAt) that it was taken for.
	MovedFrom, MovedFromID string
	MovedLoss              time.Time
	// Recovering is true from that move until the VM was seen running, paused
	// or stopped at its new place.
	Recovering bool
}

// Pool is how full a pool is; a dir pool has one per node.
type Pool struct {
	ID, Name string
	Percent  float64
	// Unknown: it is there and cannot be measured now, as when its server is dead.
	Unknown bool
}

// Probe is what a node answered.
type Probe struct {
	// Offset of its clock from the leader's, give or take Uncertain.
	Offset, Uncertain time.Duration
	Self              bool // the leader itself: there is no offset
	CertNotAfter      time.Time
	CertLife          time.Duration // when it was issued; 0 when unknown
	Samples           []Sample
	// Partial: the node does not know all of its series, because its daemon has
	// just begun, or did not tell all.
	Partial bool
	// Stuck are series that are not current because what measures them fails.
	Stuck map[string]bool
}

// Sample is the newest value of a series.
type Sample struct {
	Metric, Series string
	Value          float64
}

// Target is what an alert is about.
type Target struct {
	Kind     api.Kind
	ID, Name string
}

// State of a target in the eyes of a rule.
type State int

// The states.
const (
	Unknown State = iota
	Good
	Bad
)

// Verdict is what a rule says of a target.
type Verdict struct {
	Target  Target
	State   State
	Message string
	// Refresh: the message is worth writing again when it changes while the
	// alert lasts. Messages with measured values are not.
	Refresh bool
}
