// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package task

import (
	"fmt"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// judgeMigration speaks for a migration whose source has not had its last word.
// While the source lives it has that word. Once it is lost, what was committed
// decides: the VM either runs at the target under the next epoch, or it was
// never given away, or ha has it.
func judgeMigration(s api.TaskSpec, what target) verdict {
	op := what.operation
	given := what.epoch == op.Spec.Epoch+1 && what.broughtBy == op.Spec.TaskID
	switch {
	case what.epoch > op.Spec.Epoch && !given:
		return failed(api.CodeConflict, fmt.Sprintf("vm %q was bound anew meanwhile", s.Target))
	case !what.ownerLost:
		return running(min(op.Status.Progress, 99), op.Status.Message)
	case !given:
		return failed(api.CodeInternal, "the node that it was to leave is lost")
	case runsUnder(what.vm, what.epoch) && op.Status.PostCopying:
		return failed(api.CodeInternal, fmt.Sprintf("the node that it left is lost; if the last of its memory was there, it starts anew on node %s", op.Spec.Migration.Node))
	case runsUnder(what.vm, what.epoch):
		return succeeded()
	case what.targetLost:
		return failed(api.CodeInternal, "both nodes are lost")
	case what.arrival == nil || what.arrival.Status.Phase == api.ArrivalFailed:
		return failed(api.CodeInternal, fmt.Sprintf("both ends failed; it starts anew on node %s", op.Spec.Migration.Node))
	}
	return running(min(op.Status.Progress, 99), op.Status.Message)
}

// runsUnder reports that the owner under an epoch has said that the VM runs.
func runsUnder(vm *api.VM, epoch uint64) bool {
	return vm.Status.Epoch == epoch && vm.Status.PID != 0
}

// judgeEvacuation takes over the word of the service that empties nodes.
func judgeEvacuation(s api.TaskSpec, what target) verdict {
	e := what.evacuation
	if e == nil {
		return failed(api.CodeInternal, fmt.Sprintf("nobody empties node %q for this task any more", s.Target))
	}
	st := &e.Status
	return spoken(st.Phase, st.Progress, st.Message, st.Code)
}

func rebootsNode(a api.Action) bool {
	return a == api.ActionNodeReboot || a == api.ActionNodeShutdown
}

// judgeReboot takes over the word of the service that reboots nodes.
func judgeReboot(s api.TaskSpec, what target) verdict {
	r := what.reboot
	if r == nil {
		return failed(api.CodeInternal, fmt.Sprintf("nobody reboots node %q for this task any more", s.Target))
	}
	st := &r.Status
	return spoken(st.Phase, st.Progress, st.Message, st.Code)
}

// judgeRolling takes over the word of the service that reboots nodes in turn.
func judgeRolling(what target) verdict {
	if what.rolling == nil {
		return failed(api.CodeInternal, "nobody reboots the nodes for this task any more")
	}
	st := &what.rolling.Status
	return spoken(st.Phase, st.Progress, st.Message, st.Code)
}

// operationsAt returns the tasks of the operations that a node has a part in.
func operationsAt(v *configdb.View, c configdb.Change) []string {
	node, ok := configdb.Nodes.IDOf(c.Key)
	if !ok {
		return nil
	}
	all, _ := configdb.Operations.List(v) // one that cannot be read has no task to wake
	var ids []string
	for i := range all {
		s := &all[i].Spec
		if s.NodeID == node || s.Migration != nil && s.Migration.NodeID == node {
			ids = append(ids, s.TaskID)
		}
	}
	return ids
}

// judgeDrill takes over the word of whoever carries out drills.
func judgeDrill(s api.TaskSpec, what target) verdict {
	if what.drill == nil {
		return failed(api.CodeInternal, fmt.Sprintf("nobody drills vm %q for this task any more", s.Target))
	}
	st := &what.drill.Status
	return spoken(st.Phase, st.Progress(), st.Message, st.Code)
}
