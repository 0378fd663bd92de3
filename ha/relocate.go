// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/ha/plan"
	"github.com/muster-vm/muster/reconcile"
)

// This file is the leader's part of "A start that fails", DESIGN.md: a VM that
// its owner gave up gets another node.

const (
	// givenUpVMs is the name under which these are looked at.
	givenUpVMs = "given up"
	// roundPause is the wait after all nodes gave a VM up; it doubles with every
	// round, up to roundPauseMost.
	roundPause     = time.Minute
	roundPauseMost = 15 * time.Minute
	// relocateMost is how many VMs one look moves.
	relocateMost = 64
)

// givenUp names this work if a VM's status says that its owner gave it up.
func givenUp(v *configdb.View, c configdb.Change) []string {
	id, _ := configdb.VMs.IDOf(c.Key)
	vm, err := configdb.VMs.Get(v, id)
	if err != nil || vm.Status.Tries == nil || !vm.Status.Tries.GivenUp {
		return nil
	}
	return []string{givenUpVMs}
}

// pauseOf is how long a VM rests before it goes to another node.
func pauseOf(t *api.VMTries) time.Duration {
	if t.Rounds == 0 {
		return 0
	}
	return min(roundPause<<min(t.Rounds-1, 8), roundPauseMost)
}

// relocate gives each VM that was given up another node, one after the other, on
// the state that the one before left.
func (s *Service) relocate(ctx context.Context, term uint64) (reconcile.Result, error) {
	done := map[string]bool{}
	for range relocateMost {
		state, err := plan.Read(s.db.Local())
		if err != nil {
			s.log.Error("what cannot be read is not moved on", "err", err)
		}
		b, wait := nextGivenUp(state, done, time.Now())
		if b == nil {
			return reconcile.Result{After: wait}, nil
		}
		done[b.Meta.ID] = true
		rev, err := s.relocateOne(ctx, term, state, b)
		if errors.Is(err, configdb.ErrConflict) {
			return reconcile.Result{After: recoverSoon}, nil // the state moved on
		}
		if err != nil {
			return reconcile.Result{}, err
		}
		if _, err := s.db.WaitRevision(ctx, rev); err != nil {
			return reconcile.Result{}, err
		}
	}
	return reconcile.Result{After: recoverSoon}, nil
}

// nextGivenUp is a VM that was given up and has rested, and else how long until
// one has; 0 if there is none.
func nextGivenUp(state *plan.State, done map[string]bool, now time.Time) (next *api.Binding, wait time.Duration) {
	for i := range state.Bindings {
		b := &state.Bindings[i]
		vm, owner := state.VMs[b.Meta.ID], state.Nodes[b.Spec.NodeID]
		if done[b.Meta.ID] || !api.GivenUp(vm, b.Spec.Epoch) || !plan.WantsRun(vm) || owner.Status.Phase != api.NodeReady {
			continue // those of lost nodes are recovered
		}
		t := vm.Status.Tries
		rest := time.Duration(0)
		if t.At != nil {
			// The owner's clock may be wrong; it decides only how soon.
			rest = min(t.At.Add(pauseOf(t)).Sub(now), pauseOf(t))
		}
		if rest <= 0 {
			return b, 0
		}
		if wait == 0 || rest < wait {
			wait = rest
		}
	}
	return nil, wait
}

// relocateOne moves one VM, or lets its owner try again if no other node fits.
func (s *Service) relocateOne(ctx context.Context, term uint64, state *plan.State, b *api.Binding) (uint64, error) {
	fleet, err := s.placer.Load(state)
	if err != nil {
		return 0, err
	}
	for id, why := range s.silent() {
		fleet.Avoid(id, why)
	}
	c := &lossCase{vm: state.VMs[b.Meta.ID].Clone(), binding: *b, node: *state.Nodes[b.Spec.NodeID]}
	tries := api.TriesOf(&c.vm, b.Spec.Epoch)
	exclude := map[string]string{b.Spec.NodeID: "gave it up"}
	for _, id := range tries.Nodes {
		exclude[id] = "gave it up"
	}
	cold := plan.Cold(&c.vm)
	nodeID, node, none := fleet.Choose(&cold, exclude, false)
	tx := &configdb.Txn{Actor: Actor}
	c.requireGivenUp(tx, term)
	switch {
	case tries.Drill:
		err = c.passDrill(state.View, tx, term, fleet, nodeID, node, none)
	case none != nil:
		tries.GivenUp, tries.Failed, tries.Nodes = false, 0, nil
		tries.Rounds++
		c.vm.Status.Tries = &tries
		c.vm.Status.Message = fmt.Sprintf("no other node can start it either; node %s tries again: %v", b.Spec.Node, none)
		err = configdb.VMs.UpdateStatus(state.View, tx, &c.vm)
	default:
		message := fmt.Sprintf("moved on from node %s, which could not start it: %s", c.node.Meta.Name, c.vm.Status.Message)
		next := api.VMTries{Epoch: c.binding.Spec.Epoch + 1, Generation: c.vm.Meta.Generation, Nodes: tries.Nodes, Rounds: tries.Rounds}
		c.binding.Spec.RecoveredFrom = c.binding.Spec.Recovered(nil, nodeID)
		err = errors.Join(c.passOn(state.View, tx, &next, nodeID, node, message), fleet.Reserve(tx, nodeID))
	}
	if err != nil {
		return 0, err
	}
	rev, err := s.db.Txn(ctx, tx)
	if err == nil {
		s.log.Warn("vm that its node gave up", "vm", c.vm.Meta.Name, "from", b.Spec.Node, "to", node, "none", none, "round", tries.Rounds, "rev", rev)
	}
	return rev, err
}

// requireGivenUp makes a transaction valid only while the owner's word stands: a
// start that it begins changes the status, and a new wish changes the spec.
func (c *lossCase) requireGivenUp(tx *configdb.Txn, term uint64) {
	tx.RequireTerm(term)
	tx.RequireRevision(configdb.VMs.StatusKey(c.vm.Meta.ID), c.vm.Meta.StatusRevision)
	tx.RequireRevision(configdb.VMs.SpecKey(c.vm.Meta.ID), c.vm.Meta.Revision)
	tx.RequireRevision(configdb.Bindings.SpecKey(c.vm.Meta.ID), c.binding.Meta.Revision)
	tx.RequireRevision(configdb.Operations.SpecKey(c.vm.Meta.ID), 0)
}

// passOn binds the VM to a node that has not given it up.
func (c *lossCase) passOn(v *configdb.View, tx *configdb.Txn, next *api.VMTries, nodeID, node, message string) error {
	if err := c.bind(v, tx, nodeID, node, message); err != nil {
		return err
	}
	c.vm.Status.Tries = next
	return configdb.VMs.UpdateStatus(v, tx, &c.vm)
}
