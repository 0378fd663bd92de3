// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/ha/plan"
	"github.com/muster-vm/muster/internal/contain"
	"github.com/muster-vm/muster/reconcile"
)

// Actor is recorded with everything that this package writes.
const Actor = "ha"

// Limits of a recovery.
const (
	recoverDeadline = 5 * time.Minute // of the task that follows a recovery
	recoverRetry    = 5 * time.Second // when no node fits
	settleRetry     = 200 * time.Millisecond
	askTimeout      = time.Second // of one question to the voters
	askPause        = 300 * time.Millisecond
)

// Placer reads the cluster as one on which VMs can be placed.
type Placer interface {
	Load(s *plan.State) (plan.Fleet, error)
}

// Service grants leases, declares nodes lost and moves their protected VMs.
// Serve answers on every node; Run works while this node leads.
type Service struct {
	db     configdb.DB
	placer Placer
	log    *slog.Logger
	grant  *grantor
	fencer Fencer // nil: nodes are not switched off
	// storage locks nodes out of pools; nil: nobody is.
	storage StorageFencer
	nodeID  string
	name    string
	// seen is what notes in pools show of a node; nil: there are none.
	seen func(nodeID string) (sees int, ago time.Duration, ok bool)
	// heldBack is that it was said that too many are silent.
	heldBack bool
	// cutOffNext is when it is next looked who is cut off.
	cutOffNext time.Duration

	mu        sync.Mutex
	returning map[string]bool // lost nodes that asked for a lease
	kick      chan struct{}
}

// ServiceConfig describes the service.
type ServiceConfig struct {
	DB     configdb.DB
	Leader Leader
	Placer Placer
	Log    *slog.Logger
	Now    func() time.Duration // nil: BootTime
	// NodeID and NodeName are this node's.
	NodeID, NodeName string
	// Fencer switches silent nodes off; nil: nobody does.
	Fencer Fencer
	// Storage locks silent nodes out of pools; nil: nobody does.
	Storage StorageFencer
}

// NewService returns a service that grants nothing until this node leads.
func NewService(c ServiceConfig) *Service {
	if c.Now == nil {
		c.Now = BootTime
	}
	s := &Service{db: c.DB, placer: c.Placer, log: c.Log, fencer: c.Fencer, storage: c.Storage, nodeID: c.NodeID, name: c.NodeName, returning: map[string]bool{}, kick: make(chan struct{}, 1)}
	s.grant = &grantor{db: c.DB, leader: c.Leader, now: c.Now, readmit: s.noteReturn}
	s.grant.forget()
	return s
}

// Serve answers MethodRenew for the node that proved to be caller.
func (s *Service) Serve(ctx context.Context, caller string, request []byte) ([]byte, error) {
	return s.grant.serve(ctx, caller, request)
}

// Silence returns how long ago a node's lease was last granted by this leader.
func (s *Service) Silence(nodeID string) time.Duration { return s.grant.silence(nodeID) }

func (s *Service) noteReturn(nodeID string) {
	s.mu.Lock()
	s.returning[nodeID] = true
	s.mu.Unlock()
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

func (s *Service) takeReturning() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := slices.Sorted(maps.Keys(s.returning))
	clear(s.returning)
	return out
}

// Begin lets silence count from now, if the term is new.
func (s *Service) Begin(term uint64) { s.grant.begin(term) }

// Run does the leader's work in one term, until ctx ends.
func (s *Service) Run(ctx context.Context, term uint64) error {
	s.grant.begin(term)
	group, ctx := contain.NewGroup(ctx)
	group.Go(func() { s.learnOfEarlier(ctx, term) })
	group.Go(func() {
		s.detect(ctx, term, func(attempt func(context.Context)) { group.Go(func() { attempt(ctx) }) })
	})
	// One plan for all that is lost, whatever changed.
	const lostNodes = "lost nodes"
	all := func(*configdb.View, configdb.Change) []string { return []string{lostNodes} }
	loop := reconcile.New(reconcile.Config{
		Name: "ha", DB: s.db, Log: s.log, Workers: 1,
		Sources: []reconcile.Source{
			{Prefix: configdb.Nodes.StatusPrefix(), IDs: all},
			{Prefix: configdb.Bindings.SpecPrefix(), IDs: all},
			{Prefix: configdb.VMs.StatusPrefix(), IDs: givenUp},
		},
		Reconcile: func(ctx context.Context, what string) (reconcile.Result, error) {
			if what == givenUpVMs {
				return s.relocate(ctx, term)
			}
			return s.recover(ctx, term)
		},
	})
	evidence := s.newWitness(term)
	group.Go(func() {
		if err := evidence.Run(ctx); err != nil {
			s.log.Error("evidence of losses is not completed", "err", err)
		}
	})
	err := loop.Run(ctx)
	return errors.Join(err, group.Stop())
}

// learnOfEarlier learns of the leader of before, as soon as a majority of the voters answers.
func (s *Service) learnOfEarlier(ctx context.Context, term uint64) {
	for began := s.grant.now(); s.grant.now()-began < LostAfter; {
		actx, cancel := context.WithTimeout(ctx, askTimeout)
		err := s.learn(actx, term)
		cancel()
		if err == nil {
			return
		}
		s.log.Debug("the voters did not say when an earlier leader was confirmed", "err", err)
		select {
		case <-time.After(askPause):
		case <-ctx.Done():
			return
		}
	}
}

