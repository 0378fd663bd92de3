// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/ha/plan"
	"github.com/muster-vm/muster/reconcile"
)

// Limits of one look at lost nodes.
const (
	// recoverBatch is how many VMs one transaction moves: enough that all of a host have
	// a place before the first ones take the processors with their starts.
	recoverBatch = 64
	// recoverRounds is how many transactions follow each other before others have
	// their turn.
	recoverRounds = 64
	// reservedOps is what the reservation of memory on one node adds to it.
	reservedOps = 3
	// recoverSoon is when the rest is looked at.
	recoverSoon = 200 * time.Millisecond
)

// recover takes the plan for the VMs of lost nodes and carries out what is due,
// in its order. A conflict means that the state moved on: the plan is made anew, and
// one VM at a time, then two, four, …, so that one that keeps changing holds up no
// other, and one that changed once does not make a hundred wait for each other.
func (s *Service) recover(ctx context.Context, term uint64) (reconcile.Result, error) {
	most := recoverBatch
	for range recoverRounds {
		if s.gathering() {
			return reconcile.Result{After: recoverSoon}, nil
		}
		again, waits, err := s.recoverSome(ctx, term, most)
		var c *configdb.ConflictError
		switch {
		case errors.As(err, &c) && c.Precondition.Check != fsm.CheckTerm && most > 1:
			most = 1
			if _, err := s.db.WaitRevision(ctx, c.Revision); err != nil {
				return reconcile.Result{}, err
			}
		case err != nil:
			return reconcile.Result{}, err
		case !again && waits:
			return reconcile.Result{After: recoverRetry}, nil
		case !again:
			return reconcile.Result{}, nil
		default:
			most = min(2*most, recoverBatch)
		}
	}
	return reconcile.Result{After: recoverSoon}, nil
}

// recoverSome carries out the first steps of the plan that change anything.
// again says that there may be more to do, waits that a VM has no place.
func (s *Service) recoverSome(ctx context.Context, term uint64, most int) (again, waits bool, err error) {
	state, err := plan.Read(s.db.Local())
	if err != nil {
		s.log.Error("what cannot be read is not recovered", "err", err)
	}
	if !state.AnyGone() {
		return false, false, nil
	}
	fleet, err := s.placer.Load(state)
	if err != nil {
		return false, false, err
	}
	p := plan.Make(state, fleet, plan.Options{Avoid: s.silent()})
	tx := &configdb.Txn{Actor: Actor}
	targets := map[string]bool{}
	var done []plan.Step
	for _, st := range p.Steps {
		if len(done) == most {
			break
		}
		changed, err := addStep(state.View, tx, term, st, targets)
		if errors.Is(err, configdb.ErrPartTooLarge) && len(done) > 0 {
			break // in the next transaction
		}
		if err != nil {
			s.log.Error("a lost node's vm is left alone", "vm", st.VM.Meta.Name, "err", err)
			waits = true
			continue
		}
		waits = waits || st.Outcome == api.HARefused || st.Err != nil
		if changed {
			done = append(done, st)
		}
	}
	for id := range targets {
		if err := fleet.Reserve(tx, id); err != nil {
			return false, false, err
		}
	}
	if tx.Empty() {
		return false, waits, nil
	}
	rev, err := s.db.Txn(ctx, tx)
	if err != nil {
		return false, waits, err
	}
	for _, st := range done {
		level := slog.LevelInfo
		if st.Outcome == api.HARefused {
			level = slog.LevelWarn
		}
		s.log.Log(ctx, level, "lost node's vm handled", "vm", st.VM.Meta.Name, "from", st.From.Meta.Name, "outcome", st.Outcome,
			"to", st.Node, "reason", st.Err, "rev", rev)
	}
	return true, waits, nil
}

// addStep adds one step to a transaction, unless it was taken before, and notes
// the node that takes memory by it.
func addStep(v *configdb.View, tx *configdb.Txn, term uint64, st plan.Step, targets map[string]bool) (changed bool, err error) {
	part := tx.Part()
	c := &lossCase{vm: st.VM.Clone(), binding: *st.Binding, node: *st.From}
	switch st.Outcome {
	case api.HARestarts, api.HAMoves:
		err = c.move(v, part, term, st.Outcome, st.NodeID, st.Node)
	case api.HARefused:
		err = c.explain(v, part, term, st.Err)
	case api.HAWaits, api.HAStays:
		switch {
		case st.Err != nil:
			err = c.awaitFence(v, part, term)
		case !st.Binding.Spec.Protected:
			err = c.markUnknown(v, part, term)
		}
	}
	if err != nil || part.Empty() {
		return false, err
	}
	if err := tx.Join(part, recoverBatch*reservedOps); err != nil {
		return false, err
	}
	if st.Outcome == api.HARestarts {
		targets[st.NodeID] = true
	}
	return true, nil
}

// lossCase is one VM on one lost node, as of one view.
type lossCase struct {
	vm      api.VM
	binding api.Binding
	node    api.Node
}

// require makes a transaction valid only for exactly the case that was read:
// above all, only while the node is still lost, or locked out.
func (c *lossCase) require(tx *configdb.Txn, term uint64) {
	tx.RequireTerm(term)
	tx.RequireRevision(configdb.Nodes.StatusKey(c.node.Meta.ID), c.node.Meta.StatusRevision)
	tx.RequireRevision(configdb.LaterLifeKey(c.node.Meta.ID), 0)
	tx.RequireRevision(configdb.Bindings.SpecKey(c.vm.Meta.ID), c.binding.Meta.Revision)
	tx.RequireRevision(configdb.VMs.SpecKey(c.vm.Meta.ID), c.vm.Meta.Revision)
}

