// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/rest"
)

// Limits of evacuations.
const (
	evacuateEvery = time.Second
	// evacuateTries is how often the migration of one VM is begun before it is
	// given up.
	evacuateTries = 2
	// maxReasons is how many VMs the message names.
	maxReasons = 8
	evacuator  = "evacuation"
)

// evacuation empties nodes while this node leads. What it must not forget is in
// the database; how often a VM was tried is of this term.
type evacuation struct {
	db     configdb.DB
	placer rest.Placer
	log    *slog.Logger
	term   uint64
	now    func() time.Time
	// known is by the ID of the evacuation, which is that of its node.
	known map[string]*attempts
}

// attempts are by VM: how often its move was begun, the last task, why it stays.
type attempts struct {
	tries   map[string]int
	tasks   map[string]string
	reasons map[string]string
	told    map[string]time.Time // when it was first seen shutting down
}

func (e *evacuation) of(ev *api.Evacuation) *attempts {
	a := e.known[ev.Meta.ID]
	if a == nil {
		a = &attempts{tries: map[string]int{}, tasks: map[string]string{}, reasons: map[string]string{}, told: map[string]time.Time{}}
		e.known[ev.Meta.ID] = a
	}
	return a
}

func newEvacuation(db configdb.DB, placer rest.Placer, term uint64, log *slog.Logger) *evacuation {
	return &evacuation{db: db, placer: placer, log: log, term: term, now: time.Now, known: map[string]*attempts{}}
}

func (m *member) evacuate(ctx context.Context, term uint64) error {
	e := newEvacuation(m.store, restPlacer{}, term, m.log.With("module", "evacuate"))
	return m.again(ctx, evacuateEvery, e.look, "an evacuation makes no progress for now")
}

