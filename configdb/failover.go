// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"errors"
	"strings"

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
// are more to remove. Drills count for
// themselves, so that they push out no losses; the newest of either is never removed: it
// may be under way.
func PruneFailovers(v *View, tx *Txn, most int) (more bool) {
	for _, id := range idsOf(v, FailoverMoves) {
		// The record of the loss goes first, so that one that is begun goes as a whole.
		loss, _, _ := strings.Cut(id, ".")
		if _, there := v.Get(Failovers.SpecKey(loss)); there {
			continue
		}
		if most--; most < 0 {
			return true
		}
		more = true
		tx.Delete(FailoverMoves.SpecKey(id))
		tx.Delete(FailoverMoves.StatusKey(id))
	}
	if more {
		return true
	}
	victim, ok := oldestLoss(v)
	if ok {
		tx.Delete(Failovers.SpecKey(victim))
		tx.Delete(Failovers.StatusKey(victim))
	}
	return ok
}

// oldestLoss is the loss that is removed next; there may be none.
func oldestLoss(v *View) (id string, ok bool) {
	all := idsOf(v, Failovers)
	var losses, drills []string
	for i, id := range all {
		f, err := Failovers.Get(v, id)
		switch {
		case err != nil || f.Spec.Cause != api.CauseDrill:
			losses = append(losses, id)
		case i < len(all)-1:
			drills = append(drills, id)
		}
	}
	switch {
	case len(drills) > api.KeptDrills:
		return drills[0], true
	case len(losses) > api.KeptFailovers, len(losses) > 1 && len(idsOf(v, FailoverMoves)) > api.KeptFailoverMoves:
		return losses[0], true
	}
	return "", false
}

func idsOf[S, T any](v *View, t Table[S, T]) (ids []string) {
	for e := range v.Scan(t.SpecPrefix(), "") {
		id, _ := t.IDOf(e.Key)
		ids = append(ids, id)
	}
	return ids
}
