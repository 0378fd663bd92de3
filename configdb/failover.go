// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"errors"

	"github.com/muster-vm/muster/api"
)

// ProofOf collects what is kept of a loss of a node.
func ProofOf(v *View, f api.Failover) (*api.FailoverProof, error) {
	p := &api.FailoverProof{Failover: f, Moves: []api.FailoverMove{}, Bindings: []api.Binding{}, Revision: v.Revision()}
	all, err := FailoverMoves.List(v)
	errs := []error{err}
	moved := map[string]bool{}
	for i := range all {
		if all[i].Spec.FailoverID == f.Meta.ID {
			p.Moves = append(p.Moves, all[i])
			moved[all[i].Spec.VMID] = true
		}
	}
	for i := range all {
		if all[i].Spec.FailoverID != f.Meta.ID && moved[all[i].Spec.VMID] {
			p.Others = append(p.Others, all[i])
		}
	}
	for i := range p.Moves {
		b, err := Bindings.Get(v, p.Moves[i].Spec.VMID)
		if err == nil {
			p.Bindings = append(p.Bindings, b)
		}
		errs = append(errs, api.IgnoreNotFound(err))
	}
	return p, errors.Join(errs...)
}

// PruneFailovers fills a transaction with the removal of the oldest losses, with
// their moves, beyond what is kept: at most so many records. more says that there
// are more to remove. Drills go first, so that they push out no other losses; the
// newest loss is never removed: it may be under way.
func PruneFailovers(v *View, tx *Txn, most int) (more bool) {
	victim, ok := oldestLoss(v)
	if !ok {
		return false
	}
	drop := func(specKey, statusKey string) {
		tx.Delete(specKey)
		tx.Delete(statusKey)
	}
	prefix := FailoverMoves.SpecPrefix() + api.FailoverMoveID(victim, "")
	for e := range v.Scan(prefix, "") {
		if most--; most < 0 {
			return true
		}
		id, _ := FailoverMoves.IDOf(e.Key)
		drop(FailoverMoves.SpecKey(id), FailoverMoves.StatusKey(id))
	}
	drop(Failovers.SpecKey(victim), Failovers.StatusKey(victim))
	return true
}

// oldestLoss is the loss that is removed next; there may be none.
func oldestLoss(v *View) (id string, ok bool) {
	losses := idsOf(v, Failovers)
	if len(losses) < 2 {
		return "", false
	}
	var drills []string
	for _, id := range losses[:len(losses)-1] {
		if f, err := Failovers.Get(v, id); err == nil && f.Spec.Cause == api.CauseDrill {
			drills = append(drills, id)
		}
	}
	if len(drills) > api.KeptDrills {
		return drills[0], true
	}
	return losses[0], len(losses) > api.KeptFailovers || len(idsOf(v, FailoverMoves)) > api.KeptFailoverMoves
}

func idsOf[S, T any](v *View, t Table[S, T]) (ids []string) {
	for e := range v.Scan(t.SpecPrefix(), "") {
		id, _ := t.IDOf(e.Key)
		ids = append(ids, id)
	}
	return ids
}