// again looks at once and then every so often, until the context ends, and says why a
// look came to nothing.
func (m *member) again(ctx context.Context, every time.Duration, look func(context.Context) error, complaint string) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		if err := look(ctx); err != nil && ctx.Err() == nil {
			m.log.Warn(complaint, "err", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// look takes one step of every evacuation.
func (e *evacuation) look(ctx context.Context) error {
	all, err := configdb.Evacuations.List(e.db.Local())
	for i := range all {
		switch _, nodeErr := configdb.Nodes.Get(e.db.Local(), all[i].Meta.ID); {
		case nodeErr != nil && api.IgnoreNotFound(nodeErr) == nil:
			err = errors.Join(err, e.drop(ctx, &all[i]))
		case !all[i].Status.Phase.Final():
			err = errors.Join(err, e.step(ctx, &all[i]))
		}
	}
	return err
}

// drop forgets the evacuation of a node that was removed meanwhile. Nobody else
// does: its task is about a node that is not there.
func (e *evacuation) drop(ctx context.Context, ev *api.Evacuation) error {
	tx := e.txn()
	configdb.Evacuations.DeleteUnnamed(tx, ev)
	delete(e.known, ev.Meta.ID)
	_, err := e.db.Txn(ctx, tx)
	if err == nil {
		e.log.Info("the evacuation of a node that was removed is forgotten", "node", ev.Spec.Node)
	}
	return err
}

// guest is one VM that is still bound to the node.
type guest struct {
	vm   api.VM
	bind api.Binding
	busy bool // it moves, or something else works on it
}

// step begins as many moves as may go on at once, and says how far it is.
func (e *evacuation) step(ctx context.Context, ev *api.Evacuation) error {
	v := e.db.Local()
	node, err := configdb.Nodes.Get(v, ev.Meta.ID)
	if err != nil {
		return err
	}
	guests, err := vmsLeftOn(v, ev.Meta.ID)
	if err != nil {
		return err
	}
	st := ev.Status
	st.Total = max(st.Total, len(guests))
	had := len(ev.Status.Stopped)
	if node.Status.Phase == api.NodeLost {
		if err := e.startAgain(ctx, ev, false); err != nil || len(ev.Status.Stopped) < had {
			return err // the rest with the next look, on fresh state
		}
		return e.end(ctx, ev, st, api.TaskFailed, api.CodeInternal, "the node is lost")
	}
	moving := 0
	for _, g := range guests {
		if g.busy {
			moving++
		}
	}
	if ev.Spec.Cancel || !node.Spec.Maintenance {
		if err := e.startAgain(ctx, ev, false); err != nil || len(ev.Status.Stopped) < had {
			return err
		}
		if moving == 0 && len(ev.Status.Stopped) == 0 {
			return e.end(ctx, ev, st, api.TaskCancelled, "", fmt.Sprintf("given up; %d VMs are left on the node", len(guests)))
		}
		return e.write(ctx, ev, st)
	}
	for i := range guests {
		if g := &guests[i]; !g.busy && moving < ev.Spec.Parallel && e.of(ev).reasons[g.vm.Meta.ID] == "" {
			began, err := e.move(ctx, ev, g)
			if err != nil {
				return err
			}
			if began {
				moving++
			}
		}
	}
	if err := e.startAgain(ctx, ev, true); err != nil || len(ev.Status.Stopped) < had {
		return err
	}
	return e.report(ctx, ev, st, guests, moving)
}

func vmsLeftOn(v *configdb.View, nodeID string) (out []guest, err error) {
	bindings, err := configdb.Bindings.List(v)
	if err != nil {
		return nil, err
	}
	for _, b := range bindings {
		if b.Spec.NodeID != nodeID {
			continue
		}
		vm, err := configdb.VMs.Get(v, b.Meta.ID)
		if api.IgnoreNotFound(err) != nil {
			return nil, err
		}
		if err != nil {
			continue
		}
		_, operr := configdb.Operations.Get(v, b.Meta.ID)
		out = append(out, guest{vm: vm, bind: b, busy: operr == nil})
	}
	return out, nil
}

// report writes the state, and the end when nothing more can be done.
func (e *evacuation) report(ctx context.Context, ev *api.Evacuation, st api.EvacuationStatus, guests []guest, moving int) error {
	var left []string
	waiting := 0
	for i := range guests {
		if why := e.of(ev).reasons[guests[i].vm.Meta.ID]; why != "" {
			left = append(left, guests[i].vm.Meta.Name+": "+why)
		} else {
			waiting++
		}
	}
	st.Phase = api.TaskRunning
	if st.Total > 0 {
		st.Progress = (st.Total - len(guests)) * 100 / st.Total
	}
	st.Message = fmt.Sprintf("%d of %d VMs have left", st.Total-len(guests), st.Total)
	if n := len(left); n > 0 {
		shown := slices.Clone(left[:min(n, maxReasons)])
		if n > maxReasons {
			shown = append(shown, fmt.Sprintf("and %d more", n-maxReasons))
		}
		st.Message += fmt.Sprintf("; %d stay: %s", n, strings.Join(shown, "; "))
	}
	switch {
	case waiting > 0 || moving > 0 || slices.ContainsFunc(ev.Status.Stopped, func(id string) bool { return !e.keeps(ev, id) }):
		return e.write(ctx, ev, st)
	case len(left) > 0:
		return e.end(ctx, ev, st, api.TaskFailed, api.CodeRefused, st.Message)
	}
	return e.end(ctx, ev, st, api.TaskSucceeded, "", fmt.Sprintf("all %d VMs have left the node", st.Total))
}

// move begins the move of one VM, or notes why it stays.
func (e *evacuation) move(ctx context.Context, ev *api.Evacuation, g *guest) (began bool, err error) {
	id := g.vm.Meta.ID
	if g.vm.Meta.Deleting() || changing(&g.vm) {
		return false, nil // it is looked at again when that is over
	}
	if task := e.of(ev).tasks[id]; task != "" && e.of(ev).tries[id] >= evacuateTries {
		why := "its move failed"
		if t, err := configdb.Tasks.Get(e.db.Local(), task); err == nil && t.Status.Message != "" {
			why += ": " + t.Status.Message
		}
		return false, e.stay(ctx, ev, g, errors.New(why))
	}
	switch {
	case ev.Spec.Stay:
		err = errors.New("it is not to be moved")
	case g.vm.Spec.Power == api.PowerStopped && ev.Spec.MoveStopped && hasOwnVolumes(e.db.Local(), &g.vm):
		err = e.moveStopped(ctx, ev, g)
	case atRest(&g.vm):
		err = e.rebind(ctx, g)
	default:
		err = e.migrate(ctx, ev, g)
	}
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, configdb.ErrConflict), errors.Is(err, configdb.ErrNoQuorum), errors.Is(err, configdb.ErrUncertain), ctx.Err() != nil:
		return false, nil // with the next look
	}
	return false, e.stay(ctx, ev, g, err)
}

