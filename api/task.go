// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import "time"

// Task is one long operation that somebody asked for.
type Task = Object[TaskSpec, TaskStatus]

// Action names an operation, as "<kind>.<verb>".
type Action string

// The actions of this version.
const (
	ActionVMCreate     Action = "vm.create"
	ActionVMStart      Action = "vm.start"
	ActionVMStop       Action = "vm.stop"
	ActionVMReboot     Action = "vm.reboot"
	ActionVMPause      Action = "vm.pause"
	ActionVMResume     Action = "vm.resume"
	ActionVMChange     Action = "vm.change"
	ActionVMDelete     Action = "vm.delete"
	ActionVMRecover    Action = "vm.recover"
	ActionVMClone      Action = "vm.clone"
	ActionVMSuspend    Action = "vm.suspend"
	ActionVMSnapshot   Action = "vm.snapshot"
	ActionVMRevert     Action = "vm.revert"
	ActionVMForget     Action = "vm.snapshot-delete"
	ActionVMDrill      Action = "vm.drill"
	ActionVMMigrate    Action = "vm.migrate"
	ActionVMMove       Action = "vm.move"
	ActionNodeEvacuate Action = "node.evacuate"
	ActionNodeReboot   Action = "node.reboot"
	ActionRolling      Action = "cluster.reboot"
	ActionNodeShutdown Action = "node.shutdown"
	ActionImageCreate  Action = "image.create"
	ActionImageDelete  Action = "image.delete"
	ActionVolumeCreate Action = "volume.create"
	ActionVolumeResize Action = "volume.resize"
	ActionVolumeDelete Action = "volume.delete"
	ActionVolumeMove   Action = "volume.move"
)

// TaskSpec is written once, in the transaction that states the wish.
type TaskSpec struct {
	Action Action `json:"action"`
	// TargetKind, TargetID and Target (its name) say what it is about.
	TargetKind Kind   `json:"targetKind"`
	TargetID   string `json:"targetID"`
	Target     string `json:"target"`
	// TargetGeneration is the generation of the target that carries the wish;
	// the task ends when the target's status has observed it.
	TargetGeneration uint64 `json:"targetGeneration,omitempty"`
	// TargetEpoch is the binding's epoch that the wish was made under.
	TargetEpoch uint64 `json:"targetEpoch,omitempty"`
	// TargetReboots is spec.reboots that the target must reach.
	TargetReboots uint64 `json:"targetReboots,omitempty"`
	// Actor is who asked: a token's name or a service of the cluster.
	Actor string `json:"actor,omitempty"`
	// Deadline is when the task fails if its target has not got there, by the clock of
	// the node that made it. The leader goes by how long it is after the creation, from
	// when it saw the task first: clocks may differ, and be set.
	Deadline time.Time `json:"deadline,omitzero"`
}

// TaskPhase is where a task is in its life.
type TaskPhase string

// The phases; the last three are final.
const (
	TaskPending   TaskPhase = "pending"
	TaskRunning   TaskPhase = "running"
	TaskSucceeded TaskPhase = "succeeded"
	TaskFailed    TaskPhase = "failed"
	TaskCancelled TaskPhase = "cancelled"
)

// Final reports whether the phase never changes again.
func (p TaskPhase) Final() bool {
	return p == TaskSucceeded || p == TaskFailed || p == TaskCancelled
}

// TaskStatus is written by the task service of the leader.
type TaskStatus struct {
	Phase TaskPhase `json:"phase,omitempty"`
	// Progress in percent, 0-100.
	Progress int `json:"progress"`
	// Message is one line: what happens now, or why the task failed.
	Message string `json:"message,omitempty"`
	// Code of the failure.
	Code       Code       `json:"code,omitempty"`
	StartedAt  *time.Time `json:"startedAt,omitempty"`
	FinishedAt *time.Time `json:"finishedAt,omitempty"`
}

// NewTask returns a task about a target, as it is at target.Generation. Its
// name is its ID; it is created without a name claim. It fails when the target
// has not got there within deadline.
func NewTask(action Action, kind Kind, target Meta, actor string, deadline time.Duration, now time.Time) Task {
	m := NewMeta(KindTask, target.Project, "")
	m.Name, m.CreatedAt = m.ID, now.UTC()
	return Task{
		Meta: m,
		Spec: TaskSpec{
			Action: action, TargetKind: kind, TargetID: target.ID, Target: target.Name,
			TargetGeneration: target.Generation, Actor: actor, Deadline: now.Add(deadline).UTC(),
		},
		Status: TaskStatus{Phase: TaskPending},
	}
}
