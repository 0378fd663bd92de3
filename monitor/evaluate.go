// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package monitor

import (
	"context"
	"errors"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/monitor/alert"
)

// evaluateLoop looks at the rules when something changed, and now and then.
func (s *Service) evaluateLoop(ctx context.Context, term uint64) {
	tick := time.NewTicker(s.timing.evaluate)
	defer tick.Stop()
	var lastRevision uint64
	var last time.Time
	pending := true
	told := ""
	for {
		rev := s.db.Local().Revision()
		if s.takeDirty() || pending || rev != lastRevision || time.Since(last) >= idleEvaluate {
			var err error
			lastRevision, last = rev, time.Now()
			pending, err = s.evaluate(ctx, term)
			switch {
			case err == nil:
				told = ""
			case ctx.Err() == nil && !errors.Is(err, configdb.ErrConflict) && err.Error() != told:
				told = err.Error()
				s.log.Warn("alerts not evaluated", "err", err)
			}
			if err != nil {
				pending = true // again at the next tick
			}
		}
		select {
		case <-tick.C:
		case <-s.kick:
			// Changes come in bursts: what follows within a tick is looked at
			// together, so that one loss is one message.
			if !sleepTick(ctx, tick) {
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

func sleepTick(ctx context.Context, tick *time.Ticker) bool {
	select {
	case <-tick.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func (s *Service) takeDirty() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.dirty
	s.dirty = false
	return d
}

// evaluate looks once and commits what changed. pending reports that time
// alone may change something.
func (s *Service) evaluate(ctx context.Context, term uint64) (pending bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	v := s.db.Local()
	rules, err := configdb.Rules.List(v)
	if err != nil {
		s.log.Error("rules that cannot be read are not evaluated", "err", err)
	}
	f := s.facts(ctx, v)
	before, err := alertsByID(v)
	if err != nil {
		return true, err // resolving what cannot be read would be wrong
	}
	changes := alert.Evaluate(rules, f, before)
	for _, a := range before {
		pending = pending || a.Status.Phase == api.AlertPending
	}
	for _, vm := range f.VMs {
		pending = pending || !vm.CrashedAt.IsZero() && f.Now.Sub(vm.CrashedAt) < time.Hour
	}
	if len(changes) == 0 {
		return pending, nil
	}
	n := min(len(changes), maxChanges)
	if err := s.commit(ctx, v, term, changes[:n]); err != nil {
		return true, err
	}
	wake(s.tell)
	return true, nil
}

func alertsByID(v *configdb.View) (map[string]api.Alert, error) {
	all, err := configdb.Alerts.List(v)
	out := make(map[string]api.Alert, len(all))
	for i := range all {
		out[all[i].Meta.ID] = all[i]
	}
	return out, err
}

// commit writes changes of alerts with their events in one transaction, so
// that all have the same time and go out as one message.
func (s *Service) commit(ctx context.Context, v *configdb.View, term uint64, changes []alert.Change) error {
	tx := &configdb.Txn{Actor: Actor}
	tx.RequireTerm(term)
	for i := range changes {
		c := &changes[i]
		a := &c.Alert
		var err error
		switch {
		case c.Delete:
			configdb.Alerts.DeleteUnnamed(tx, a)
		case c.Create:
			err = configdb.Alerts.CreateUnnamed(tx, a)
		default:
			if c.Spec {
				err = configdb.Alerts.UpdateSpec(v, tx, a)
			}
			if err == nil {
				err = configdb.Alerts.UpdateStatus(v, tx, a)
			}
		}
		if err != nil {
			return err
		}
		if err := s.emitAlert(tx, c); err != nil {
			return err
		}
	}
	_, err := s.db.Txn(ctx, tx)
	if err == nil {
		for i := range changes {
			if c := &changes[i]; c.Entered != "" {
				s.log.Info("alert", "rule", c.Alert.Spec.Rule, "target", c.Alert.Spec.Target, "phase", c.Entered, "message", c.Alert.Status.Message)
			}
		}
	}
	return err
}

func (s *Service) emitAlert(tx *configdb.Txn, c *alert.Change) error {
	if c.Delete || c.Entered != api.AlertFiring && c.Entered != api.AlertResolved {
		return nil
	}
	a := &c.Alert
	severity := a.Spec.Severity
	if c.Entered == api.AlertResolved {
		severity = api.SeverityInfo
	}
	e := api.NewEvent("alert."+string(c.Entered), severity, a.Spec.TargetKind, api.Meta{ID: a.Spec.TargetID, Name: a.Spec.Target}, a.Status.Message, s.now())
	e.Spec.Details = map[string]string{"rule": a.Spec.Rule, "alert": a.Meta.ID}
	return configdb.PutEvent(tx, &e)
}

// facts collects what the rules look at.
func (s *Service) facts(ctx context.Context, v *configdb.View) alert.Facts {
	f := alert.Facts{Now: s.now(), Leader: s.cfg.NodeName, Probes: map[string]alert.Probe{}}
	s.mu.Lock()
	for _, n := range s.nodes {
		f.Nodes = append(f.Nodes, n)
	}
	for _, vm := range s.vms {
		f.VMs = append(f.VMs, vm)
	}
	for id, p := range s.probes {
		if time.Since(p.at) < probeFresh {
			f.Probes[id] = p.Probe
		}
	}
	s.mu.Unlock()
	sortFacts(&f)
	members, err := s.cfg.Members.Members(ctx)
	if err != nil {
		s.log.Warn("members not known", "err", err) // quorum-margin says unknown
	}
	f.Members = withPhases(members, f.Nodes)
	f.Pools = s.pools(v, f)
	if f.Drills, err = configdb.Drills.List(v); err != nil {
		s.log.Warn("drills cannot be read", "err", err)
	}
	return f
}

// withPhases takes the phases from the facts, so that all rules of one
// evaluation see the same state of a node.
func withPhases(members []api.MemberStatus, nodes []alert.Node) []api.MemberStatus {
	out := make([]api.MemberStatus, 0, len(members))
	for _, m := range members {
		for i := range nodes {
			if nodes[i].ID == m.NodeID {
				m.Phase = nodes[i].Phase
			}
		}
		out = append(out, m)
	}
	return out
}

// pools says how full the pools are: as the nodes measured just now, else as
// they last wrote, which is in coarse steps.
func (s *Service) pools(v *configdb.View, f alert.Facts) []alert.Pool {
	pools, err := configdb.Pools.List(v)
	if err != nil {
		s.log.Warn("pools that cannot be read are not watched", "err", err)
	}
	states, err := configdb.PoolStates.List(v)
	if err != nil {
		s.log.Warn("states of pools that cannot be read are not watched", "err", err)
	}
	byPool := map[string][]api.PoolState{}
	for _, st := range states {
		byPool[st.Spec.PoolID] = append(byPool[st.Spec.PoolID], st)
	}
	var out []alert.Pool
	for _, p := range pools {
		shared := alert.Pool{ID: p.Meta.ID, Name: p.Meta.Name, Unknown: true}
		for _, st := range byPool[p.Meta.ID] {
			one := alert.Pool{ID: p.Meta.ID + "/" + st.Spec.NodeID, Name: p.Meta.Name + " on " + st.Status.Node}
			if one.Unknown = !st.Status.Ready || st.Status.Total <= 0; !one.Unknown {
				one.Percent = 100 * float64(st.Status.Total-st.Status.Free) / float64(st.Status.Total)
				if measured, ok := poolSample(f.Probes[st.Spec.NodeID], p.Meta.Name); ok {
					one.Percent = measured
				}
			}
			switch {
			case !p.Spec.Shared():
				out = append(out, one)
			case !one.Unknown: // one file system, seen by many: the worst view counts
				shared.Unknown, shared.Percent = false, max(shared.Percent, one.Percent)
			}
		}
		if p.Spec.Shared() {
			out = append(out, shared)
		}
	}
	return out
}