// learn has the voters say since when no earlier leader granted anything. Without an
// answer everything counts from the beginning of this leadership.
func (s *Service) learn(ctx context.Context, term uint64) error {
	c, err := s.grant.leader.LastConfirmed(ctx, term)
	if err == nil {
		s.grant.credit(term, c)
	}
	return err
}

// detect declares silent nodes lost, has them switched off, and readmits
// returning ones. run starts what takes longer.
func (s *Service) detect(ctx context.Context, term uint64, run func(func(context.Context))) {
	tick := time.NewTicker(detectEvery)
	defer tick.Stop()
	for {
		for _, id := range s.takeReturning() {
			if err := s.readmit(ctx, term, id); err != nil && ctx.Err() == nil {
				s.log.Warn("node not readmitted", "node", id, "err", err)
			}
		}
		s.grant.looks(term)
		for _, id := range s.grant.overdue(term, s.readyNodes()) {
			s.declareLost(ctx, term, id)
		}
		s.fenceSilent(term, run)
		s.lockOutSilent(term, run)
		s.noteCutOff(ctx, term)
		select {
		case <-tick.C:
		case <-s.kick:
		case <-ctx.Done():
			return
		}
	}
}

func (s *Service) readyNodes() []string {
	nodes, err := configdb.Nodes.List(s.db.Local())
	if err != nil {
		s.log.Error("nodes that cannot be read are not watched", "err", err)
	}
	var out []string
	for i := range nodes {
		// A node that is expected to be away is not missed while nothing depends on it.
		if nodes[i].Status.Phase == api.NodeReady && (nodes[i].Status.Absence == nil || hasProtected(s.db.Local(), nodes[i].Meta.ID)) {
			out = append(out, nodes[i].Meta.ID)
		}
	}
	return out
}

// declareLost marks a node, which is barred from leases, as lost. The bar is
// lifted only when it is known whether the mark was set.
func (s *Service) declareLost(ctx context.Context, term uint64, nodeID string) {
	silent, since := s.grant.leaseless(nodeID)
	for {
		_, err := s.markLost(ctx, term, nodeID, silent, since)
		switch {
		case err == nil:
			s.log.Warn("node lost", "node", nodeID, "silent", silent, "term", term)
			s.grant.settle(term, nodeID)
			return
		case errors.Is(err, configdb.ErrConflict), api.CodeOf(err) == api.CodeNotFound:
			// Decided and not set: another term, or the node was removed.
			s.grant.settle(term, nodeID)
			return
		}
		// Not known, or not possible now. The bar stays.
		s.log.Warn("node not declared lost", "node", nodeID, "err", err)
		select {
		case <-time.After(settleRetry):
		case <-ctx.Done():
			return
		}
	}
}

// readmit lets a lost node have leases again. Moves of its VMs required the
// status that this rewrites, so none can land after it.
func (s *Service) readmit(ctx context.Context, term uint64, nodeID string) error {
	if s.grant.aimedAt(term, nodeID) {
		return nil // it asks again when that has ended
	}
	s.grant.welcome(term, nodeID)
	_, err := configdb.Transact(ctx, s.db, Actor, 4, func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Get(v, nodeID)
		if err != nil || n.Status.Phase != api.NodeLost && n.Status.Fencing == "" {
			return err
		}
		tx.RequireTerm(term)
		if err := errors.Join(interruptAction(v, tx, n.Status.Fencing), noteReturnOf(v, tx, term, &n)); err != nil {
			return err
		}
		n.Status.Phase, n.Status.Message, n.Status.Fencing, n.Status.CutOff = api.NodeReady, "", "", nil
		return configdb.Nodes.UpdateStatus(v, tx, &n)
	})
	if err == nil {
		s.log.Info("node readmitted", "node", nodeID, "term", term)
	}
	return err
}

// markLost commits that a node is lost, with the evidence.
func (s *Service) markLost(ctx context.Context, term uint64, nodeID string, silent time.Duration, since api.SilenceSince) (uint64, error) {
	return configdb.Transact(ctx, s.db, Actor, 4, func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Get(v, nodeID)
		if err != nil || n.Status.Phase != api.NodeReady {
			return err
		}
		tx.RequireTerm(term)
		now := time.Now().UTC()
		f := api.NewFailover(&n, api.CauseLease, now)
		f.Spec.SilentMillis, f.Spec.Since = silent.Milliseconds(), since
		if err := s.noteLoss(tx, term, &n, f); err != nil {
			return err
		}
		n.Status.Phase, n.Status.LostAt, n.Status.LostTerm = api.NodeLost, &now, term
		n.Status.LostAction, n.Status.Fencing, n.Status.CutOff = "", "", nil
		n.Status.Message = fmt.Sprintf("no lease was renewed for %.1f s%s; its protected VMs are restarted elsewhere", silent.Seconds(), s.lastSeen(nodeID))
		return configdb.Nodes.UpdateStatus(v, tx, &n)
	})
}
