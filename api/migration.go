// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

// Limits of a migration.
const (
	// DefaultDowntimeMillis is how long the guest may stand still for the last of
	// its memory, if nobody says otherwise.
	DefaultDowntimeMillis = 300
	MinDowntimeMillis     = 10
	MaxDowntimeMillis     = 60_000
	MinBandwidth          = 1 * MiB
	MaxBandwidth          = 1 * TiB
	// DefaultMigrationChannels is how many connections carry the memory if nobody
	// says otherwise; docs/benchmarks.md has the figures.
	DefaultMigrationChannels = 1
	MaxMigrationChannels     = 16
)

// MigrationSpec is the wish of a vm.migrate operation.
type MigrationSpec struct {
	// NodeID and Node name the node that the VM moves to.
	NodeID string `json:"nodeID"`
	Node   string `json:"node"`
	// MaxDowntimeMillis is how long the guest may stand still for the last of its
	// memory; 0 means DefaultDowntimeMillis.
	MaxDowntimeMillis int `json:"maxDowntimeMillis,omitempty"`
	// Bandwidth bounds the transfer in bytes per second; 0 is no bound.
	Bandwidth Size `json:"bandwidth,omitempty"`
	// Volumes are the IDs of the volumes that are copied along, because they are
	// in a pool of the source alone.
	Volumes []string `json:"volumes,omitempty"`
	// Channels is how many connections shall carry the memory, if both nodes say
	// in their status that they do that; 0 and 1 are one.
	Channels int `json:"channels,omitempty"`
	// PostCopy lets the guest run at the target before the last of its memory is
	// there, if it does not come to an end otherwise.
	PostCopy bool `json:"postCopy,omitempty"`
}

// MigrateRequest is the body of POST /vms/{name}/migrate.
type MigrateRequest struct {
	// To is the name of a node; the best other one when empty.
	To string `json:"to,omitempty" doc:"node to move to; the best other one when left out"`
	// MaxDowntimeMillis: 10-60000.
	MaxDowntimeMillis int `json:"maxDowntimeMillis,omitempty" doc:"how long the guest may stand still for the last of its memory, in ms"`
	// Bandwidth in bytes per second: 1 MiB to 1 TiB.
	Bandwidth Size `json:"bandwidth,omitempty" doc:"most bytes per second"`
	// WithStorage copies the volumes that are in a pool of the source alone.
	WithStorage bool `json:"withStorage,omitempty" doc:"copy the disks that only the present node has"`
	// Channels: 1-16; 0 means DefaultMigrationChannels.
	Channels int `json:"channels,omitempty" doc:"how many connections carry the memory at once"`
	// PostCopy excludes several channels and volumes that are copied.
	PostCopy bool `json:"postCopy,omitempty" doc:"let the guest run there before the last of its memory has come, if it changes more than can be sent"`
}

// Validate checks the numbers.
func (r *MigrateRequest) Validate() error {
	if r.To != "" {
		if err := ValidName("to", r.To); err != nil {
			return err
		}
	}
	if d := r.MaxDowntimeMillis; d != 0 && (d < MinDowntimeMillis || d > MaxDowntimeMillis) {
		return Invalid("maxDowntimeMillis", "is %d; give %d to %d milliseconds", d, MinDowntimeMillis, MaxDowntimeMillis)
	}
	if b := r.Bandwidth; b != 0 && (b < MinBandwidth || b > MaxBandwidth) {
		return Invalid("bandwidth", "is %s per second; give %s to %s", b, MinBandwidth, MaxBandwidth)
	}
	if r.Channels < 0 || r.Channels > MaxMigrationChannels {
		return Invalid("channels", "is %d; give 1 to %d connections", r.Channels, MaxMigrationChannels)
	}
	if r.PostCopy && r.Channels > 1 {
		return Invalid("channels", "is %d, but with post-copy the memory goes over one connection", r.Channels)
	}
	return nil
}

// WishedChannels is how many connections shall carry the memory.
func (r *MigrateRequest) WishedChannels() int {
	if r.Channels == 0 {
		return DefaultMigrationChannels
	}
	return r.Channels
}

// Arrival is a VM that moves to a node, as that node sees it. Its ID is the
// VM's; it begins and ends with the operation.
type Arrival = Object[ArrivalSpec, ArrivalStatus]

// ArrivalSpec is written with the operation.
type ArrivalSpec struct {
	// TaskID is that of the operation.
	TaskID string `json:"taskID"`
	// NodeID is the node that the VM moves to.
	NodeID string `json:"nodeID"`
	// Epoch that the VM will be bound there under.
	Epoch uint64 `json:"epoch"`
}

// ArrivalPhase is how far the target node is.
type ArrivalPhase string

// The phases. Failed is the target's word that no QEMU of the VM runs there and
// that it begins none for this operation.
const (
	ArrivalPending ArrivalPhase = "pending"
	ArrivalReady   ArrivalPhase = "ready"
	ArrivalFailed  ArrivalPhase = "failed"
)

// ArrivalStatus is written by the node that the VM moves to, and by no other.
type ArrivalStatus struct {
	Phase ArrivalPhase `json:"phase,omitempty"`
	// Message says why it failed, or what it waits for.
	Message string `json:"message,omitempty"`
	// Code of the failure.
	Code Code `json:"code,omitempty"`
	// Channels that the target's QEMU waits for beside its main connection; it
	// answers the source's word in the operation's status. Absent: none, as from
	// an older node.
	Channels int `json:"channels,omitempty"`
	// PostCopy: QEMU there is ready to run the guest before all of its memory has
	// come.
	PostCopy bool `json:"postCopy,omitempty"`
}
