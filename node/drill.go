// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/rest"
)

// Times of drills.
const (
	drillEvery = time.Second
	// drillEndWithin is how long the owner has to end the VM, drillRunWithin how long
	// the next one to have it run.
	drillEndWithin = 30 * time.Second
	drillRunWithin = 5 * time.Minute
	// drillMakeUp is how long after its time a drill is still begun.
	drillMakeUp = time.Hour
	// drillScheduleEvery is how often it is looked which VM is due.
	drillScheduleEvery = 10 * time.Second
	driller            = "drill"

	eventDrillSucceeded = "vm.drill-succeeded"
	eventDrillFailed    = "vm.drill-failed"
	eventDrillLeftOut   = "vm.drill-left-out"
)

// drills begins drills when they are due and gives each its last word, while this node
// leads. All that it knows is in the database; see ha/DESIGN.md, "Drills".
type drills struct {
	db      configdb.DB
	placer  rest.Placer
	log     *slog.Logger
	term    uint64
	promise func() (api.HAAdmission, time.Duration, bool)
	silence func(nodeID string) time.Duration
	now     func() time.Time
	looked  time.Time            // at the schedules
	seen    map[string]time.Time // since when, by VM and schedule
	begun   map[string]time.Time // when each drill was first looked at, by task: whoever began it may have another clock
}

func (m *member) drill(ctx context.Context, term uint64) error {
	d := newDrills(m.store, restPlacer{}, term, m.outlook.Promise, m.ha.Silence, m.log.With("module", "drill"))
	return m.again(ctx, drillEvery, d.look, "drills make no progress for now")
}

func newDrills(db configdb.DB, placer rest.Placer, term uint64, promise func() (api.HAAdmission, time.Duration, bool), silence func(string) time.Duration, log *slog.Logger) *drills {
	return &drills{db: db, placer: placer, log: log, term: term, promise: promise, silence: silence, now: time.Now, seen: map[string]time.Time{}, begun: map[string]time.Time{}}
}

// look takes one step of every drill, and begins one at most.
func (d *drills) look(ctx context.Context) error {
	v := d.db.Local()
	all, err := configdb.Drills.List(v)
	if err != nil {
		return err
	}
	last, busy := map[string]*api.Drill{}, false
	for i := range all {
		o := &all[i]
		last[o.Meta.ID] = o
		if !o.Status.Over() {
			busy = true
			err = errors.Join(err, d.step(ctx, v, o))
		}
	}
	if !busy {
		clear(d.begun)
	}
	if busy || err != nil || d.now().Sub(d.looked) < drillScheduleEvery {
		return err
	}
	d.looked = d.now()
	return d.schedule(ctx, v, last)
}

// step gives a drill its last word if that is due.
func (d *drills) step(ctx context.Context, v *configdb.View, o *api.Drill) error {
	vm, err := configdb.VMs.Get(v, o.Meta.ID)
	if err != nil {
		return api.IgnoreNotFound(err) // the drill goes with it
	}
	b, err := configdb.Bindings.Get(v, o.Meta.ID)
	if err != nil {
		return api.IgnoreNotFound(err)
	}
	if o.Status.Epoch != 0 {
		return d.moved(ctx, v, o, &vm, &b)
	}
	if _, ok := d.begun[o.Spec.TaskID]; !ok {
		d.begun[o.Spec.TaskID] = d.now()
	}
	since, late := d.now().Sub(d.begun[o.Spec.TaskID]), ""
	owner, err := configdb.Nodes.Get(v, o.Spec.NodeID)
	switch {
	case api.IgnoreNotFound(err) != nil:
		return err
	case b.Spec.Epoch != o.Spec.Epoch:
		late = fmt.Sprintf("vm %s was bound to node %s by somebody else meanwhile", vm.Meta.Name, b.Spec.Node)
	case vm.Meta.Deleting(), vm.Meta.Generation != o.Spec.Generation:
		late = fmt.Sprintf("vm %s was changed, stopped or deleted meanwhile", vm.Meta.Name)
	case err != nil || owner.Status.Phase != api.NodeReady:
		late = fmt.Sprintf("node %s is not ready any more", o.Spec.Node)
	case o.Spec.Cancel:
		return d.end(ctx, v, o, &vm, api.TaskCancelled, "", "cancelled; vm "+vm.Meta.Name+" stays on node "+o.Spec.Node)
	case o.Status.Refusal != "":
		return d.end(ctx, v, o, &vm, api.TaskFailed, api.CodeUnplaceable, "no other node could take it: "+o.Status.Refusal)
	case o.Status.Ended != nil && !api.GivenUp(&vm, b.Spec.Epoch):
		late = fmt.Sprintf("nobody bound it elsewhere in time; node %s starts it again", o.Spec.Node)
	case o.Status.Ended == nil && since > drillEndWithin:
		late = fmt.Sprintf("node %s did not end it within %d s", o.Spec.Node, int(drillEndWithin.Seconds()))
	default:
		return nil
	}
	return d.end(ctx, v, o, &vm, api.TaskFailed, api.CodeConflict, late)
}

