// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package task

import (
	"fmt"
	"reflect"
	"time"

	"github.com/muster-vm/muster/api"
)

// target is what a task is about, as it is now.
type target struct {
	exists bool
	vm     *api.VM
	disks  []disk // of vm
	// operation is the VM's, if it is the task's, with the epoch of the VM's
	// binding and whether the node that owns the work is lost.
	operation *api.Operation
	epoch     uint64
	ownerLost bool
	// broughtBy is the binding's, arrival the target's word, of a migration.
	broughtBy  string
	arrival    *api.Arrival
	targetLost bool
	// evacuation of a node, if it is the task's.
	evacuation *api.Evacuation
	drill      *api.Drill  // of a VM, if it is the task's
	reboot     *api.Reboot // of a node, if it is the task's
	rolling    *api.RollingReboot
	undone     string // what was not done by the deadline
	node       *api.Node
	image      *api.Image
	volume     *api.Volume
}

// disk is one disk of a VM.
type disk struct {
	name       string
	phase      api.StoragePhase
	message    string
	progress   int // of a copy, in percent
	conditions []api.Condition
}

// Progress of a VM's tasks in percent, coarse on purpose: each step is a
// write to the database.
const (
	progressDisks = 70 // all disks are made
	progressBusy  = 90 // QEMU is starting or stopping
)

const goesOn = "; the node goes on trying until it is told to stop"

// verdict is what a look at the target says about its task.
type verdict struct {
	phase    api.TaskPhase
	progress int
	message  string
	code     api.Code
}

func succeeded() verdict { return verdict{phase: api.TaskSucceeded, progress: 100} }

func running(progress int, message string) verdict {
	return verdict{phase: api.TaskRunning, progress: progress, message: message}
}

func failed(code api.Code, message string) verdict {
	return verdict{phase: api.TaskFailed, code: code, message: message}
}

func cancelled(message string) verdict {
	return verdict{phase: api.TaskCancelled, message: message}
}

// evaluate says what a task's status should be, given its target and whether its time
// is over. It is pure.
func evaluate(t api.Task, what target, now time.Time, over bool) (api.TaskStatus, bool) {
	old := t.Status
	if old.Phase.Final() {
		return old, false
	}
	got := judge(t.Spec, what)
	if !got.phase.Final() && over {
		msg := "not done within its deadline"
		if got.message != "" {
			msg += ": " + got.message
		}
		if what.undone != "" {
			msg += "; " + what.undone
		}
		got = verdict{phase: api.TaskFailed, progress: got.progress, code: api.CodeTimeout, message: msg}
	}
	at := now.UTC()
	next := api.TaskStatus{Phase: got.phase, Progress: got.progress, Message: got.message, Code: got.code, StartedAt: old.StartedAt}
	if next.StartedAt == nil {
		next.StartedAt = &at
	}
	if next.Phase != api.TaskSucceeded {
		next.Progress = max(next.Progress, old.Progress) // a bar never goes back
	}
	if next.Phase.Final() {
		next.FinishedAt = &at
	}
	return next, !reflect.DeepEqual(old, next)
}

func judge(s api.TaskSpec, what target) verdict {
	isDelete := s.Action == api.ActionVMDelete || s.Action == api.ActionImageDelete || s.Action == api.ActionVolumeDelete
	switch {
	case isDelete && !what.exists:
		return succeeded()
	case isDelete:
		return running(0, messageOf(what))
	case !what.exists:
		return cancelled(fmt.Sprintf("%s %q was deleted meanwhile", s.TargetKind, s.Target))
	}
	switch {
	case s.Action == api.ActionNodeEvacuate:
		return judgeEvacuation(s, what)
	case s.Action == api.ActionVMDrill:
		return judgeDrill(s, what)
	case rebootsNode(s.Action):
		return judgeReboot(s, what)
	case s.Action == api.ActionRolling:
		return judgeRolling(what)
	case api.IsOperation(s.Action):
		return judgeOperation(s, what)
	case what.vm != nil:
		return judgeVM(s, what)
	case what.image != nil:
		i := what.image
		return judgeStorage(s, i.Meta.Deleting(), i.Status.ObservedGeneration, i.Status.Phase, i.Status.Progress, i.Status.Message, i.Status.Conditions)
	case what.volume != nil:
		o := what.volume
		return judgeStorage(s, o.Meta.Deleting(), o.Status.ObservedGeneration, o.Status.Phase, o.Status.Progress, o.Status.Message, o.Status.Conditions)
	}
	return failed(api.CodeInternal, fmt.Sprintf("nobody knows how to judge a task about a %s", s.TargetKind))
}

