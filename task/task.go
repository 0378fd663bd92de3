// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package task

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/internal/contain"
	"github.com/muster-vm/muster/reconcile"
)

// Limits.
const (
	// Retention of final tasks.
	Retention = 7 * 24 * time.Hour
	// MaxFinal is how many final tasks are kept at most.
	MaxFinal = 10_000
	// sweepInterval is how often old tasks are looked for, sweepBatch how many
	// go in one transaction.
	sweepInterval = 10 * time.Minute
	sweepBatch    = 200
	actor         = "task"
)

// Config of a Service.
type Config struct {
	DB  configdb.DB
	Log *slog.Logger
	// Now is the clock for deadlines and ages, time.Now when nil. Deadlines go by
	// differences of its readings, which no setting of the time of day changes.
	Now func() time.Time
}

// Service follows tasks while this node leads. Run may be called again in a
// later term, but not twice at a time.
type Service struct {
	cfg Config

	mu sync.Mutex
	// open maps targets ("kind/id") to their tasks that are not final, and
	// target each of these tasks to its target.
	open   map[string]map[string]bool
	target map[string]string
	// seen is when this leader saw each of these tasks first.
	seen map[string]time.Time
}

// New returns a service that does nothing until Run.
func New(cfg Config) *Service {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Service{cfg: cfg}
}

// Run works in one Raft term until the context ends, which is not an error.
func (s *Service) Run(ctx context.Context, term uint64) error {
	s.mu.Lock()
	s.open, s.target = map[string]map[string]bool{}, map[string]string{}
	s.seen = map[string]time.Time{}
	s.mu.Unlock()
	loop := reconcile.New(reconcile.Config{
		Name: "tasks", DB: s.cfg.DB, Log: s.cfg.Log,
		Reconcile: func(ctx context.Context, id string) (reconcile.Result, error) { return s.reconcile(ctx, term, id) },
		Sources: []reconcile.Source{
			{Prefix: configdb.Tasks.SpecPrefix(), IDs: func(_ *configdb.View, c configdb.Change) []string {
				id, _ := configdb.Tasks.IDOf(c.Key)
				return []string{id}
			}},
			follow(s, configdb.VMs.Kind, configdb.VMs.SpecPrefix(), configdb.VMs.IDOf),
			follow(s, configdb.VMs.Kind, configdb.VMs.StatusPrefix(), configdb.VMs.IDOf),
			// An operation has the ID of its VM.
			follow(s, configdb.VMs.Kind, configdb.Operations.SpecPrefix(), configdb.Operations.IDOf),
			follow(s, configdb.VMs.Kind, configdb.Operations.StatusPrefix(), configdb.Operations.IDOf),
			// That of the move of a volume that no VM has, the volume's.
			follow(s, configdb.Volumes.Kind, configdb.Operations.SpecPrefix(), configdb.Operations.IDOf),
			follow(s, configdb.Volumes.Kind, configdb.Operations.StatusPrefix(), configdb.Operations.IDOf),
			follow(s, configdb.VMs.Kind, configdb.Arrivals.StatusPrefix(), configdb.Arrivals.IDOf),
			follow(s, configdb.VMs.Kind, configdb.Bindings.SpecPrefix(), configdb.Bindings.IDOf),
			{Prefix: configdb.Nodes.StatusPrefix(), IDs: operationsAt},
			// An evacuation has the ID of its node.
			follow(s, configdb.Nodes.Kind, configdb.Evacuations.StatusPrefix(), configdb.Evacuations.IDOf),
			follow(s, configdb.Nodes.Kind, configdb.Reboots.StatusPrefix(), configdb.Reboots.IDOf),
			// A drill has the ID of its VM.
			follow(s, configdb.VMs.Kind, configdb.Drills.StatusPrefix(), configdb.Drills.IDOf),
			follow(s, configdb.Clusters.Kind, configdb.RollingReboots.StatusPrefix(), configdb.RollingReboots.IDOf),
			follow(s, configdb.Images.Kind, configdb.Images.SpecPrefix(), configdb.Images.IDOf),
			follow(s, configdb.Images.Kind, configdb.Images.StatusPrefix(), configdb.Images.IDOf),
			follow(s, configdb.Volumes.Kind, configdb.Volumes.SpecPrefix(), configdb.Volumes.IDOf),
			follow(s, configdb.Volumes.Kind, configdb.Volumes.StatusPrefix(), configdb.Volumes.IDOf),
		},
	})
	group, ctx := contain.NewGroup(ctx)
	group.Go(func() { s.sweepLoop(ctx, term) })
	err := loop.Run(ctx)
	return errors.Join(err, group.Stop())
}

