// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/rest"
)

// forecaster says what reboots would do: it lets the evacuation work on a copy of the
// database, in which every migration succeeds and every guest obeys.
type forecaster struct{ placer rest.Placer }

// scratch is a copy of the database. One goroutine uses it; preconditions hold.
type scratch struct {
	configdb.DB // nil: an evacuation needs nothing else
	view        *configdb.View
}

// Local implements configdb.DB.
func (s *scratch) Local() *configdb.View { return s.view }

// Txn implements configdb.DB.
func (s *scratch) Txn(ctx context.Context, tx *configdb.Txn) (uint64, error) {
	s.view = tx.Seen(s.view)
	return s.view.Revision(), ctx.Err()
}

// Forecast implements rest.Forecaster.
func (f forecaster) Forecast(ctx context.Context, v *configdb.View, nodes []api.Node, in api.EvacuateRequest, noEvacuate bool) ([]api.PlannedReboot, error) {
	db := &scratch{view: v}
	e := newEvacuation(db, f.placer, 0, slog.New(slog.DiscardHandler))
	var out []api.PlannedReboot
	for i := range nodes {
		p, err := e.forecast(ctx, db, nodes[i], in, noEvacuate)
		if err != nil {
			return nil, fmt.Errorf("forecast the evacuation of node %s: %w", nodes[i].Meta.Name, err)
		}
		out = append(out, p)
	}
	return out, nil
}

// forecast empties one node, and lets it be back.
func (e *evacuation) forecast(ctx context.Context, db *scratch, n api.Node, in api.EvacuateRequest, noEvacuate bool) (api.PlannedReboot, error) {
	id, out := n.Meta.ID, api.PlannedReboot{Node: n.Meta.Name}
	before, err := vmsLeftOn(db.view, id)
	if err != nil {
		return out, err
	}
	ev := api.Evacuation{
		Meta:   api.NewMeta(api.KindEvacuation, "", n.Meta.Name),
		Spec:   api.EvacuationSpec{Node: n.Meta.Name, Level: in.Level, Parallel: api.MaxEvacuations, MoveStopped: in.MoveStopped, Stay: noEvacuate, LeaveStopped: true},
		Status: api.EvacuationStatus{Phase: api.TaskPending},
	}
	ev.Meta.ID = id
	tx := &configdb.Txn{}
	was := n.Spec.Maintenance
	n.Spec.Maintenance = true
	if err := errors.Join(configdb.Nodes.UpdateSpec(db.view, tx, &n), configdb.Evacuations.CreateUnnamed(tx, &ev)); err != nil {
		return out, err
	}
	if _, err := db.Txn(ctx, tx); err != nil {
		return out, err
	}
	reasons, shut := e.of(&ev).reasons, map[string]bool{}
	for last := (*configdb.View)(nil); last != db.view && !ev.Status.Phase.Final(); { // or what is left is on its way
		last = db.view
		if err := e.step(ctx, &ev); err != nil {
			return out, err
		}
		if ev, err = configdb.Evacuations.Get(db.view, id); err != nil {
			return out, err
		}
		for _, vm := range ev.Status.Stopped {
			shut[vm] = true
		}
		if err := obey(ctx, db); err != nil {
			return out, err
		}
	}
	after, err := vmsLeftOn(db.view, id)
	if err != nil {
		return out, err
	}
	unsettled := func(g guest) bool { return g.vm.Meta.Deleting() || changing(&g.vm) }
	out.Refusal = staying(slices.DeleteFunc(after, unsettled))
	for i := range before {
		g := &before[i]
		vm := g.vm.Meta.ID
		b, err := configdb.Bindings.Get(db.view, vm)
		if err != nil {
			return out, err
		}
		p := api.PlannedVM{VM: g.vm.Meta.Name, To: b.Spec.Node, Fate: api.FateStay, Reason: reasons[vm]}
		switch {
		case unsettled(*g):
			p.Reason = "it is on its way to another state, and looked at when that is over"
		case shut[vm]:
			p.Fate = api.FateRestart
		case b.Spec.NodeID != id && atRest(&g.vm):
			p.Fate = api.FateMove
		case b.Spec.NodeID != id:
			p.Fate = api.FateMigrate
		}
		out.VMs = append(out.VMs, p)
	}
	return out, e.back(ctx, db, n, &ev, was)
}

// back is the node as its reboot leaves it.
func (e *evacuation) back(ctx context.Context, db *scratch, n api.Node, ev *api.Evacuation, maintenance bool) error {
	tx := &configdb.Txn{}
	configdb.Evacuations.DeleteUnnamed(tx, ev)
	n.Spec.Maintenance = maintenance
	if err := configdb.Nodes.UpdateSpec(db.view, tx, &n); err != nil {
		return err
	}
	for _, id := range ev.Status.Stopped {
		s, err := shutDownVM(db.view, tx, id)
		if err == nil && !s.over {
			err = s.start(db.view, tx, e.placer)
		}
		if err != nil {
			return err
		}
	}
	if _, err := db.Txn(ctx, tx); err != nil {
		return err
	}
	return obey(ctx, db)
}

// obey is what nodes and guests do: what moves arrives, and what is to run or not is so.
func obey(ctx context.Context, db *scratch) error {
	tx := &configdb.Txn{}
	v := db.view
	ops, err := configdb.Operations.List(v)
	if err != nil {
		return err
	}
	for i := range ops {
		op := &ops[i]
		b, err := configdb.Bindings.Get(v, op.Meta.ID)
		if err != nil {
			continue // of a volume that no VM has
		}
		switch s := &op.Spec; {
		case s.Migration != nil:
			b.Spec.NodeID, b.Spec.Node = s.Migration.NodeID, s.Migration.Node
		case s.Move != nil:
			b.Spec.NodeID, b.Spec.Node = s.NodeID, s.Move.Node
		}
		b.Spec.Epoch++
		configdb.Operations.DeleteUnnamed(tx, op)
		tx.Delete(configdb.Arrivals.SpecKey(op.Meta.ID))
		if err := configdb.Bindings.UpdateSpec(v, tx, &b); err != nil {
			return err
		}
	}
	v = tx.Seen(v)
	vms, err := configdb.VMs.List(v)
	if err != nil {
		return err
	}
	for i := range vms {
		vm := &vms[i]
		b, err := configdb.Bindings.Get(v, vm.Meta.ID)
		s := &vm.Status
		told := s.ObservedGeneration != vm.Meta.Generation
		if err != nil || !told && s.Epoch == b.Spec.Epoch {
			continue
		}
		s.ObservedGeneration, s.Epoch, s.Node = vm.Meta.Generation, b.Spec.Epoch, b.Spec.Node
		switch {
		case !told: // it has moved
		case vm.Spec.Power == api.PowerStopped:
			s.Phase, s.PID, s.Hardware = api.VMStopped, 0, nil
		case vm.Spec.Power == api.PowerRunning:
			s.Phase, s.PID = api.VMRunning, max(1, s.PID)
			if s.Hardware == nil {
				s.Hardware = vm.Spec.Hardware()
			}
		}
		if err := configdb.VMs.UpdateStatus(v, tx, vm); err != nil {
			return err
		}
	}
	if !tx.Empty() {
		_, err = db.Txn(ctx, tx)
	}
	return errors.Join(err, ctx.Err())
}
