// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"fmt"
	"net/http"
	"slices"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// vmRequest is the body of /vms/{name}/stop.
type vmRequest struct {
	Force bool `json:"force,omitempty" doc:"pull the plug instead of pressing the power button"`
	// DiscardSuspend throws the saved memory of a suspended VM away.
	DiscardSuspend bool `json:"discardSuspend,omitempty" doc:"throw the saved memory of a suspended VM away (start, stop)"`
}

type vmResource struct {
	resource[api.VMSpec, api.VMStatus]
}

func newVMs() *vmResource {
	r := &vmResource{resource[api.VMSpec, api.VMStatus]{table: configdb.VMs, need: needViewer, show: hideCloudInit}}
	r.update, r.past = r.change, r.reverts()
	return r
}

// vmState is a VM with what decides about it, from one view.
type vmState struct {
	vm      api.VM
	binding api.Binding
}

// load reads a VM and its binding. Whatever is then decided requires that the
// binding is still the same, because ha may move it meanwhile.
func (c *change) load(vm api.VM) (*vmState, error) {
	b, err := configdb.Bindings.Get(c.v, vm.Meta.ID)
	if err != nil {
		return nil, fmt.Errorf("vm %s has no binding: %w", vm.Meta.Name, err)
	}
	c.tx.RequireRevision(configdb.Bindings.SpecKey(b.Meta.ID), b.Meta.Revision)
	return &vmState{vm: vm, binding: b}, nil
}

// idle refuses while an operation works on the VM, and makes the transaction
// depend on none having begun.
func (c *change) idle(vm *api.VM) error {
	return idle(c.v, c.tx, vm)
}

// begin adds an operation with its task: the VM's only one.
func (c *change) begin(st *vmState, action api.Action, fill func(*api.OperationSpec)) (string, error) {
	if err := c.idle(&st.vm); err != nil {
		return "", err
	}
	task, err := c.newTask(st.vm.Meta.Project, api.TaskSpec{
		Action: action, TargetKind: api.KindVM, TargetID: st.vm.Meta.ID, Target: st.vm.Meta.Name,
		TargetGeneration: st.vm.Meta.Generation, TargetEpoch: st.binding.Spec.Epoch,
	}, vmOperationDeadline)
	if err != nil {
		return "", err
	}
	op := api.Operation{
		Meta: api.NewMeta(api.KindOperation, st.vm.Meta.Project, st.vm.Meta.Name),
		Spec: api.OperationSpec{Action: action, VM: st.vm.Meta.Name, TaskID: task, NodeID: st.binding.Spec.NodeID, Epoch: st.binding.Spec.Epoch},
	}
	op.Meta.ID = st.vm.Meta.ID
	op.Status.Phase = api.TaskPending
	if fill != nil {
		fill(&op.Spec)
	}
	return task, configdb.Operations.CreateUnnamed(c.tx, &op)
}

// change carries out a PUT or PATCH.
func (r *vmResource) change(c *change, old, want *api.VM) (*effect, error) {
	if n := want.Spec.Reboots; n != 0 && n != old.Spec.Reboots {
		return nil, api.Invalid("spec.reboots", "is changed by POST %svms/%s/reboot only", base, old.Meta.Name)
	}
	if err := sameIfSuspended(old, want); err != nil {
		return nil, err
	}
	st, err := c.load(old.Clone())
	if err != nil {
		return nil, err
	}
	if err := c.idle(old); err != nil {
		return nil, err
	}
	if err := completeMachine(&old.Spec, &want.Spec); err != nil {
		return nil, err
	}
	changed, err := c.rework(old, st, &want.Spec)
	if err != nil {
		return nil, err
	}
	st.vm.Meta.Labels = want.Meta.Labels
	st.vm.Spec.CloudInit, st.vm.Spec.Limits = want.Spec.CloudInit, want.Spec.Limits
	if err := c.changeMachine(st, old, want); err != nil {
		return nil, err
	}
	if err := c.checkRecovery(old, &st.vm); err != nil {
		return nil, err
	}
	changed = changed || len(machineChanges(&old.Spec, &st.vm.Spec)) > 0
	if err := sealCloudInit(&st.vm, old); err != nil {
		return nil, err
	}
	action, err := c.wish(st, want.Spec.Power, want.Spec.ForceStop)
	if err != nil {
		return nil, err
	}
	if action == "" && changed && !atRest(old) {
		action = api.ActionVMChange
	}
	e, err := r.store(c, &st.vm)
	if err == nil && grows(old, &st.vm) {
		err = c.admit(e)
	}
	if err == nil && !slices.Equal(old.Spec.ExtraArgs, st.vm.Spec.ExtraArgs) {
		e.changed = "spec.extraArgs: " + argNames(st.vm.Spec.ExtraArgs)
	}
	if err != nil || action == "" {
		return e, err
	}
	e.task, err = c.vmTask(st, action)
	return e, err
}