// moved follows a VM that was bound to another node.
func (d *drills) moved(ctx context.Context, v *configdb.View, o *api.Drill, vm *api.VM, b *api.Binding) error {
	at := func() string { return fmt.Sprintf("on node %s", o.Status.Node) }
	switch m, err := configdb.FailoverMoves.Get(v, api.FailoverMoveID(o.Status.Failover, o.Meta.ID)); {
	case api.IgnoreNotFound(err) != nil:
		return err
	case err == nil && m.Status.Phase == api.MoveRunning:
		return d.succeeded(ctx, v, o, vm, m.Status.At)
	case err != nil && vm.Status.Epoch == o.Status.Epoch && vm.Status.Phase == api.VMRunning: // so many drills that the record is gone
		return d.succeeded(ctx, v, o, vm, nil)
	case b.Spec.Epoch != o.Status.Epoch:
		return d.end(ctx, v, o, vm, api.TaskFailed, api.CodeConflict, "it did not run "+at()+" before it was bound to node "+b.Spec.Node)
	case err == nil && m.Status.Phase.Final():
		return d.end(ctx, v, o, vm, api.TaskFailed, api.CodeConflict, "it was stopped before it ran "+at())
	case d.now().Sub(*o.Status.MovedAt) > drillRunWithin:
		return d.end(ctx, v, o, vm, api.TaskFailed, api.CodeTimeout, fmt.Sprintf("it does not run %s after %d minutes: %s", at(), int(drillRunWithin.Minutes()), vm.Status.Message))
	}
	return nil
}

func (d *drills) succeeded(ctx context.Context, v *configdb.View, o *api.Drill, vm *api.VM, at *time.Time) error {
	return d.end(ctx, v, o, vm, api.TaskSucceeded, "", fmt.Sprintf("failed over from node %s to node %s", o.Spec.Node, o.Status.Node), at)
}

// end writes the last word. What the owner gave up for the drill it may start again.
func (d *drills) end(ctx context.Context, v *configdb.View, o *api.Drill, vm *api.VM, phase api.TaskPhase, code api.Code, message string, at ...*time.Time) error {
	tx := d.txn()
	done := d.now().UTC()
	if len(at) > 0 && at[0] != nil {
		done = at[0].UTC()
	}
	s := &o.Status
	if s.PID != 0 && s.Epoch == 0 {
		message += "; its QEMU may have been ended for the drill, and starts again"
	}
	s.Phase, s.Code, s.Message, s.DoneAt = phase, code, message, &done
	if phase == api.TaskSucceeded {
		s.SucceededAt = &done
	}
	if t := vm.Status.Tries; t != nil && t.Drill && t.GivenUp && t.Epoch == o.Spec.Epoch {
		vm.Status.Tries = nil
		if err := configdb.VMs.UpdateStatus(v, tx, vm); err != nil {
			return err
		}
	}
	tx.RequireRevision(configdb.Drills.SpecKey(o.Meta.ID), o.Meta.Revision)
	if err := configdb.Drills.UpdateStatus(v, tx, o); err != nil {
		return err
	}
	typ, severity, text := eventDrillFailed, api.SeverityWarning, fmt.Sprintf("the drill of vm %s failed: %s", vm.Meta.Name, message)
	switch phase {
	case api.TaskSucceeded:
		typ, severity, text = eventDrillSucceeded, api.SeverityInfo, fmt.Sprintf("vm %s was %s in a drill, %.1f s from its end until it ran", vm.Meta.Name, message, s.Took().Seconds())
	case api.TaskCancelled:
		typ, severity, text = eventDrillLeftOut, api.SeverityInfo, fmt.Sprintf("the drill of vm %s was given up: %s", vm.Meta.Name, message)
	}
	return d.commit(ctx, tx, typ, severity, vm, o.Spec.Node, text)
}

func (d *drills) txn() *configdb.Txn {
	tx := &configdb.Txn{Actor: driller}
	tx.RequireTerm(d.term)
	return tx
}

