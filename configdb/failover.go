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
// are more to remove. The newest loss is never removed: it may be under way.
func PruneFailovers(v *View, tx *Txn, most int) (more bool) {
	losses, moves := idsOf(v, Failovers), idsOf(v, FailoverMoves)
	if len(losses) < 2 || len(losses) <= api.KeptFailovers && len(moves) <= api.KeptFailoverMoves {
		return false
	}
	drop := func(specKey, statusKey string) {
		tx.Delete(specKey)
		tx.Delete(statusKey)
	}
	for _, id := range moves {
		// A move's ID begins with that of its loss, so the oldest loss's come first.
		if id >= losses[1] {
			break
		}
		if most--; most < 0 {
			return true
		}
		drop(FailoverMoves.SpecKey(id), FailoverMoves.StatusKey(id))
	}
	drop(Failovers.SpecKey(losses[0]), Failovers.StatusKey(losses[0]))
	return true
}

func idsOf[S, T any](v *View, t Table[S, T]) (ids []string) {
	for e := range v.Scan(t.SpecPrefix(), "") {
		id, _ := t.IDOf(e.Key)
		ids = append(ids, id)
	}
	return ids
}
