// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

// Operation is long work on one VM that excludes all other work on it, such as
// a migration or a snapshot. Its ID is the VM's, so that a VM has one at most (or,
// for the move of a volume that no VM has, the volume's);
// it exists from the wish until its task has taken over the result. While it
// exists, requests leave the VM's spec alone, but for a forced stop.
type Operation = Object[OperationSpec, OperationStatus]

// OperationSpec is the wish, written with the task.
type OperationSpec struct {
	// Action is what is done; it begins with "vm.".
	Action Action `json:"action"`
	// VM is the name of the VM.
	VM string `json:"vm"`
	// TaskID is the task that people follow.
	TaskID string `json:"taskID"`
	// NodeID owns the work: the owner of the binding when the work was wished
	// for. Epoch is that binding's.
	NodeID string `json:"nodeID"`
	Epoch  uint64 `json:"epoch"`
	// SnapshotID is the snapshot that a snapshot's making, revert or deletion is
	// about. Start starts the VM after a revert to a snapshot without memory.
	SnapshotID string `json:"snapshotID,omitempty"`
	Start      bool   `json:"start,omitempty"`
	// Cancel asks the owner to give up if that is still possible.
	Cancel bool `json:"cancel,omitempty"`
	// Migration is set for vm.migrate.
	Migration *MigrationSpec `json:"migration,omitempty"`
	// Move is set for vm.move and volume.move.
	Move *MoveSpec `json:"move,omitempty"`
}

// OperationStatus is written by the hypervisor module of the node that owns the
// work, that of a move by its storage module.
type OperationStatus struct {
	// Phase is that of the task; a final phase is the owner's last word.
	Phase TaskPhase `json:"phase,omitempty"`
	// Progress in percent, 0-100, in coarse steps: each is a write.
	Progress int `json:"progress,omitempty"`
	// Message is one line: what happens now, or why the work failed.
	Message string `json:"message,omitempty"`
	// Code of the failure.
	Code Code `json:"code,omitempty"`
	// Begun is set before QEMU is told to do anything for the operation.
	Begun bool `json:"begun,omitempty"`
	// Machine is what the guest of a migration runs in; the status of the VM has
	// its hardware, which does not change any more.
	Machine *SavedMachine `json:"machine,omitempty"`
	// Channels is over how many connections the source can send the guest of a
	// migration; it comes with Machine. Absent: one, as from an older node.
	Channels int `json:"channels,omitempty"`
	// PostCopy is the source's word, with Machine, that it knows post-copy.
	// PostCopying is set before the guest is switched over for that.
	PostCopy    bool `json:"postCopy,omitempty"`
	PostCopying bool `json:"postCopying,omitempty"`
}

// IsOperation reports whether an action is carried out as an operation.
func IsOperation(a Action) bool {
	_, ok := doing[a]
	return ok
}

// Doing says what an operation does, for messages: "vm web1 is being …".
func (s *OperationSpec) Doing() string {
	if d, ok := doing[s.Action]; ok {
		return d
	}
	return "worked on by a newer version (" + string(s.Action) + ")"
}

// doing has the participle of every action that is an operation.
var doing = map[Action]string{
	ActionVMSuspend:  "suspended",
	ActionVMSnapshot: "snapshotted",
	ActionVMRevert:   "reverted to a snapshot",
	ActionVMForget:   "relieved of a snapshot",
	ActionVMMigrate:  "migrated",

	ActionVMMove:     "moved",
	ActionVolumeMove: "moved",
}
