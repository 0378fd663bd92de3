// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// Limits of switching nodes off; see DESIGN.md.
const (
	// FenceAfter is the silence after which a node may be switched off: half the
	// lease, so that one request that hangs and the next one fit in.
	FenceAfter = LeaseDuration / 2
	// fenceLimit bounds one attempt: then the lease has ended anyhow.
	fenceLimit = LostAfter - FenceAfter
	// fencePause is the least time between two attempts at one node, by the wall
	// clock: a matter of manners, not of safety.
	fencePause = 10 * time.Minute
	// asleepAfter is the pause between two looks for silent nodes after which this leader
	// was asleep.
	asleepAfter = 5 * detectEvery
	// maxFences is how many nodes are switched off at once.
	maxFences = 4
)

// Fencer switches nodes off by their power devices.
type Fencer interface {
	// Can reports whether a node has a device that is used.
	Can(v *configdb.View, nodeID string) bool
	// Off commands off and returns nil only if a device was read back as off
	// twice after that. It calls before right before each command and gives none
	// if that fails. The steps are the evidence, in any case.
	Off(ctx context.Context, nodeID string, before func(context.Context) error) ([]api.PowerStep, error)
}

// hear notes that a node asked: it lives.
func (g *grantor) hear(term uint64, nodeID string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.enter(term) {
		g.heard[nodeID] = g.now()
		if next := g.locking[nodeID]; next > 0 {
			g.locking[nodeID] = min(next, g.now()+lockOutPause) // it may have VMs again
		}
	}
}

// quiet returns how long nothing was heard of a node, at most the age of this
// leadership, or of the node that led before, a bit more. It is called with the lock held.
func (g *grantor) quiet(nodeID string) time.Duration {
	since := g.since
	if nodeID == g.former && !g.slept {
		since = max(g.earlier, g.since-maxFenceCredit)
	}
	return g.now() - max(since, g.granted[nodeID], g.heard[nodeID])
}

// looks notes that this leader looks for silent nodes. If it has not for a while it was
// asleep itself, as perhaps before, when it was elected: the node that led has as long to
// be heard as all.
func (g *grantor) looks(term uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.enter(term) {
		g.slept = g.slept || g.now()-g.looked > asleepAfter
		g.looked = g.now()
	}
}

// silentOf returns those that have been silent for FenceAfter.
func (g *grantor) silentOf(term uint64, nodes []string) []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.enter(term) {
		return nil
	}
	var out []string
	for _, id := range nodes {
		if g.quiet(id) > FenceAfter {
			out = append(out, id)
		}
	}
	return out
}

// aim bars a node from leases, if it is still silent and nobody aims at it,
// and at no more than maxFences at once.
func (g *grantor) aim(term uint64, nodeID string) (silent time.Duration, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.enter(term) || g.barred[nodeID] || g.fenced[nodeID] || len(g.fenced) >= maxFences {
		return 0, false
	}
	if silent = g.quiet(nodeID); silent <= FenceAfter {
		return silent, false
	}
	g.fenced[nodeID] = true
	return silent, true
}

// aimedAt reports whether a node is being switched off in this term.
func (g *grantor) aimedAt(term uint64, nodeID string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.term == term && g.fenced[nodeID]
}

// lower lifts the bar of aim, once the outcome is known.
func (g *grantor) lower(term uint64, nodeID string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.term == term {
		delete(g.fenced, nodeID)
	}
}

// fenceSilent switches silent nodes off, where that is allowed. run starts an
// attempt, which takes seconds.
func (s *Service) fenceSilent(term uint64, run func(attempt func(context.Context))) {
	if s.fencer == nil {
		return
	}
	v := s.db.Local()
	nodes, err := configdb.Nodes.List(v)
	if err != nil {
		return // readyNodes says so
	}
	alive, silent, tooMany := s.silentAmong(term, nodes)
	if tooMany || len(silent) == 0 {
		if tooMany && !s.heldBack {
			s.log.Warn("no node is switched off: more than half are silent, so it is this one that is cut off", "silent", len(silent), "nodes", len(alive))
		}
		s.heldBack = tooMany
		return
	}
	s.heldBack = false
	for _, id := range silent {
		n := alive[id]
		if !s.mayFence(v, n) {
			continue
		}
		quiet, ok := s.grant.aim(term, id)
		if !ok {
			continue
		}
		a := api.NewPowerAction(n, api.PowerOff, api.TriggerHA, time.Now())
		a.Spec.Actor, a.Spec.Term, a.Spec.Via = Actor, term, s.name
		a.Spec.Reason = fmt.Sprintf("nothing was heard of it for %.1f s", quiet.Seconds())
		run(func(ctx context.Context) { s.fence(ctx, term, a, quiet) })
	}
}