// atRest reports that a VM is not meant to have a process.
func atRest(vm *api.VM) bool {
	return vm.Spec.Power == api.PowerStopped || vm.Spec.Power == api.PowerSuspended
}

// changing reports that a VM is on its way to another state.
func changing(vm *api.VM) bool {
	switch vm.Status.Phase {
	case api.VMRunning, api.VMPaused:
		return atRest(vm)
	case api.VMStopped:
		return vm.Spec.Power != api.PowerStopped
	case api.VMSuspended:
		return vm.Spec.Power != api.PowerSuspended
	case api.VMFailed:
		return false
	}
	return true
}

// stay notes why a VM cannot be moved, or shuts it down if that is wished.
func (e *evacuation) stay(ctx context.Context, ev *api.Evacuation, g *guest, why error) error {
	id := g.vm.Meta.ID
	if ev.Spec.Level != api.EvacuateStop || atRest(&g.vm) || slices.Contains(ev.Status.Stopped, id) {
		e.of(ev).reasons[id] = why.Error()
		return nil
	}
	e.log.Info("a VM that cannot be moved while it runs is shut down", "vm", id, "reason", why)
	v := e.db.Local()
	tx := e.txn()
	vm := g.vm
	vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, false
	tx.RequireRevision(configdb.Operations.SpecKey(id), 0)
	if err := configdb.VMs.UpdateSpec(v, tx, &vm); err != nil {
		return err
	}
	configdb.StaysStopped(v, tx, id) // the word of a user about an earlier time
	ev.Status.Stopped = append(slices.Clone(ev.Status.Stopped), id)
	if err := configdb.Evacuations.UpdateStatus(v, tx, ev); err != nil {
		return err
	}
	_, err := e.db.Txn(ctx, tx)
	return err
}

func (e *evacuation) txn() *configdb.Txn {
	tx := &configdb.Txn{Actor: evacuator}
	tx.RequireTerm(e.term)
	return tx
}

func (e *evacuation) migrate(ctx context.Context, ev *api.Evacuation, g *guest) error {
	v := e.db.Local()
	tx := e.txn()
	m := rest.Migration{
		Placer: e.placer, Actor: ev.Spec.Actor, Now: time.Now(),
		Reserve: func(node string) error { e.placer.Reserve(v, tx, node); return nil },
	}
	task, err := m.Begin(v, tx, g.vm, &api.MigrateRequest{WithStorage: true})
	if err != nil {
		return err
	}
	return e.begun(ctx, ev, g, tx, task)
}

// begun commits what begins a task for a VM, and counts it.
func (e *evacuation) begun(ctx context.Context, ev *api.Evacuation, g *guest, tx *configdb.Txn, task string) error {
	if _, err := e.db.Txn(ctx, tx); err != nil {
		return err
	}
	e.of(ev).tries[g.vm.Meta.ID]++
	e.of(ev).tasks[g.vm.Meta.ID] = task
	return nil
}