func messageOf(what target) string {
	switch {
	case what.vm != nil:
		return what.vm.Status.Message
	case what.image != nil:
		return what.image.Status.Message
	case what.volume != nil:
		return what.volume.Status.Message
	}
	return ""
}

func judgeStorage(s api.TaskSpec, deleting bool, observed uint64, phase api.StoragePhase, progress int, msg string, list []api.Condition) verdict {
	switch {
	case phase == api.StorageReady && observed >= s.TargetGeneration:
		return succeeded()
	case deleting:
		return cancelled(fmt.Sprintf("%s %q is being deleted", s.TargetKind, s.Target))
	case phase == api.StorageFailed && observed >= s.TargetGeneration:
		return failed(codeOf(list), msg)
	}
	return running(min(progress, 99), msg)
}

// codeOf maps the reason of a failed condition to a code.
func codeOf(list []api.Condition) api.Code {
	for _, c := range list {
		if c.OK {
			continue
		}
		switch c.Reason {
		case "StorageFull":
			return api.CodeStorageFull
		case "Checksum":
			return api.CodeChecksum
		case "Invalid":
			return api.CodeInvalid
		case "Refused":
			return api.CodeRefused
		case "NotFound":
			return api.CodeNotFound
		case "Timeout":
			return api.CodeTimeout
		case "Unsupported":
			return api.CodeUnsupported
		}
	}
	return api.CodeInternal
}

// judgeVM compares a VM with the wish of a task. Success comes first: a wish
// that was fulfilled before it was overtaken was fulfilled.
func judgeVM(s api.TaskSpec, what target) verdict {
	vm := what.vm
	st := &vm.Status
	seen := st.ObservedGeneration >= s.TargetGeneration && st.Epoch >= s.TargetEpoch
	if seen && reached(s, what) {
		return succeeded()
	}
	if vm.Meta.Deleting() {
		return cancelled(fmt.Sprintf("vm %q is being deleted", s.Target))
	}
	if starts(s.Action) && vm.Meta.Generation > s.TargetGeneration && vm.Spec.Power == api.PowerSuspended {
		// Its node took the wish back; the status that says why comes a moment later.
		if st.ObservedGeneration < vm.Meta.Generation {
			return running(progressBusy, st.Message)
		}
		return failed(api.CodeInternal, st.Message)
	}
	if vm.Meta.Generation > s.TargetGeneration && contrary(s.Action, vm.Spec.Power) {
		return cancelled("overtaken by a later change")
	}
	if makes(s.Action) {
		if v, ok := judgeDisks(what.disks); ok {
			return v
		}
	}
	if seen && st.Phase == api.VMFailed {
		msg := st.Message
		if vm.Spec.Power != api.PowerStopped {
			msg += goesOn
		}
		return failed(codeOf(st.Conditions), msg)
	}
	if ended(s.Action, st.Phase) && seen {
		return failed(api.CodeRefused, fmt.Sprintf("vm %q is not running", s.Target))
	}
	switch st.Phase {
	case api.VMStarting, api.VMStopping:
		return running(progressBusy, st.Message)
	}
	if makes(s.Action) {
		return running(progressDisks, st.Message)
	}
	return running(0, st.Message)
}

// judgeOperation takes over the owner's last word. An operation whose owner
// cannot speak any more, because its binding was taken from it or it is lost,
// has failed: what the owner might still do for it requires the operation.
func judgeOperation(s api.TaskSpec, what target) verdict {
	op := what.operation
	if op == nil {
		return failed(api.CodeInternal, fmt.Sprintf("nobody works on %s %q for this task any more", s.TargetKind, s.Target))
	}
	st := &op.Status
	switch {
	case st.Phase.Final():
		return spoken(st.Phase, st.Progress, st.Message, st.Code)
	case what.deleting():
		return cancelled(fmt.Sprintf("%s %q is being deleted", s.TargetKind, s.Target))
	case op.Spec.Migration != nil:
		return judgeMigration(s, what)
	case what.ownerLost:
		return failed(api.CodeInternal, "the node that worked on it is lost")
	case what.epoch > op.Spec.Epoch:
		return failed(api.CodeConflict, fmt.Sprintf("vm %q was bound anew meanwhile", s.Target))
	}
	return running(min(st.Progress, 99), st.Message)
}