// silentAmong are the nodes that should live, by ID, and those of them that are
// silent, in order. If tooMany are it is this node that is cut off, or was asleep.
func (s *Service) silentAmong(term uint64, nodes []api.Node) (alive map[string]*api.Node, silent []string, tooMany bool) {
	alive = map[string]*api.Node{}
	var ids []string
	for i := range nodes {
		if nodes[i].Status.Phase == api.NodeReady {
			alive[nodes[i].Meta.ID] = &nodes[i]
			ids = append(ids, nodes[i].Meta.ID)
		}
	}
	silent = s.grant.silentOf(term, ids)
	return alive, silent, 2*len(silent) > len(ids)
}

// mayFence reports whether a silent node is one that may be switched off, and
// whether that is of use.
func (s *Service) mayFence(v *configdb.View, n *api.Node) bool {
	id := n.Meta.ID
	if id == s.nodeID || n.Spec.Role == api.RoleWitness || n.Spec.Maintenance || n.Meta.Deleting() || n.Status.Stopping || !s.fencer.Can(v, id) {
		return false
	}
	if _, later := v.Get(configdb.LaterLifeKey(id)); later {
		return false
	}
	return hasProtected(v, id) && !triedLately(v, id, time.Now())
}

func hasProtected(v *configdb.View, nodeID string) bool {
	bindings, _ := configdb.Bindings.List(v) // what cannot be decoded is logged by its own reconcile
	for i := range bindings {
		if bindings[i].Spec.NodeID == nodeID && bindings[i].Spec.Protected {
			return true
		}
	}
	return false
}

// triedLately reports whether an attempt at the node ended within fencePause.
// One that was broken off says nothing, nor does one that lies further ahead: it was
// made by another clock, or the clock was set back.
func triedLately(v *configdb.View, nodeID string, now time.Time) bool {
	actions, _ := configdb.PowerActions.List(v)
	for i := range actions {
		a := &actions[i]
		ended := a.Status.Phase == api.PowerActionConfirmed || a.Status.Phase == api.PowerActionFailed
		if a.Spec.NodeID == nodeID && a.Spec.Trigger == api.TriggerHA && ended && now.Sub(a.Spec.At).Abs() < fencePause {
			return true
		}
	}
	return false
}

var errNotMarked = errors.New("the node is not to be switched off any more")

// fence is one attempt at a node, which is barred from leases. The bar is
// lifted when the outcome is known.
func (s *Service) fence(ctx context.Context, term uint64, a api.PowerAction, quiet time.Duration) {
	id := a.Spec.NodeID
	if !s.markFencing(ctx, term, &a, quiet) {
		return
	}
	s.log.Warn("node is being switched off", "node", a.Spec.Node, "action", a.Meta.ID, "why", a.Spec.Reason, "term", term)
	octx, cancel := context.WithTimeout(ctx, fenceLimit)
	steps, err := s.fencer.Off(octx, id, func(ctx context.Context) error {
		if err := s.grant.leader.Confirm(ctx, term); err != nil {
			return fmt.Errorf("leadership is not confirmed: %w", err)
		}
		n, err := configdb.Nodes.Get(s.db.Local(), id)
		if err == nil && (n.Status.Fencing != a.Meta.ID || n.Status.Phase != api.NodeReady) {
			err = errNotMarked
		}
		return err
	})
	cancel()
	s.endFencing(ctx, term, &a, quiet, steps, err)
}

