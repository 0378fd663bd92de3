// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import "time"

// Failover is the evidence of one loss of a node: why it was certain that its
// protected VMs ended. It is written in the transaction that declares the node
// lost.
type Failover = Object[FailoverSpec, FailoverStatus]

// FailoverCause is what made it certain.
type FailoverCause string

// The causes: every lease that the node may have had is over, a power device says
// that the host is off, or a pool has locked the host out; that is a loss of the
// VMs alone that write to that pool. A drill is the loss of one VM, ended on purpose.
const (
	CauseLease   FailoverCause = "lease"
	CausePower   FailoverCause = "power"
	CauseStorage FailoverCause = "storage"
	CauseDrill   FailoverCause = "drill"
)

// SilenceSince is what a silence is counted from.
type SilenceSince string

// Silence counts from the last lease that this leader granted. If there is none it
// counts from the last moment at which an earlier leader may have granted one, which a
// majority of the voters has told; or from the beginning of this leadership.
const (
	SinceGrant      SilenceSince = "grant"
	SinceEarlier    SilenceSince = "earlierLeader"
	SinceLeadership SilenceSince = "leadership"
)

// LeaseRules are the times that the leader went by, in milliseconds.
type LeaseRules struct {
	// LeaseMillis is how long a lease lasts from the moment that it was asked for.
	LeaseMillis int64 `json:"leaseMillis"`
	// DriftPerMille is the most that two clocks are taken to differ in rate.
	DriftPerMille int64 `json:"driftPerMille"`
	// KillMillis is what the guard has to end the VMs.
	KillMillis int64 `json:"killMillis"`
	// MarginMillis is added for good measure.
	MarginMillis int64 `json:"marginMillis"`
}

// FailoverSpec is what was known when the node was declared lost. It never
// changes; its revision is that of the declaration.
type FailoverSpec struct {
	NodeID string `json:"nodeID"`
	Node   string `json:"node"`
	// BootID of the node's daemon, as it was heard last.
	BootID string `json:"bootID,omitempty"`
	// GuardLevel of the node: what ended its VMs.
	GuardLevel string        `json:"guardLevel,omitempty"`
	Cause      FailoverCause `json:"cause" enum:"lease,power,storage,drill"`
	// Leader that decided, and its term; none of a drill, which its node declares.
	LeaderID string `json:"leaderID"`
	Leader   string `json:"leader"`
	Term     uint64 `json:"term"`
	// At is when, by the leader's wall clock; nothing depends on it.
	At time.Time `json:"at"`
	// SilentMillis is how long the node had been granted no lease when it was
	// barred from further ones, by the leader's CLOCK_BOOTTIME.
	SilentMillis int64        `json:"silentMillis"`
	Since        SilenceSince `json:"since" enum:"grant,earlierLeader,leadership"`
	Rules        LeaseRules   `json:"rules"`
	// Power is the action that switched the host off, if that is the cause.
	Power *FailoverPower `json:"power,omitempty"`
	// Storage is what the pool said that locked the host out, if that is the cause.
	Storage *FailoverStorage `json:"storage,omitempty"`
	// Drill is what the guard said, if that is the cause.
	Drill *FailoverDrill `json:"drill,omitempty"`
}

// FailoverDrill is the VM of a drill and its end.
type FailoverDrill struct {
	VMID string `json:"vmID"`
	VM   string `json:"vm"`
	DrillEnd
}

// FailoverStorage is what a pool said.
type FailoverStorage struct {
	// Fence is the ID of the attempt.
	Fence   string    `json:"fence"`
	PoolID  string    `json:"poolID"`
	Pool    string    `json:"pool"`
	BeganAt time.Time `json:"beganAt"`
	EndedAt time.Time `json:"endedAt"`
	// Epoch of the storage cluster's map that has it, Addresses that are locked out,
	// and Owners of the volumes' locks, which are locked out, too.
	Epoch     uint64   `json:"epoch"`
	Addresses []string `json:"addresses"`
	Owners    []string `json:"owners,omitempty"`
}

// FailoverPower is what a power device said.
type FailoverPower struct {
	Action  string      `json:"action"`
	BeganAt time.Time   `json:"beganAt"`
	EndedAt time.Time   `json:"endedAt"`
	Steps   []PowerStep `json:"steps"`
}

// FailoverStatus is what became of the node. It is written once, when the node
// gets leases again; its revision is that of the readmission.
type FailoverStatus struct {
	ReadmittedAt   *time.Time `json:"readmittedAt,omitempty"`
	ReadmittedTerm uint64     `json:"readmittedTerm,omitempty"`
}

// FailoverMove is the evidence of one VM that got another node. It is written
// in the transaction that changes the VM's binding.
type FailoverMove = Object[FailoverMoveSpec, FailoverMoveStatus]

// FailoverMoveSpec is what was decided. It never changes; its revision is that
// of the binding's change.
type FailoverMoveSpec struct {
	// FailoverID is the loss that it belongs to.
	FailoverID string    `json:"failoverID"`
	VMID       string    `json:"vmID"`
	VM         string    `json:"vm"`
	Outcome    HAOutcome `json:"outcome" enum:"restarts,moves"`
	// FromNodeID and FromEpoch are of the binding before, NodeID and Epoch of the
	// one since.
	FromNodeID string `json:"fromNodeID"`
	FromEpoch  uint64 `json:"fromEpoch"`
	NodeID     string `json:"nodeID"`
	Node       string `json:"node"`
	Epoch      uint64 `json:"epoch"`
	// Pools, by ID, that the old node had to be locked out of; none if the guard of
	// the old node ended the VM.
	Pools []string `json:"pools,omitempty"`
	// Term of the leader that decided.
	Term uint64    `json:"term"`
	At   time.Time `json:"at"`
}