// hasOwnVolumes reports whether a VM has volumes that one node only has.
func hasOwnVolumes(v *configdb.View, vm *api.VM) bool {
	return slices.ContainsFunc(vm.Spec.Volumes(), func(name string) bool {
		vol, err := configdb.Volumes.Find(v, vm.Meta.Project, name)
		if err != nil {
			return false
		}
		pool, err := configdb.Pools.Find(v, "", vol.Spec.Pool)
		return err == nil && pool.Spec.Type == api.PoolDir
	})
}

// moveStopped begins the move of a VM that does not run, with its volumes, to the
// best other node.
func (e *evacuation) moveStopped(ctx context.Context, ev *api.Evacuation, g *guest) error {
	v := e.db.Local()
	tx := e.txn()
	task, err := rest.Move{Placer: e.placer, Actor: ev.Spec.Actor}.Begin(v, tx, g.vm, &api.MoveRequest{})
	if err != nil {
		return err
	}
	return e.begun(ctx, ev, g, tx, task)
}

// rebind gives a VM that its owner has reported stopped, or suspended, to another
// node; its saved memory is in its disks. The preconditions are that very report, the spec and the binding.
func (e *evacuation) rebind(ctx context.Context, g *guest) error {
	v := e.db.Local()
	vm, b, id := g.vm, g.bind, g.vm.Meta.ID
	s := &vm.Status
	if s.Phase != api.VMStopped && s.Phase != api.VMSuspended || s.PID != 0 || s.Epoch != b.Spec.Epoch || s.ObservedGeneration != vm.Meta.Generation {
		return fmt.Errorf("node %s has not said that it is at rest, but %s", b.Spec.Node, s.Phase)
	}
	to, name, err := e.placer.ChooseOther(v, vm, map[string]string{b.Spec.NodeID: "it is to be emptied"}, "", nil)
	if err != nil {
		return err
	}
	node, err := configdb.Nodes.Get(v, to)
	if err != nil {
		return err
	}
	tx := e.txn()
	tx.RequireRevision(configdb.Operations.SpecKey(id), 0)
	tx.RequireRevision(configdb.VMs.SpecKey(id), vm.Meta.Revision)
	tx.RequireRevision(configdb.VMs.StatusKey(id), vm.Meta.StatusRevision)
	tx.RequireRevision(configdb.Nodes.SpecKey(to), node.Meta.Revision)
	b.Spec.NodeID, b.Spec.Node = to, name
	b.Spec.Epoch++
	if err := configdb.Bindings.UpdateSpec(v, tx, &b); err != nil {
		return err
	}
	vm.Status = api.VMStatus{
		ObservedGeneration: vm.Status.ObservedGeneration, RebootsDone: vm.Status.RebootsDone,
		Phase: vm.Status.Phase, Node: name, Epoch: b.Spec.Epoch, Restarts: vm.Status.Restarts,
	}
	if err := configdb.VMs.UpdateStatus(v, tx, &vm); err != nil {
		return err
	}
	_, err = e.db.Txn(ctx, tx)
	return err
}

// startAgain starts the VMs that were shut down to be moved, wherever they are
// now: one that could not be moved even so runs on where it was. Unless the node is
// still to be emptied, they need not leave it first. What a user has stopped
// meanwhile stays stopped.
func (e *evacuation) startAgain(ctx context.Context, ev *api.Evacuation, empties bool) error {
	for _, id := range slices.Clone(ev.Status.Stopped) {
		v, tx := e.db.Local(), e.txn()
		s, err := shutDownVM(v, tx, id)
		if err != nil {
			return err
		}
		vm, b, over := &s.vm, &s.bind, s.over
		if !over && empties && e.keeps(ev, id) && b.Spec.NodeID == ev.Meta.ID {
			continue // it is for the one who asked for that
		}
		if !over && vm.Status.Phase != api.VMStopped && !vm.Spec.ForceStop && e.dueToEnd(ev, id) {
			vm.Spec.ForceStop = true
			if err := configdb.VMs.UpdateSpec(v, tx, vm); err != nil {
				return err
			}
			if _, err := e.db.Txn(ctx, tx); err != nil {
				return err
			}
			e.log.Info("a VM that does not shut down is ended", "vm", id)
			continue
		}
		if !over && empties && (vm.Status.Phase != api.VMStopped || b.Spec.NodeID == ev.Meta.ID && e.of(ev).reasons[id] == "") {
			continue // it is still shutting down, or has not moved yet
		}
		if _, operr := configdb.Operations.Get(v, id); !over && operr == nil {
			continue // it is on its way
		}
		if !over {
			if err := s.start(v, tx, e.placer); err != nil {
				return err
			}
		}
		ev.Status.Stopped = slices.DeleteFunc(slices.Clone(ev.Status.Stopped), func(s string) bool { return s == id })
		if err := configdb.Evacuations.UpdateStatus(v, tx, ev); err != nil {
			return err
		}
		if _, err := e.db.Txn(ctx, tx); err != nil {
			return err
		}
	}
	return nil
}

