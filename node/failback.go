// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/rest"
)

// Limits of failbacks.
const (
	failbackEvery = 10 * time.Second
	// failbackTries is how often the way back of one VM is begun, in one leadership,
	// before it stays where it is.
	failbackTries = 2
	// failbackSilence is how long a node may not have renewed its lease to count as
	// well; it asks every second.
	failbackSilence = 5 * time.Second
	failbacker      = "failback"
	eventFailback   = "vm.failback"
)

// failback moves VMs that were recovered back to the nodes that they were taken
// from, while this node leads. How long nodes have been well, and what was tried,
// is of this term; so a new leader waits anew. See ha/DESIGN.md.
type failback struct {
	db      configdb.DB
	placer  rest.Placer
	log     *slog.Logger
	term    uint64
	now     func() time.Time
	silence func(nodeID string) time.Duration
	well    map[string]wellSince // by node
	tries   map[string]int       // by VM and epoch
	said    map[string]string    // why a VM stays, by VM
}

// wellSince is since when a node has been well, in one life of its daemon.
type wellSince struct {
	boot  string
	since time.Time
}

func (m *member) failback(ctx context.Context, term uint64) error {
	f := newFailback(m.store, restPlacer{}, term, m.ha.Silence, m.log.With("module", "failback"))
	return m.again(ctx, failbackEvery, f.look, "no VM goes back to its node for now")
}

func newFailback(db configdb.DB, placer rest.Placer, term uint64, silence func(string) time.Duration, log *slog.Logger) *failback {
	return &failback{
		db: db, placer: placer, term: term, silence: silence, log: log, now: time.Now,
		well: map[string]wellSince{}, tries: map[string]int{}, said: map[string]string{},
	}
}

// look begins the way back of one VM at most.
func (f *failback) look(ctx context.Context) error {
	v := f.db.Local()
	nodes, err := configdb.Nodes.List(v)
	if err != nil {
		return err
	}
	if !f.whole(v, nodes) {
		clear(f.well)
		return nil
	}
	ops, err := configdb.Operations.List(v)
	if err != nil || len(ops) > 0 {
		return err // one at a time, and beside nothing else
	}
	ready, err := f.ready(v)
	if err != nil {
		return err
	}
	for i := range ready {
		began, err := f.begin(ctx, v, &ready[i])
		if began || err != nil {
			return err
		}
	}
	return nil
}

// whole reports whether every node is well and none is being emptied, and notes
// since when.
func (f *failback) whole(v *configdb.View, nodes []api.Node) bool {
	if rest.Unwell(v) != nil || silentNode(nodes, f.silence) != "" {
		return false
	}
	for i := range nodes {
		id, boot := nodes[i].Meta.ID, nodes[i].Status.BootID
		if w, ok := f.well[id]; !ok || w.boot != boot {
			f.well[id] = wellSince{boot, f.now()}
		}
	}
	return true
}

// silentNode is the name of a node that has not renewed its lease for too long to count
// as well, "" if there is none.
func silentNode(nodes []api.Node, silence func(nodeID string) time.Duration) string {
	for i := range nodes {
		if silence(nodes[i].Meta.ID) > failbackSilence {
			return nodes[i].Meta.Name
		}
	}
	return ""
}

// returner is a VM that may go back.
type returner struct {
	vm     api.VM
	origin api.RecoveredFrom
}

// ready are the VMs whose nodes have been back for long enough, those of a higher
// priority first.
func (f *failback) ready(v *configdb.View) (out []returner, err error) {
	bindings, err := configdb.Bindings.List(v)
	if err != nil {
		return nil, err
	}
	for i := range bindings {
		b := &bindings[i]
		o := b.Spec.Origin()
		if o == nil {
			continue
		}
		vm, err := configdb.VMs.Get(v, b.Meta.ID)
		if err != nil {
			if api.IgnoreNotFound(err) == nil {
				continue
			}
			return nil, err
		}
		after := vm.Spec.FailsBackAfter()
		w, known := f.well[o.NodeID]
		if after == 0 || !known || f.now().Sub(w.since) < after || vm.Meta.Deleting() ||
			vm.Spec.Power != api.PowerRunning || vm.Status.Phase != api.VMRunning || vm.Status.Epoch != b.Spec.Epoch || f.tries[attemptOf(&vm)] >= failbackTries {
			continue
		}
		out = append(out, returner{vm, *o})
	}
	slices.SortStableFunc(out, func(a, b returner) int {
		return cmp.Compare(a.vm.Spec.RecoveryPriority().Rank(), b.vm.Spec.RecoveryPriority().Rank())
	})
	return out, nil
}

func attemptOf(vm *api.VM) string { return fmt.Sprintf("%s/%d", vm.Meta.ID, vm.Status.Epoch) }

// begin begins one migration; false if it cannot be now, which is said once for
// each reason.
func (f *failback) begin(ctx context.Context, v *configdb.View, r *returner) (began bool, err error) {
	tx := &configdb.Txn{Actor: failbacker}
	tx.RequireTerm(f.term)
	m := rest.Migration{
		Placer: f.placer, Actor: failbacker, Now: f.now(),
		Reserve: func(node string) error { f.placer.Reserve(v, tx, node); return nil },
	}
	task, err := m.Begin(v, tx, r.vm, &api.MigrateRequest{To: r.origin.Node})
	if err != nil {
		if why := err.Error(); f.said[r.vm.Meta.ID] != why {
			f.said[r.vm.Meta.ID] = why
			f.log.Info("a VM cannot go back to its node for now", "vm", r.vm.Meta.ID, "node", r.origin.Node, "err", err)
		}
		return false, nil
	}
	e := api.NewEvent(eventFailback, api.SeverityInfo, api.KindVM, r.vm.Meta,
		fmt.Sprintf("vm %s goes back from node %s to node %s, from which it was recovered", r.vm.Meta.Name, r.vm.Status.Node, r.origin.Node), f.now())
	e.Spec.Node, e.Spec.Details = r.vm.Status.Node, map[string]string{"to": r.origin.Node, "task": task}
	if err := configdb.Events.CreateUnnamed(tx, &e); err != nil {
		return false, err
	}
	_, err = f.db.Txn(ctx, tx)
	switch {
	case err == nil:
		f.tries[attemptOf(&r.vm)]++
		delete(f.said, r.vm.Meta.ID)
		f.log.Info("a VM goes back to its node", "vm", r.vm.Meta.ID, "node", r.origin.Node, "task", task)
		return true, nil
	case errors.Is(err, configdb.ErrConflict):
		return false, nil // with the next look
	}
	return false, err
}