// FailoverMovePhase is how far a move is.
type FailoverMovePhase string

// The phases; all but bound and failing are final.
const (
	// MoveBound: the new node has not reported that the VM runs.
	MoveBound FailoverMovePhase = "bound"
	// MoveFailing: it says that it cannot, and goes on trying.
	MoveFailing FailoverMovePhase = "failing"
	// MoveRunning: the VM runs there.
	MoveRunning FailoverMovePhase = "running"
	// MoveStopped: the VM is not meant to run.
	MoveStopped FailoverMovePhase = "stopped"
	// MoveSuperseded: the VM was moved on before it ran there.
	MoveSuperseded FailoverMovePhase = "superseded"
	// MoveGone: the VM was deleted.
	MoveGone FailoverMovePhase = "gone"
)

// Final reports whether nothing more is to come.
func (p FailoverMovePhase) Final() bool {
	return p != "" && p != MoveBound && p != MoveFailing
}

// FailoverMoveStatus is what the leader saw of the VM since.
type FailoverMoveStatus struct {
	Phase FailoverMovePhase `json:"phase,omitempty"`
	// At is when the leader saw it.
	At *time.Time `json:"at,omitempty"`
	// Epoch under which the new node reported the VM.
	Epoch uint64 `json:"epoch,omitempty"`
	// StartedAt is when its QEMU was started, by the new node's clock.
	StartedAt *time.Time `json:"startedAt,omitempty"`
	Message   string     `json:"message,omitempty"`
}

// Limits of what is kept.
const (
	// KeptFailovers is how many losses are kept, the newest.
	KeptFailovers = 50
	// KeptDrills is how many of these may be of drills.
	KeptDrills = 20
	// KeptFailoverMoves is how many moves are kept; the oldest losses go first.
	KeptFailoverMoves = 5000
)

// NewFailover returns the evidence of a loss that is being declared now.
func NewFailover(n *Node, cause FailoverCause, at time.Time) Failover {
	f := Failover{Meta: NewMeta(KindFailover, "", "")}
	f.Meta.Name = f.Meta.ID
	f.Spec = FailoverSpec{NodeID: n.Meta.ID, Node: n.Meta.Name, BootID: n.Status.BootID, GuardLevel: n.Status.GuardLevel, Cause: cause, At: at.UTC()}
	return f
}

// FailoverMoveID is the ID of the evidence of a VM's move.
func FailoverMoveID(failoverID, vmID string) string { return failoverID + "." + vmID }

// NewFailoverMove returns the evidence of a move that belongs to a loss.
func NewFailoverMove(failoverID string, vm *VM, at time.Time) FailoverMove {
	m := FailoverMove{Meta: NewMeta(KindFailoverMove, vm.Meta.Project, "")}
	m.Meta.ID = FailoverMoveID(failoverID, vm.Meta.ID)
	m.Meta.Name = m.Meta.ID
	m.Spec = FailoverMoveSpec{FailoverID: failoverID, VMID: vm.Meta.ID, VM: vm.Meta.Name, At: at.UTC()}
	m.Status.Phase = MoveBound
	return m
}

// SetDefaults implements Spec.
func (s *FailoverSpec) SetDefaults() {}

// Validate implements Spec.
func (s *FailoverSpec) Validate() error { return nil }

// SetDefaults implements Spec.
func (s *FailoverMoveSpec) SetDefaults() {}

// Validate implements Spec.
func (s *FailoverMoveSpec) Validate() error { return nil }

// FailoverProof is everything that is kept of one loss, with what it can be
// checked against.
type FailoverProof struct {
	Failover Failover       `json:"failover"`
	Moves    []FailoverMove `json:"moves"`
	// Others are the moves of the same VMs at other losses.
	Others []FailoverMove `json:"others,omitempty"`
	// Bindings of the VMs now.
	Bindings []Binding `json:"bindings"`
	// Revision of the state that this was read from.
	Revision uint64 `json:"revision"`
}

// Phases are how long the parts of a move took, in milliseconds. Each is between
// two moments of one leader's clock, unless the leadership changed meanwhile.
type Phases struct {
	// Detection is the silence before the node was barred from leases, or before it
	// was aimed at; Fence how long its power device or the pool took.
	Detection int64 `json:"detectionMillis"`
	Fence     int64 `json:"fenceMillis"`
	// Placement is from the declaration to the new binding, Start from there until
	// the leader saw that the VM runs; -1 if it does not.
	Placement int64 `json:"placementMillis"`
	Start     int64 `json:"startMillis"`
}

// Total is the sum, -1 if the VM does not run.
func (p Phases) Total() int64 {
	if p.Start < 0 {
		return -1
	}
	return p.Detection + p.Fence + p.Placement + p.Start
}

// PhasesOf says how long the parts of a move took.
func PhasesOf(f *Failover, m *FailoverMove) Phases {
	p := Phases{Detection: f.Spec.SilentMillis, Placement: max(0, m.Spec.At.Sub(f.Spec.At).Milliseconds()), Start: -1}
	if f.Spec.Power != nil {
		p.Fence = max(0, f.Spec.At.Sub(f.Spec.Power.BeganAt).Milliseconds())
	}
	if f.Spec.Storage != nil {
		p.Fence = max(0, f.Spec.Storage.EndedAt.Sub(f.Spec.Storage.BeganAt).Milliseconds())
	}
	if m.Status.Phase == MoveRunning && m.Status.At != nil {
		p.Start = max(0, m.Status.At.Sub(m.Spec.At).Milliseconds())
	}
	return p
}
