// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import "time"

// Node is one host of the cluster.
type Node = Object[NodeSpec, NodeStatus]

// NodeRole says what a node does for the configuration database.
type NodeRole string

// The roles. A voter votes when its vote is needed: at most five nodes do, an
// odd number where there are three or more; the others are replicas with the
// full state, and take over when a voter is lost. A witness votes first of all
// and runs no VM. A replica never votes.
const (
	RoleVoter   NodeRole = "voter"
	RoleWitness NodeRole = "witness"
	RoleReplica NodeRole = "replica"
	// RoleAuto is another word for RoleVoter, which is what is stored.
	RoleAuto NodeRole = "auto"
)

// ParseNodeRole checks a role, in a field, and returns it as it is stored.
func ParseNodeRole(field string, r NodeRole) (NodeRole, error) {
	switch r {
	case "", RoleAuto, RoleVoter:
		return RoleVoter, nil
	case RoleWitness, RoleReplica:
		return r, nil
	}
	return r, Invalid(field, "is %q; give voter (or auto), witness or replica", clip(string(r)))
}

// Accelerator is how QEMU runs guest code.
type Accelerator string

// The accelerators. Auto means KVM if a probe proved that it really runs a
// guest, otherwise TCG.
const (
	AccelAuto Accelerator = "auto"
	AccelKVM  Accelerator = "kvm"
	AccelTCG  Accelerator = "tcg"
)

// NodeSpec is what administrators set, and the address given at join.
type NodeSpec struct {
	// Address is host:port of the node's one TCP port.
	Address string `json:"address" readOnly:"true"`
	// Role is voter (default; auto is the same), witness or replica.
	Role NodeRole `json:"role,omitempty" enum:"voter,auto,witness,replica"`
	// Maintenance keeps new VMs away.
	Maintenance bool `json:"maintenance,omitempty"`
	// Accelerator is auto (default), kvm or tcg.
	Accelerator Accelerator `json:"accelerator,omitempty" enum:"auto,kvm,tcg"`
	// ReservedMemory is kept for the host: default 512 MiB.
	ReservedMemory Size `json:"reservedMemory,omitempty"`
	// MigrationBandwidth bounds what all VMs that leave the node take together, in
	// bytes per second; 0 is no bound.
	MigrationBandwidth Size `json:"migrationBandwidth,omitempty"`
}

// SetDefaults implements Spec.
func (s *NodeSpec) SetDefaults() {
	if role, err := ParseNodeRole("", s.Role); err == nil {
		s.Role = role
	}
	if s.Accelerator == "" {
		s.Accelerator = AccelAuto
	}
	if s.ReservedMemory == 0 {
		s.ReservedMemory = 512 * MiB
	}
}

// Validate implements Spec.
func (s *NodeSpec) Validate() error {
	if _, err := ParseNodeRole("spec.role", s.Role); err != nil {
		return err
	}
	switch s.Accelerator {
	case AccelAuto, AccelKVM, AccelTCG:
	default:
		return Invalid("spec.accelerator", "is %q; give auto, kvm or tcg", clip(string(s.Accelerator)))
	}
	if s.ReservedMemory < 0 || s.ReservedMemory > MaxMemory {
		return Invalid("spec.reservedMemory", "is %s; give 0 to %s", s.ReservedMemory, MaxMemory)
	}
	if b := s.MigrationBandwidth; b != 0 && (b < MinBandwidth || b > MaxBandwidth) {
		return Invalid("spec.migrationBandwidth", "is %s per second; give %s to %s, or 0 for no bound", b, MinBandwidth, MaxBandwidth)
	}
	return nil
}

// ConditionConfigDB is the condition of a node's replica of the configuration
// database. The leader writes it.
const ConditionConfigDB = "ConfigDB"

// CutOff is what is known of a node that the network does not reach, but whose lease
// goes on by notes in pools.
type CutOff struct {
	Since time.Time `json:"since"`
	// Isolated: it hears no other node. Otherwise it is a part of the network that
	// failed.
	Isolated bool `json:"isolated,omitempty"`
}