// move binds the VM of a lost node to another one.
func (c *lossCase) move(v *configdb.View, tx *configdb.Txn, term uint64, outcome api.HAOutcome, nodeID, node string) error {
	c.require(tx, term)
	from := c.binding
	c.binding.Spec.RecoveredFrom = from.Spec.Recovered(&c.node, nodeID)
	if err := c.bind(v, tx, nodeID, node, c.why()); err != nil {
		return err
	}
	if err := c.noteMove(tx, term, from, outcome); err != nil {
		return err
	}
	if a := c.vm.Spec.StartAfter(); len(a.After) > 0 && c.vm.Spec.Power == api.PowerRunning && !c.vm.Meta.Deleting() {
		c.vm.Status.Awaits = &api.VMAwaits{Epoch: c.binding.Spec.Epoch} // the new owner holds the start back
	}
	return configdb.VMs.UpdateStatus(v, tx, &c.vm)
}

func (c *lossCase) why() string {
	if c.node.Status.Phase != api.NodeLost {
		return fmt.Sprintf("moved from node %s, which fell silent and is locked out of its disks", c.node.Meta.Name)
	}
	return fmt.Sprintf("moved from the lost node %s", c.node.Meta.Name)
}

// bind binds the VM to another node under the next epoch, and makes the status
// that the new owner takes over; the caller writes it.
func (c *lossCase) bind(v *configdb.View, tx *configdb.Txn, nodeID, node, message string) error {
	// The new node must not begin to leave the cluster meanwhile.
	to, _ := v.Get(configdb.Nodes.SpecKey(nodeID))
	tx.RequireRevision(configdb.Nodes.SpecKey(nodeID), to.Revision)
	c.binding.Spec.NodeID, c.binding.Spec.Node = nodeID, node
	c.binding.Spec.Epoch++
	if err := configdb.Bindings.UpdateSpec(v, tx, &c.binding); err != nil {
		return err
	}
	suspended := c.vm.Spec.Power == api.PowerSuspended
	// Whoever raises the epoch hands the status over to the new owner.
	c.vm.Status = api.VMStatus{
		ObservedGeneration: c.vm.Status.ObservedGeneration, RebootsDone: c.vm.Status.RebootsDone,
		Phase: api.VMStopped, Node: node, Epoch: c.binding.Spec.Epoch, Message: message,
		Restarts: c.vm.Status.Restarts,
	}
	if suspended {
		c.vm.Status.Phase = api.VMSuspended
	}
	if !plan.WantsRun(&c.vm) {
		return nil
	}
	c.vm.Status.Phase = api.VMStarting
	after := c.vm.Spec.StartAfter()
	t := api.NewTask(api.ActionVMRecover, api.KindVM, c.vm.Meta, Actor, recoverDeadline+after.Most(), time.Now())
	t.Spec.TargetEpoch = c.binding.Spec.Epoch
	t.Status.Message = message
	return configdb.Tasks.CreateUnnamed(tx, &t)
}

// markUnknown says of an unprotected VM that nobody knows whether it runs. One
// that its owner had reported stopped stays so.
func (c *lossCase) markUnknown(v *configdb.View, tx *configdb.Txn, term uint64) error {
	reportedStopped := (c.vm.Status.Phase == api.VMStopped || c.vm.Status.Phase == api.VMSuspended) && c.vm.Status.Epoch == c.binding.Spec.Epoch &&
		c.vm.Status.ObservedGeneration == c.vm.Meta.Generation
	if reportedStopped || c.vm.Status.Phase == api.VMUnknown {
		return nil
	}
	c.require(tx, term)
	c.vm.Status.Phase = api.VMUnknown
	c.vm.Status.Message = fmt.Sprintf("node %s is lost; the vm is not protected (--ha restart), so it stays bound to that node until it returns", c.node.Meta.Name)
	return configdb.VMs.UpdateStatus(v, tx, &c.vm)
}

// awaitFence says of a guarded VM that its node is lost, and that nobody knows yet
// that it cannot write.
func (c *lossCase) awaitFence(v *configdb.View, tx *configdb.Txn, term uint64) error {
	c.require(tx, term)
	c.vm.Status.Phase = api.VMUnknown
	c.vm.Status.Message = fmt.Sprintf("node %s is lost; the vm may run there until the node is locked out of its pools, and is restarted elsewhere then", c.node.Meta.Name)
	return configdb.VMs.UpdateStatus(v, tx, &c.vm)
}

// explain writes why a protected VM has no place. The condition's time is not
// renewed, so that the same reason is written once.
func (c *lossCase) explain(v *configdb.View, tx *configdb.Txn, term uint64, reason error) error {
	c.require(tx, term)
	c.vm.Status.Phase = api.VMFailed
	is := "lost"
	if c.node.Status.Phase != api.NodeLost {
		is = "silent and locked out of its disks"
	}
	c.vm.Status.Message = fmt.Sprintf("node %s is %s and no other node fits: %v", c.node.Meta.Name, is, reason)
	c.vm.Status.Conditions = api.SetCondition(c.vm.Status.Conditions, api.Condition{
		Type: "Recovered", Reason: "NoNodeFits", Message: c.vm.Status.Message,
	}, time.Now())
	return configdb.VMs.UpdateStatus(v, tx, &c.vm)
}