// spoken is the word of whoever does the work, the last one or one on the way.
func spoken(phase api.TaskPhase, progress int, message string, code api.Code) verdict {
	if !phase.Final() {
		return running(min(progress, 99), message)
	}
	if phase == api.TaskSucceeded {
		return verdict{phase: phase, progress: 100, message: message}
	}
	return verdict{phase: phase, progress: progress, message: message, code: code}
}

// reached reports whether the VM, which has seen the wish, is as wished.
func reached(s api.TaskSpec, what target) bool {
	st := &what.vm.Status
	switch s.Action {
	case api.ActionVMCreate, api.ActionVMClone:
		switch what.vm.Spec.Power {
		case api.PowerRunning:
			return st.Phase == api.VMRunning
		case api.PowerPaused:
			return st.Phase == api.VMPaused
		}
		return st.Phase == api.VMStopped && allReady(what.disks)
	case api.ActionVMStart, api.ActionVMRecover:
		// A guest that was paused since has started.
		return st.Phase == api.VMRunning || st.Phase == api.VMPaused && what.vm.Spec.Power == api.PowerPaused
	case api.ActionVMResume:
		return st.Phase == api.VMRunning
	case api.ActionVMStop:
		// One whose memory was being loaded keeps it.
		return st.Phase == api.VMStopped || st.Phase == api.VMSuspended && what.vm.Spec.Power == api.PowerSuspended
	case api.ActionVMPause:
		return st.Phase == api.VMPaused
	case api.ActionVMChange:
		return changedLive(what.vm)
	case api.ActionVMReboot:
		return st.RebootsDone >= s.TargetReboots
	}
	return false
}

// makes reports whether an action makes a VM with its disks.
func makes(a api.Action) bool { return a == api.ActionVMCreate || a == api.ActionVMClone }

// starts reports whether an action makes a guest run.
func starts(a api.Action) bool {
	return a == api.ActionVMStart || a == api.ActionVMResume || a == api.ActionVMRecover
}

// contrary reports whether a newer power state undoes an action's wish.
func contrary(a api.Action, power api.PowerState) bool {
	switch a {
	case api.ActionVMStart, api.ActionVMRecover, api.ActionVMReboot:
		return power == api.PowerStopped
	case api.ActionVMStop:
		return power != api.PowerStopped
	case api.ActionVMPause:
		return power != api.PowerPaused
	case api.ActionVMResume:
		return power != api.PowerRunning
	}
	return false
}

// ended reports whether an action that needs a running guest has lost it.
func ended(a api.Action, phase api.VMPhase) bool {
	return a == api.ActionVMReboot && phase == api.VMStopped
}

func allReady(disks []disk) bool {
	for _, d := range disks {
		if d.phase != api.StorageReady {
			return false
		}
	}
	return true
}

// judgeDisks says how far the disks of a new VM are; ok is false when they are
// all ready.
func judgeDisks(disks []disk) (verdict, bool) {
	ready, copied := 0, 0
	var waits *disk
	for i := range disks {
		d := &disks[i]
		switch d.phase {
		case api.StorageReady:
			ready++
			continue
		case api.StorageFailed:
			return failed(codeOf(d.conditions), fmt.Sprintf("volume %q: %s", d.name, d.message)), true
		}
		copied += min(d.progress, 99)
		if waits == nil {
			waits = d
		}
	}
	if waits == nil {
		return verdict{}, false
	}
	msg := fmt.Sprintf("making volume %q", waits.name)
	if waits.message != "" {
		msg = fmt.Sprintf("volume %q: %s", waits.name, waits.message)
	}
	done := (100*ready + copied) * progressDisks / (100 * len(disks))
	return running(done-done%10, msg), true
}