// grows reports whether a change makes a VM take memory that it did not take.
func grows(old, vm *api.VM) bool {
	down := func(p api.PowerState) bool { return p == api.PowerStopped || p == api.PowerSuspended }
	return !down(vm.Spec.Power) && (down(old.Spec.Power) || vm.Spec.Memory > old.Spec.Memory)
}

// wish moves the VM to a power state and returns the action that this is, or
// "" when it is there already.
func (c *change) wish(st *vmState, power api.PowerState, force bool) (api.Action, error) {
	old := st.vm.Spec.Power
	switch {
	case power == api.PowerSuspended && old != power:
		return "", api.Invalid("spec.power", "is changed to suspended by POST %svms/%s/suspend only", base, st.vm.Meta.Name)
	case old == api.PowerSuspended && power == api.PowerStopped:
		return "", errSuspended(&st.vm, "it is not stopped")
	case old == api.PowerSuspended && power == api.PowerPaused:
		return "", errSuspended(&st.vm, "it is not paused")
	case power == api.PowerStopped && old == api.PowerStopped && (!force || st.vm.Spec.ForceStop):
		return "", nil
	case power == api.PowerStopped:
		c.wishStopped(st, force)
		return api.ActionVMStop, nil
	case power == old:
		return "", nil
	case power == api.PowerPaused:
		return api.ActionVMPause, c.wishPaused(st)
	case old == api.PowerPaused:
		return api.ActionVMResume, c.wishResumed(st)
	}
	return api.ActionVMStart, c.wishRunning(st)
}

// atRest reports that the VM is neither running nor meant to.
func atRest(vm *api.VM) bool {
	if vm.Spec.Power != api.PowerStopped {
		return false
	}
	switch vm.Status.Phase {
	case api.VMStopped, api.VMCreating, api.VMFailed:
		return vm.Status.PID == 0
	}
	return false
}

// phaseText says what a VM does, for messages.
func phaseText(vm *api.VM) string {
	if vm.Status.Phase == api.VMStopped && vm.Spec.Power != api.PowerStopped {
		return "about to run"
	}
	return string(vm.Status.Phase)
}

// action answers POST /vms/{name}/<verb>.
func (r *vmResource) action(action api.Action) func(*request) error {
	return func(q *request) error {
		var in vmRequest
		body, err := q.optional(&in)
		if err != nil {
			return err
		}
		if in.Force && action != api.ActionVMStop {
			return api.Invalid("force", "has a meaning for stop only")
		}
		if in.DiscardSuspend && action != api.ActionVMStop && action != api.ActionVMStart {
			return api.Invalid("discardSuspend", "has a meaning for start and stop only")
		}
		out, err := q.change(body, func(c *change) (*effect, error) { return r.act(c, action, in.Force, in.DiscardSuspend) })
		if err != nil {
			return err
		}
		return q.answerTask(out)
	}
}