// shutDown is a VM that was shut down for a while.
type shutDown struct {
	vm   api.VM
	bind api.Binding
	over bool // there is nothing to start again: it is gone, or a user decided otherwise
}

// shutDownVM looks at one, and takes the word of a user who stopped it meanwhile.
func shutDownVM(v *configdb.View, tx *configdb.Txn, id string) (s shutDown, err error) {
	vm, err := configdb.VMs.Get(v, id)
	b, berr := configdb.Bindings.Get(v, id)
	stays := configdb.StaysStopped(v, tx, id)
	s = shutDown{vm, b, stays || err != nil || berr != nil || vm.Meta.Deleting() || vm.Spec.Power != api.PowerStopped}
	return s, errors.Join(api.IgnoreNotFound(err), api.IgnoreNotFound(berr))
}

// start adds its start to a transaction. It conflicts with whatever else is begun.
func (s *shutDown) start(v *configdb.View, tx *configdb.Txn, placer rest.Placer) error {
	id := s.vm.Meta.ID
	tx.RequireRevision(configdb.Bindings.SpecKey(id), s.bind.Meta.Revision)
	tx.RequireRevision(configdb.Operations.SpecKey(id), 0)
	s.vm.Spec.Power, s.vm.Spec.ForceStop = api.PowerRunning, false
	placer.Reserve(v, tx, s.bind.Spec.NodeID)
	return configdb.VMs.UpdateSpec(v, tx, &s.vm)
}

// dueToEnd reports whether a guest was told to shut down long enough ago, as far as this
// term knows.
func (e *evacuation) dueToEnd(ev *api.Evacuation, id string) bool {
	a := e.of(ev)
	if a.told[id].IsZero() {
		a.told[id] = e.now()
	}
	after := time.Duration(ev.Spec.ForceStopSeconds) * time.Second
	return after > 0 && e.now().Sub(a.told[id]) >= after
}

// keeps reports whether a VM that was shut down is for a reboot to start again.
func (e *evacuation) keeps(ev *api.Evacuation, id string) bool {
	return ev.Spec.LeaveStopped && e.of(ev).reasons[id] != ""
}

func (e *evacuation) end(ctx context.Context, ev *api.Evacuation, st api.EvacuationStatus, phase api.TaskPhase, code api.Code, message string) error {
	st.Phase, st.Code, st.Message = phase, code, message
	if err := e.write(ctx, ev, st); err != nil {
		return err
	}
	delete(e.known, ev.Meta.ID)
	e.log.Info("evacuation ended", "node", ev.Spec.Node, "phase", phase, "reason", message)
	return nil
}

func (e *evacuation) write(ctx context.Context, ev *api.Evacuation, st api.EvacuationStatus) error {
	tx := e.txn()
	st.Stopped = ev.Status.Stopped
	next := *ev
	next.Status = st
	if err := configdb.Evacuations.UpdateStatus(e.db.Local(), tx, &next); err != nil || tx.Empty() {
		return err
	}
	_, err := e.db.Txn(ctx, tx)
	return err
}
