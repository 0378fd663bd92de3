// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/reconcile"
)

// This file keeps the evidence of losses. What it writes decides nothing: it
// goes into the transactions that decide, so that neither is there without the
// other.

// pruneBatch is how many old moves one transaction removes.
const pruneBatch = 64

// leaseRules are the times that this build goes by.
func leaseRules() api.LeaseRules {
	return api.LeaseRules{
		LeaseMillis: LeaseDuration.Milliseconds(), DriftPerMille: driftPerMille,
		KillMillis: KillTime.Milliseconds(), MarginMillis: Margin.Milliseconds(),
	}
}

// noteLoss adds the evidence of a loss to the transaction that declares it.
func (s *Service) noteLoss(tx *configdb.Txn, term uint64, n *api.Node, f api.Failover) error {
	n.Status.Failover = f.Meta.ID
	return s.sign(tx, term, &f)
}

// sign adds evidence to a transaction, with who decided and by which rules.
func (s *Service) sign(tx *configdb.Txn, term uint64, f *api.Failover) error {
	f.Spec.LeaderID, f.Spec.Leader, f.Spec.Term, f.Spec.Rules = s.nodeID, s.name, term, leaseRules()
	return configdb.Failovers.CreateUnnamed(tx, f)
}

// noteFence adds the evidence of a fence to the transaction that puts it in force.
func (s *Service) noteFence(tx *configdb.Txn, term uint64, n *api.Node, fence *api.StorageFence, quiet time.Duration) error {
	f := api.NewFailover(n, api.CauseStorage, *fence.InForceAt)
	f.Spec.SilentMillis, f.Spec.Since = quiet.Milliseconds(), api.SinceGrant
	f.Spec.Storage = &api.FailoverStorage{
		Fence: fence.ID, PoolID: fence.PoolID, Pool: fence.Pool, BeganAt: fence.BeganAt, EndedAt: *fence.InForceAt,
		Epoch: fence.Epoch, Addresses: fence.Addresses, Owners: fence.Owners,
	}
	fence.Failover = f.Meta.ID
	return s.sign(tx, term, &f)
}

// noteReturnOf adds to the transaction that readmits a node that it did.
func noteReturnOf(v *configdb.View, tx *configdb.Txn, term uint64, n *api.Node) error {
	id := n.Status.Failover
	n.Status.Failover = ""
	return noteReturn(v, tx, term, id)
}

// noteReturn adds that the node of a loss is back. term is 0 if the node says so.
func noteReturn(v *configdb.View, tx *configdb.Txn, term uint64, id string) error {
	if id == "" {
		return nil // of a build that kept no evidence
	}
	f, err := configdb.Failovers.Get(v, id)
	if err != nil {
		return api.IgnoreNotFound(err)
	}
	now := time.Now().UTC()
	f.Status.ReadmittedAt, f.Status.ReadmittedTerm = &now, term
	return configdb.Failovers.UpdateStatus(v, tx, &f)
}

// noteMove adds the evidence of a move to the transaction of the move.
func (c *lossCase) noteMove(tx *configdb.Txn, term uint64, from api.Binding, outcome api.HAOutcome) error {
	loss, pools := c.node.Status.Failover, from.Spec.Guarding()
	if len(pools) > 0 {
		f, _ := c.node.Status.FenceOf(pools[0])
		loss = f.Failover
	}
	if loss == "" {
		return nil
	}
	m := api.NewFailoverMove(loss, &c.vm, time.Now())
	m.Spec.Pools = pools
	m.Spec.Outcome, m.Spec.Term = outcome, term
	m.Spec.FromNodeID, m.Spec.FromEpoch = from.Spec.NodeID, from.Spec.Epoch
	m.Spec.NodeID, m.Spec.Node, m.Spec.Epoch = c.binding.Spec.NodeID, c.binding.Spec.Node, c.binding.Spec.Epoch
	return configdb.FailoverMoves.CreateUnnamed(tx, &m)
}

// witness completes the evidence: it notes when a moved VM runs, and removes
// what is too old. It belongs to one term.
type witness struct {
	db   configdb.DB
	term uint64
	now  func() time.Time

	mu   sync.Mutex
	open map[string]map[string]bool // moves that are not final, by VM
}

// prune is the name under which the witness looks for what is too old.
const prune = "prune"