func (r *vmResource) act(c *change, action api.Action, force, discard bool) (*effect, error) {
	vm, err := r.find(c.q, c.v)
	if err != nil {
		return nil, err
	}
	if vm.Meta.Deleting() {
		return nil, api.Errorf(api.CodeRefused, "vm %s is being deleted", vm.Meta.Name)
	}
	st, err := c.load(vm)
	if err != nil {
		return nil, err
	}
	if !force {
		if err := c.idle(&st.vm); err != nil {
			return nil, err
		}
	}
	if err := c.respectSaved(st, action, discard); err != nil {
		return nil, err
	}
	old := api.VM{Spec: st.vm.Spec}
	switch action {
	case api.ActionVMStart:
		err = c.wishRunning(st)
	case api.ActionVMStop:
		c.wishStopped(st, force)
		err = configdb.StayStopped(c.v, c.tx, st.vm.Meta.ID)
	case api.ActionVMPause:
		err = c.wishPaused(st)
	case api.ActionVMResume:
		err = c.wishResumed(st)
	case api.ActionVMReboot:
		err = c.wishReboot(st)
	default:
		err = fmt.Errorf("action %s has no handler", action)
	}
	if err != nil {
		return nil, err
	}
	e, err := r.store(c, &st.vm)
	if err != nil {
		return nil, err
	}
	e.status = http.StatusAccepted
	if e.task, err = c.vmTask(st, action); err == nil && grows(&old, &st.vm) {
		err = c.admit(e)
	}
	return e, err
}

// vmTask adds the task of an action, after the spec was stored: by then the
// generation is the one that carries the wish.
func (c *change) vmTask(st *vmState, action api.Action) (string, error) {
	spec := api.TaskSpec{
		Action: action, TargetKind: api.KindVM, TargetID: st.vm.Meta.ID, Target: st.vm.Meta.Name,
		TargetGeneration: st.vm.Meta.Generation, TargetEpoch: st.binding.Spec.Epoch,
	}
	if action == api.ActionVMReboot {
		spec.TargetReboots = st.vm.Spec.Reboots
	}
	within := vmPowerDeadline
	switch action {
	case api.ActionVMCreate:
		within = vmCreateDeadline
	case api.ActionVMClone:
		within = vmOperationDeadline // it copies disks
	}
	return c.newTask(st.vm.Meta.Project, spec, within)
}

// delete answers DELETE /vms/{name}.
func (r *vmResource) delete(q *request) error {
	force, err := q.boolParam("force")
	if err != nil {
		return err
	}
	cond, err := q.match("If-Match")
	if err != nil {
		return err
	}
	out, err := q.change(nil, func(c *change) (*effect, error) {
		vm, err := r.find(q, c.v)
		if err != nil {
			return nil, err
		}
		if err := cond.check(r.label(&vm.Meta), vm.Meta.Revision); err != nil {
			return nil, err
		}
		st, err := c.load(vm)
		if err != nil {
			return nil, err
		}
		if !force {
			if err := c.idle(&vm); err != nil {
				return nil, err
			}
		}
		switch {
		case atRest(&st.vm):
		case force:
			c.discardSaved(&st.vm)
			st.vm.Spec.Power, st.vm.Spec.ForceStop = api.PowerStopped, true
		case !st.vm.Meta.Deleting() && vm.Spec.Power == api.PowerSuspended:
			return nil, errSuspended(&vm, "it is not removed with the memory of its guest")
		case !st.vm.Meta.Deleting():
			return nil, api.Errorf(api.CodeRefused, "vm %s is %s; stop it first, or force it (--force, ?force=true)", vm.Meta.Name, phaseText(&vm))
		}
		if err := r.markDeleting(c, &st.vm); err != nil {
			return nil, err
		}
		task, err := c.vmTask(st, api.ActionVMDelete)
		return &effect{status: http.StatusAccepted, kind: api.KindVM, id: vm.Meta.ID, task: task, object: &st.vm}, err
	})
	if err != nil {
		return err
	}
	return q.answerTask(out)
}