// markFencing commits the mark and the record. If it returns false, the attempt
// is over and the bar is lifted, unless nobody knows whether there is a mark.
func (s *Service) markFencing(ctx context.Context, term uint64, a *api.PowerAction, quiet time.Duration) bool {
	_, err := configdb.Transact(ctx, s.db, Actor, 4, func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Get(v, a.Spec.NodeID)
		if err != nil {
			return err
		}
		if n.Status.Phase != api.NodeReady || !s.mayFence(v, &n) {
			return errNotMarked
		}
		tx.RequireTerm(term)
		// Nobody has put it into maintenance meanwhile.
		tx.RequireRevision(configdb.Nodes.SpecKey(n.Meta.ID), n.Meta.Revision)
		if err := interruptAction(v, tx, n.Status.Fencing); err != nil {
			return err
		}
		n.Status.Fencing = a.Meta.ID
		made := a.Clone()
		return errors.Join(configdb.PutPowerAction(v, tx, &made), configdb.Nodes.UpdateStatus(v, tx, &n))
	})
	switch {
	case err == nil:
		return true
	case errors.Is(err, configdb.ErrConflict), errors.Is(err, errNotMarked), api.CodeOf(err) == api.CodeNotFound:
		s.grant.lower(term, a.Spec.NodeID)
		return false
	}
	s.log.Warn("node not switched off, because that cannot be recorded", "node", a.Spec.Node, "err", err)
	s.endFencing(ctx, term, a, quiet, nil, err)
	return false
}

// interruptAction completes the record of an attempt that its leader did not.
func interruptAction(v *configdb.View, tx *configdb.Txn, id string) error {
	if id == "" {
		return nil
	}
	a, err := configdb.PowerActions.Get(v, id)
	if err != nil || a.Status.Phase != api.PowerActionRunning {
		return api.IgnoreNotFound(err)
	}
	api.EndPowerAction(&a, api.PowerActionInterrupted, "the leader changed before it was confirmed; it counts for nothing", nil, time.Now())
	return configdb.PowerActions.UpdateStatus(v, tx, &a)
}

// endFencing commits what came of an attempt: the node is lost if it was
// confirmed, and its mark goes in any case. It goes on until that is known.
func (s *Service) endFencing(ctx context.Context, term uint64, a *api.PowerAction, quiet time.Duration, steps []api.PowerStep, failed error) {
	phase, message := api.PowerActionConfirmed, "the node was switched off and read back as off twice"
	if failed != nil {
		phase, message = api.PowerActionFailed, failed.Error()
	}
	ended := time.Now()
	for {
		lost := false
		_, err := configdb.Transact(ctx, s.db, Actor, 4, func(v *configdb.View, tx *configdb.Txn) error {
			lost = false
			tx.RequireTerm(term)
			if done, err := configdb.PowerActions.Get(v, a.Meta.ID); err == nil && done.Status.Phase == api.PowerActionRunning {
				api.EndPowerAction(&done, phase, message, steps, ended)
				if err := configdb.PowerActions.UpdateStatus(v, tx, &done); err != nil {
					return err
				}
			}
			n, err := configdb.Nodes.Get(v, a.Spec.NodeID)
			if err != nil || n.Status.Fencing != a.Meta.ID {
				return api.IgnoreNotFound(err)
			}
			n.Status.Fencing = ""
			if failed == nil && n.Status.Phase == api.NodeReady {
				lost = true
				at := ended.UTC()
				f := api.NewFailover(&n, api.CausePower, at)
				f.Spec.SilentMillis, f.Spec.Since = quiet.Milliseconds(), api.SinceGrant
				f.Spec.Power = &api.FailoverPower{Action: a.Meta.ID, BeganAt: a.Spec.At, EndedAt: at, Steps: steps}
				if err := s.noteLoss(tx, term, &n, f); err != nil {
					return err
				}
				n.Status.Phase, n.Status.LostAt, n.Status.LostTerm, n.Status.LostAction = api.NodeLost, &at, term, a.Meta.ID
				n.Status.Message = "it fell silent and was switched off, which its power device confirms; its protected VMs are restarted elsewhere"
			}
			return configdb.Nodes.UpdateStatus(v, tx, &n)
		})
		if err == nil || errors.Is(err, configdb.ErrConflict) {
			// Known: written, or of another term.
			s.log.Warn("attempt to switch a node off has ended", "node", a.Spec.Node, "action", a.Meta.ID, "confirmed", failed == nil, "lost", lost && err == nil, "message", message)
			s.grant.lower(term, a.Spec.NodeID)
			return
		}
		s.log.Warn("outcome of switching a node off not recorded", "node", a.Spec.Node, "err", err)
		select {
		case <-time.After(settleRetry):
		case <-ctx.Done():
			return
		}
	}
}