// Absence is a silence that was planned. While nothing protected is bound to the
// node it is no loss.
type Absence struct {
	// Action is reboot or shutdown.
	Action RebootAction `json:"action"`
	Since  time.Time    `json:"since"`
	// Until is when it is not planned any more; none for a shutdown.
	Until *time.Time `json:"until,omitempty"`
}

// NodePhase is where a node is in its life.
type NodePhase string

// The phases. Lost is declared by the leader's ha service when the node's
// lease has certainly run out.
const (
	NodeJoining NodePhase = "joining"
	NodeReady   NodePhase = "ready"
	NodeLost    NodePhase = "lost"
	NodeLeaving NodePhase = "leaving"
)

// NodeStatus is written by the node itself, except that the leader's ha
// service sets phase Lost.
type NodeStatus struct {
	ObservedGeneration uint64    `json:"observedGeneration,omitempty"`
	Phase              NodePhase `json:"phase,omitempty"`
	// Version of the daemon.
	Version string `json:"version,omitempty"`
	// FeatureLevels that the daemon supports; nil is the first alone.
	FeatureLevels *FeatureLevels `json:"featureLevels,omitempty"`
	// SystemUUID is the host's (SMBIOS), if it has one; power devices are
	// compared with it.
	SystemUUID string `json:"systemUUID,omitempty"`
	// BootID changes with every start of the daemon.
	BootID string `json:"bootID,omitempty"`
	// HostBoot is the kernel's name of the boot that the host runs; empty if the
	// daemon cannot be asked to reboot it.
	HostBoot string `json:"hostBoot,omitempty"`
	// Absence is there while the node is expected to be away.
	Absence *Absence `json:"absence,omitempty"`
	// LostAt is when the node was last declared lost, and LostTerm the Raft
	// term of the leader that did it.
	LostAt   *time.Time `json:"lostAt,omitempty"`
	LostTerm uint64     `json:"lostTerm,omitempty"`
	// LostAction is the power action that confirmed that the node was off, if it
	// was declared lost by that; see ha/DESIGN.md.
	LostAction string `json:"lostAction,omitempty"`
	// Failover is the evidence of the loss, while the node is lost.
	Failover string `json:"failover,omitempty"`
	// Fencing is the power action by which the leader is switching the node off:
	// it gets no lease meanwhile. The leader's ha service writes it.
	Fencing string `json:"fencing,omitempty"`
	// StorageFences lock the node out of pools. The leader's ha service adds them,
	// the node takes them back when nothing of what ran there is left.
	StorageFences []StorageFence `json:"storageFences,omitempty"`
	// CutOff is there while the leader hears the node by its notes in pools alone. The
	// leader's ha service writes it.
	CutOff *CutOff `json:"cutOff,omitempty"`
	// Stopping is true after the node's daemon was stopped in order, until it
	// runs again: its silence is then no reason to switch it off.
	Stopping bool `json:"stopping,omitempty"`
	// Accelerator is what new VMs get here: kvm or tcg, with the reason.
	Accelerator       Accelerator `json:"accelerator,omitempty"`
	AcceleratorReason string      `json:"acceleratorReason,omitempty"`
	// QEMUVersion is empty when QEMU cannot be used; see conditions.
	QEMUVersion string `json:"qemuVersion,omitempty"`
	// GuardLevel is "hardware watchdog", "softdog" or "process only".
	GuardLevel string `json:"guardLevel,omitempty"`
	// CPUs and Memory are the host's.
	CPUs       int         `json:"cpus,omitempty"`
	Memory     Size        `json:"memory,omitempty"`
	Message    string      `json:"message,omitempty"`
	Conditions []Condition `json:"conditions,omitempty"`
	// Certificate that the node shows to others.
	Certificate *CertificateStatus `json:"certificate,omitempty"`
}