// newWitness returns the loop of the witness of a term.
func (s *Service) newWitness(term uint64) *reconcile.Loop {
	w := &witness{db: s.db, term: term, now: time.Now, open: map[string]map[string]bool{}}
	return reconcile.New(reconcile.Config{
		Name: "ha-evidence", DB: s.db, Log: s.log, Workers: 1,
		Sources: []reconcile.Source{
			{Prefix: configdb.FailoverMoves.SpecPrefix(), IDs: func(_ *configdb.View, c configdb.Change) []string {
				id, _ := configdb.FailoverMoves.IDOf(c.Key)
				return []string{id}
			}},
			{Prefix: configdb.Failovers.SpecPrefix(), IDs: func(*configdb.View, configdb.Change) []string { return []string{prune} }},
			{Prefix: configdb.VMs.StatusPrefix(), IDs: func(_ *configdb.View, c configdb.Change) []string {
				id, _ := configdb.VMs.IDOf(c.Key)
				return w.openOf(id)
			}},
		},
		Reconcile: func(ctx context.Context, id string) (reconcile.Result, error) {
			if id == prune {
				return reconcile.Result{}, w.prune(ctx)
			}
			return reconcile.Result{}, w.look(ctx, id)
		},
	})
}

func (w *witness) openOf(vmID string) (ids []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for id := range w.open[vmID] {
		ids = append(ids, id)
	}
	return ids
}

func (w *witness) setOpen(vmID, id string, open bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case open && w.open[vmID] == nil:
		w.open[vmID] = map[string]bool{id: true}
	case open:
		w.open[vmID][id] = true
	default:
		delete(w.open[vmID], id)
		if len(w.open[vmID]) == 0 {
			delete(w.open, vmID)
		}
	}
}

// look writes down what became of one move.
func (w *witness) look(ctx context.Context, id string) error {
	_, err := configdb.Transact(ctx, w.db, Actor, 4, func(v *configdb.View, tx *configdb.Txn) error {
		m, err := configdb.FailoverMoves.Get(v, id)
		if err != nil {
			return api.IgnoreNotFound(err)
		}
		// Open before the look: a change that comes meanwhile leads to another one.
		w.setOpen(m.Spec.VMID, id, !m.Status.Phase.Final())
		if m.Status.Phase.Final() {
			return nil
		}
		now, err := seen(v, &m, w.now())
		if err != nil || now.Phase == m.Status.Phase && now.Message == m.Status.Message {
			return err
		}
		tx.RequireTerm(w.term)
		m.Status = now
		w.setOpen(m.Spec.VMID, id, !now.Phase.Final())
		return configdb.FailoverMoves.UpdateStatus(v, tx, &m)
	})
	return err
}

// seen is what the state says of a moved VM.
func seen(v *configdb.View, m *api.FailoverMove, at time.Time) (api.FailoverMoveStatus, error) {
	at = at.UTC()
	s := api.FailoverMoveStatus{At: &at}
	vm, err := configdb.VMs.Get(v, m.Spec.VMID)
	if err == nil {
		var b api.Binding
		if b, err = configdb.Bindings.Get(v, m.Spec.VMID); err == nil {
			s.Epoch = vm.Status.Epoch
			switch {
			case vm.Status.Epoch == m.Spec.Epoch && vm.Status.Phase == api.VMRunning:
				s.Phase, s.StartedAt = api.MoveRunning, vm.Status.StartedAt
			case b.Spec.Epoch != m.Spec.Epoch:
				s.Phase, s.Message = api.MoveSuperseded, "bound to "+b.Spec.Node+" since"
			case m.Spec.Outcome == api.HAMoves, vm.Spec.Power == api.PowerStopped, vm.Spec.Power == api.PowerSuspended:
				s.Phase = api.MoveStopped
			case vm.Status.Epoch == m.Spec.Epoch && vm.Status.Phase == api.VMFailed:
				s.Phase, s.Message = api.MoveFailing, vm.Status.Message
			default:
				s.Phase = api.MoveBound
			}
			return s, nil
		}
	}
	if api.CodeOf(err) == api.CodeNotFound {
		s.Phase = api.MoveGone
		return s, nil
	}
	return s, err
}

// prune removes the oldest losses with their moves, beyond what is kept.
func (w *witness) prune(ctx context.Context) error {
	for {
		tx := &configdb.Txn{Actor: Actor}
		tx.RequireTerm(w.term)
		if !configdb.PruneFailovers(w.db.Local(), tx, pruneBatch) {
			return nil
		}
		rev, err := w.db.Txn(ctx, tx)
		if err == nil {
			_, err = w.db.WaitRevision(ctx, rev)
		}
		if err != nil {
			return err
		}
	}
}