// follow maps a changed target to its open tasks. A volume also concerns the
// tasks of the VMs that it is made for.
func follow(s *Service, kind api.Kind, prefix string, idOf func(string) (string, bool)) reconcile.Source {
	return reconcile.Source{Prefix: prefix, IDs: func(v *configdb.View, c configdb.Change) []string {
		id, _ := idOf(c.Key)
		targets := []string{string(kind) + "/" + id}
		if kind == api.KindVolume {
			targets = append(targets, usersOf(v, id)...)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		var ids []string
		for _, t := range targets {
			ids = slices.AppendSeq(ids, maps.Keys(s.open[t]))
		}
		return ids
	}}
}

// usersOf returns "vm/id" of what refers to a volume or owns it.
func usersOf(v *configdb.View, volumeID string) []string {
	users := configdb.Volumes.Referrers(v, volumeID)
	if vol, err := configdb.Volumes.Get(v, volumeID); err == nil && vol.Meta.Owner != "" && !slices.Contains(users, vol.Meta.Owner) {
		users = append(users, vol.Meta.Owner)
	}
	return users
}

// note keeps the index of open tasks. It comes before the state is read, so
// that a change of the target after that reading finds the task.
func (s *Service) note(id, target string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.target[id]; old != "" && old != target {
		delete(s.open[old], id)
		if len(s.open[old]) == 0 {
			delete(s.open, old)
		}
		delete(s.target, id)
	}
	if target == "" {
		delete(s.seen, id)
		return
	}
	if s.open[target] == nil {
		s.open[target] = map[string]bool{}
	}
	s.open[target][id], s.target[id] = true, target
}

// left is how much of its time an open task has; positive for ever if it has no
// deadline. The creator's clock may differ from this one by any amount.
func (s *Service) left(t *api.Task, now time.Time) time.Duration {
	if t.Spec.Deadline.IsZero() {
		return math.MaxInt64
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	since, known := s.seen[t.Meta.ID]
	if !known {
		since = now
		s.seen[t.Meta.ID] = now
	}
	return t.Spec.Deadline.Sub(t.Meta.CreatedAt) - now.Sub(since)
}

// reconcile evaluates one task and writes what changed.
func (s *Service) reconcile(ctx context.Context, term uint64, id string) (reconcile.Result, error) {
	t, err := configdb.Tasks.Get(s.cfg.DB.Local(), id)
	if (err == nil && t.Status.Phase.Final()) || (err != nil && api.CodeOf(err) == api.CodeNotFound) {
		s.note(id, "")
		return reconcile.Result{}, nil
	}
	if err != nil {
		return reconcile.Result{}, err
	}
	s.note(id, string(t.Spec.TargetKind)+"/"+t.Spec.TargetID)
	v := s.cfg.DB.Local()
	if t, err = configdb.Tasks.Get(v, id); err != nil {
		return reconcile.Result{}, err
	}
	what, err := look(v, t)
	if err != nil {
		return reconcile.Result{}, fmt.Errorf("look at the target of task %s: %w", id, err)
	}
	now := s.cfg.Now()
	left := s.left(&t, now)
	if left <= 0 {
		if what.undone, err = leftToDo(v, what); err != nil {
			return reconcile.Result{}, fmt.Errorf("look at what task %s has not done: %w", id, err)
		}
	}
	status, changed := evaluate(t, what, now, left <= 0)
	if changed {
		t.Status = status
		tx := &configdb.Txn{Actor: actor}
		tx.RequireTerm(term)
		if err := configdb.Tasks.UpdateStatus(v, tx, &t); err != nil {
			return reconcile.Result{}, err
		}
		if op := what.operation; op != nil && status.Phase.Final() {
			// Its result is the task's now, and the VM is free for other work. What
			// it was judged by must still be so.
			tx.RequireRevision(configdb.Operations.StatusKey(op.Meta.ID), op.Meta.StatusRevision)
			configdb.Operations.DeleteUnnamed(tx, op)
			freeVolume(tx, op)
			if a := what.arrival; a != nil {
				configdb.Arrivals.DeleteUnnamed(tx, a)
			}
		}
		if e := what.evacuation; e != nil && status.Phase.Final() {
			tx.RequireRevision(configdb.Evacuations.StatusKey(e.Meta.ID), e.Meta.StatusRevision)
			configdb.Evacuations.DeleteUnnamed(tx, e)
		}
		if _, err := s.cfg.DB.Txn(ctx, tx); err != nil {
			return s.conflict(id, err)
		}
		if status.Phase.Final() {
			s.cfg.Log.Info("task ended", "task", id, "action", t.Spec.Action, "target", t.Spec.Target, "phase", status.Phase, "reason", status.Message)
			s.note(id, "")
		}
	}
	if status.Phase.Final() || t.Spec.Deadline.IsZero() {
		return reconcile.Result{}, nil
	}
	return reconcile.Result{After: max(left, time.Millisecond)}, nil
}

// conflict tells a lost term, after which nothing of ours can land any more,
// from a state that moved on.
func (s *Service) conflict(id string, err error) (reconcile.Result, error) {
	var c *configdb.ConflictError
	if errors.As(err, &c) && c.Precondition.Check == fsm.CheckTerm {
		s.cfg.Log.Debug("task left to the new leader", "task", id)
		return reconcile.Result{}, nil
	}
	return reconcile.Result{}, fmt.Errorf("write status of task %s: %w", id, err)
}

// look reads a task's target and, for a VM, its disks.
func look(v *configdb.View, t api.Task) (target, error) {
	var out target
	var err error
	switch t.Spec.TargetKind {
	case api.KindVM:
		var vm api.VM
		if vm, err = configdb.VMs.Get(v, t.Spec.TargetID); err == nil {
			out = target{exists: true, vm: &vm, disks: disksOf(v, &vm)}
			err = out.lookOperation(v, t)
			if t.Spec.Action == api.ActionVMDrill {
				if d, derr := configdb.Drills.Get(v, t.Spec.TargetID); derr == nil && d.Spec.TaskID == t.Meta.ID {
					out.drill = &d
				}
			}
		}
	case api.KindImage:
		var i api.Image
		if i, err = configdb.Images.Get(v, t.Spec.TargetID); err == nil {
			out = target{exists: true, image: &i}
		}
	case api.KindVolume:
		var o api.Volume
		if o, err = configdb.Volumes.Get(v, t.Spec.TargetID); err == nil {
			out = target{exists: true, volume: &o}
			err = out.lookOperation(v, t)
		}
	case api.KindNode:
		var n api.Node
		if n, err = configdb.Nodes.Get(v, t.Spec.TargetID); err == nil {
			out = target{exists: true, node: &n}
			if e, eerr := configdb.Evacuations.Get(v, t.Spec.TargetID); eerr == nil && e.Spec.TaskID == t.Meta.ID && t.Spec.Action == api.ActionNodeEvacuate {
				out.evacuation = &e
			}
			if r, rerr := configdb.Reboots.Get(v, t.Spec.TargetID); rerr == nil && r.Spec.TaskID == t.Meta.ID {
				out.reboot = &r
			}
		}
	case api.KindCluster:
		if _, err = configdb.Clusters.Get(v, t.Spec.TargetID); err == nil {
			out = target{exists: true}
			if r, rerr := configdb.RollingReboots.Get(v, t.Spec.TargetID); rerr == nil && r.Spec.TaskID == t.Meta.ID {
				out.rolling = &r
			}
		}
	default:
		return out, fmt.Errorf("kind %q has no tasks", t.Spec.TargetKind)
	}
	if err != nil && api.CodeOf(err) == api.CodeNotFound {
		err = nil
	}
	return out, err
}

// lookOperation reads the operation of a task, if it is one.
func (o *target) lookOperation(v *configdb.View, t api.Task) error {
	if !api.IsOperation(t.Spec.Action) {
		return nil
	}
	op, err := configdb.Operations.Get(v, t.Spec.TargetID)
	if err != nil || op.Spec.TaskID != t.Meta.ID {
		return api.IgnoreNotFound(err)
	}
	o.operation = &op
	b, err := configdb.Bindings.Get(v, t.Spec.TargetID)
	if err != nil && (t.Spec.TargetKind == api.KindVM || api.IgnoreNotFound(err) != nil) {
		return api.IgnoreNotFound(err)
	}
	o.epoch, o.broughtBy = b.Spec.Epoch, b.Spec.BroughtBy
	if a, err := configdb.Arrivals.Get(v, t.Spec.TargetID); err == nil {
		o.arrival = &a
	}
	owner, err := configdb.Nodes.Get(v, op.Spec.NodeID)
	o.ownerLost = err != nil || owner.Status.Phase == api.NodeLost
	if op.Spec.Migration != nil {
		to, err := configdb.Nodes.Get(v, op.Spec.Migration.NodeID)
		o.targetLost = err != nil || to.Status.Phase == api.NodeLost
	}
	return api.IgnoreNotFound(err)
}

func disksOf(v *configdb.View, vm *api.VM) []disk {
	var out []disk
	for _, d := range vm.Spec.Disks {
		if d.Volume == "" {
			continue
		}
		vol, err := configdb.Volumes.Find(v, vm.Meta.Project, d.Volume)
		if err != nil {
			out = append(out, disk{name: d.Volume, message: err.Error()})
			continue
		}
		out = append(out, disk{name: d.Volume, phase: vol.Status.Phase, message: vol.Status.Message, progress: vol.Status.Progress, conditions: vol.Status.Conditions})
	}
	return out
}

func (s *Service) sweepLoop(ctx context.Context, term uint64) {
	tick := time.NewTicker(sweepInterval)
	defer tick.Stop()
	for {
		if err := s.sweep(ctx, term); err != nil && ctx.Err() == nil {
			s.cfg.Log.Warn("old tasks could not be removed", "err", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// sweep removes old final tasks in batches.
func (s *Service) sweep(ctx context.Context, term uint64) error {
	all, err := configdb.Tasks.List(s.cfg.DB.Local()) // oldest first
	old := expired(all, s.cfg.Now())
	for batch := range slices.Chunk(old, sweepBatch) {
		tx := &configdb.Txn{Actor: actor}
		tx.RequireTerm(term)
		for i := range batch {
			configdb.Tasks.DeleteUnnamed(tx, &batch[i])
		}
		if _, txErr := s.cfg.DB.Txn(ctx, tx); txErr != nil {
			return errors.Join(err, txErr)
		}
	}
	return err
}

// expired returns the final tasks that are too old or too many; all is in
// order of creation.
func expired(all []api.Task, now time.Time) []api.Task {
	var final []api.Task
	for _, t := range all {
		if t.Status.Phase.Final() {
			final = append(final, t)
		}
	}
	tooMany := max(len(final)-MaxFinal, 0)
	out := final[:tooMany:tooMany]
	for _, t := range final[tooMany:] {
		ended := t.Meta.CreatedAt
		if t.Status.FinishedAt != nil {
			ended = *t.Status.FinishedAt
		}
		if now.Sub(ended) > Retention {
			out = append(out, t)
		}
	}
	return out
}