// commit writes with an event. A conflict is looked at anew.
func (d *drills) commit(ctx context.Context, tx *configdb.Txn, typ string, severity api.Severity, vm *api.VM, node, text string) error {
	e := api.NewEvent(typ, severity, api.KindVM, vm.Meta, text, d.now())
	e.Spec.Node = node
	if err := configdb.Events.CreateUnnamed(tx, &e); err != nil {
		return err
	}
	_, err := d.db.Txn(ctx, tx)
	if errors.Is(err, configdb.ErrConflict) {
		return nil
	}
	if err == nil {
		d.log.Info(text, "event", typ)
	}
	return err
}

// schedule begins one drill that is due, or writes down that it was left out.
func (d *drills) schedule(ctx context.Context, v *configdb.View, last map[string]*api.Drill) error {
	vms, err := configdb.VMs.List(v)
	if err != nil {
		return err
	}
	was := d.seen
	d.seen = map[string]time.Time{} // what has another schedule meanwhile begins anew
	began := false
	for i := range vms {
		vm := &vms[i]
		if !vm.Spec.Drilled() || vm.Meta.Deleting() || vm.Spec.Power != api.PowerRunning {
			continue
		}
		s, ok, err := api.ParseDrill(vm.Spec.Recovery.Drill)
		if !ok || err != nil {
			continue // by hand only, or of a later version
		}
		due := s.Last(d.now())
		late := d.now().Sub(due)
		before := s.Last(due.Add(-time.Minute))
		o := last[vm.Meta.ID]
		set := d.wasSet(was, vm, o, before, due) // also of those whose turn is another look
		if began || !set || vm.Status.StartedAt != nil && vm.Status.StartedAt.After(due) || drilledSince(o, due) {
			continue
		}
		if began, err = d.begin(ctx, v, vm, due, late); err != nil {
			return err
		}
	}
	return nil
}

// wasSet reports whether the VM had its schedule when a drill was due: this leader had
// seen it, without a break, or there was a drill under it the time before.
func (d *drills) wasSet(was map[string]time.Time, vm *api.VM, o *api.Drill, before, due time.Time) bool {
	key := vm.Meta.ID + "/" + vm.Spec.Recovery.Drill
	since, ok := was[key]
	if !ok {
		since = d.now()
	}
	d.seen[key] = since
	return !since.After(due) || o != nil && o.Spec.Schedule == vm.Spec.Recovery.Drill && !o.Spec.BegunAt.Before(before)
}

// drilledSince reports whether the drill that was due was begun, or left out; one that a
// person asked for since is as good.
func drilledSince(o *api.Drill, due time.Time) bool {
	return o != nil && !o.Spec.BegunAt.Before(due)
}

func (d *drills) begin(ctx context.Context, v *configdb.View, vm *api.VM, due time.Time, late time.Duration) (began bool, err error) {
	tx := d.txn()
	why := d.silent(v)
	if why == nil && late >= drillMakeUp {
		why = api.Errorf(api.CodeTimeout, "nobody could begin it within an hour")
	}
	if why == nil {
		_, why = rest.Drill{Placer: d.placer, Actor: driller, Now: d.now(), Due: &due, Promise: d.promise}.Begin(v, tx, vm)
	}
	if why == nil {
		_, err := d.db.Txn(ctx, tx)
		if errors.Is(err, configdb.ErrConflict) {
			return true, nil
		}
		if err == nil {
			d.log.Info("a drill begins", "vm", vm.Meta.ID, "node", vm.Status.Node, "due", due)
		}
		return true, err
	}
	if late < drillMakeUp {
		return false, nil // perhaps with a later look
	}
	tx = d.txn()
	at := d.now().UTC()
	text := fmt.Sprintf("left out: %v", why)
	err = rest.PutDrill(v, tx, vm, api.DrillSpec{VM: vm.Meta.Name, Node: vm.Status.Node, Schedule: vm.Spec.Recovery.Drill, Due: &due, BegunAt: at, Actor: driller},
		api.DrillStatus{Phase: api.TaskCancelled, Code: api.CodeOf(why), Message: text, DoneAt: &at})
	if err != nil {
		return false, err
	}
	return true, d.commit(ctx, tx, eventDrillLeftOut, api.SeverityWarning, vm, vm.Status.Node, fmt.Sprintf("the drill of vm %s that was due at %s was %s", vm.Meta.Name, due.Format(time.RFC3339), text))
}

// silent says which node has not been heard for too long to begin a drill.
func (d *drills) silent(v *configdb.View) error {
	nodes, err := configdb.Nodes.List(v)
	if err != nil {
		return err
	}
	if name := silentNode(nodes, d.silence); name != "" {
		return api.Errorf(api.CodeRefused, "node %s is silent", name)
	}
	return nil
}
