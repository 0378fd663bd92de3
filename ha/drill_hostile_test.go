// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// evidence writes losses, each with so many moves of VMs, and then drills.
func (w *world) evidence(losses, moves, drills int) {
	w.t.Helper()
	b := w.bindingOn(3)
	vm, err := configdb.VMs.Get(w.mem.Local(), b.Meta.ID)
	must(w.t, err)
	put := func(id string, cause api.FailoverCause, moves int) {
		for from := 0; from < moves; from += 400 {
			w.change(func(_ *configdb.View, tx *configdb.Txn) error {
				for i := from; i < min(moves, from+400); i++ {
					other := vm.Clone()
					other.Meta.ID = fmt.Sprintf("vm-%05d", i)
					m := api.NewFailoverMove(id, &other, time.Now())
					if err := configdb.FailoverMoves.CreateUnnamed(tx, &m); err != nil {
						return err
					}
				}
				return nil
			})
		}
		w.change(func(_ *configdb.View, tx *configdb.Txn) error {
			f := api.NewFailover(&api.Node{Meta: api.Meta{ID: w.nodes[3].id}}, cause, time.Now())
			f.Meta.ID = id
			return configdb.Failovers.CreateUnnamed(tx, &f)
		})
	}
	for i := range losses {
		put(fmt.Sprintf("a-loss-%03d", i), api.CauseLease, moves)
	}
	for i := range drills {
		put(fmt.Sprintf("b-drill-%03d", i), api.CauseDrill, 1)
	}
	wit := &witness{db: w.mem, term: 1, now: time.Now, open: map[string]map[string]bool{}}
	must(w.t, wit.prune(context.Background()))
}

func TestDrillsPushOutNoLossesByTheirNumber(t *testing.T) {
	w := chaosFree(t)
	w.evidence(api.KeptFailovers-10, 1, api.KeptDrills)
	if _, err := configdb.Failovers.Get(w.mem.Local(), "a-loss-000"); err != nil {
		t.Errorf("%d losses and %d drills: the oldest loss is gone: %v", api.KeptFailovers-10, api.KeptDrills, err)
	}
}

func TestADrillPushesOutNoGreatLoss(t *testing.T) {
	w := chaosFree(t)
	w.evidence(1, api.KeptFailoverMoves+1, 1)
	if _, err := configdb.Failovers.Get(w.mem.Local(), "a-loss-000"); err != nil {
		t.Errorf("one drill removed the evidence of the loss of a great node: %v", err)
	}
}

// What is begun to be removed goes as a whole.
func TestAGreatLossGoesAsAWhole(t *testing.T) {
	w := chaosFree(t)
	w.evidence(2, api.KeptFailoverMoves/2+100, 0)
	moves, err := configdb.FailoverMoves.List(w.mem.Local())
	must(t, err)
	if len(moves) != api.KeptFailoverMoves/2+100 || moves[0].Spec.FailoverID != "a-loss-001" {
		t.Errorf("%d moves are left, the first of %s", len(moves), moves[0].Spec.FailoverID)
	}
}
