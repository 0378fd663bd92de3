// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// This file holds automatic starts back until the VMs that they are to follow are
// up; see "A start that waits for others" in ha/DESIGN.md.

const (
	// livingTime is how long this node must have held a lease before a node that
	// counts as ready is taken to live without a sign of its own: longer than a
	// leader takes to declare a silent one lost.
	livingTime = 20 * time.Second
	// eventNotAwaited tells of a start that waited in vain.
	eventNotAwaited = "vm.not-awaited"
)

// waiting is how long this life of the daemon has held a start back.
type waiting struct {
	since    time.Time
	revision uint64    // of the view at that time
	met      time.Time // when the last VM that it waits for was up; zero before
}

// holdBack makes the next start of a VM that was ended by what befell its host
// wait for others.
func (s *step) holdBack() {
	if len(s.vm.Spec.StartAfter().After) > 0 && s.vm.Spec.Power == api.PowerRunning {
		s.vm.Status.Awaits = &api.VMAwaits{Epoch: s.b.Spec.Epoch}
	}
}

// awaiting reports whether a start is held back. While it is, the status is
// written when the VMs that it waits for change, and not otherwise.
func (s *step) awaiting(ctx context.Context) (bool, error) {
	w := s.vm.Status.Awaits
	a := s.vm.Spec.StartAfter()
	if w == nil || w.Epoch != s.b.Spec.Epoch || s.vm.Spec.Power != api.PowerRunning || len(a.After) == 0 {
		s.vm.Status.Awaits = nil
		s.stopWaiting()
		return false, nil
	}
	if s.in.waiting.since.IsZero() {
		s.in.waiting = waiting{since: s.now, revision: s.v.Revision()}
		s.h.noteWaiting(s.vm.Meta.ID, true)
	}
	until := s.in.waiting.since.Add(a.Wait()).UTC()
	missing, counts := s.missing(&a)
	switch {
	case len(missing) > 0 && !s.now.Before(until):
		return true, s.waitedInVain(ctx, &a, missing)
	case len(missing) > 0:
		s.in.waiting.met = time.Time{}
		s.sayWaiting(missing, until, fmt.Sprintf("waits for %s, at most %v", upText(&a, missing), a.Wait()))
		s.lookAgain(until.Sub(s.now))
		return true, nil
	case counts && s.in.waiting.met.IsZero():
		s.in.waiting.met = s.now
	}
	if begin := s.in.waiting.met.Add(a.Delay()); counts && s.now.Before(begin) {
		s.sayWaiting(nil, begin.UTC(), fmt.Sprintf("%s up; it starts %v later", areText(a.After), a.Delay()))
		s.lookAgain(begin.Sub(s.now))
		return true, nil
	}
	s.vm.Status.Awaits = nil
	s.stopWaiting()
	return false, nil
}

func (s *step) stopWaiting() {
	if !s.in.waiting.since.IsZero() {
		s.in.waiting = waiting{}
		s.h.noteWaiting(s.vm.Meta.ID, false)
	}
}

// sayWaiting shows what a start waits for.
func (s *step) sayWaiting(missing []string, until time.Time, message string) {
	was := s.vm.Status.Awaits
	if was.Until == nil || !slices.Equal(was.VMs, missing) || !was.Until.Equal(until) {
		s.vm.Status.Awaits = &api.VMAwaits{Epoch: was.Epoch, VMs: missing, Until: &until}
	}
	s.wait(api.VMStarting, message+" (until "+until.Format("15:04:05")+" UTC); muster vm start "+s.vm.Meta.Name+" starts it now")
}

// waitedInVain lets a VM start although others are not up, and says so.
func (s *step) waitedInVain(ctx context.Context, a *api.StartAfter, missing []string) error {
	tx := &configdb.Txn{Actor: actor}
	s.vm.Status.Awaits = nil
	e := api.NewEvent(eventNotAwaited, api.SeverityWarning, api.KindVM, s.vm.Meta,
		fmt.Sprintf("vm %s starts on node %s although it waited %v in vain for %s", s.vm.Meta.Name, s.h.cfg.NodeName, a.Wait(), upText(a, missing)), s.now)
	e.Spec.Node, e.Spec.Details = s.h.cfg.NodeName, map[string]string{"waitedFor": strings.Join(missing, ",")}
	if err := configdb.Events.CreateUnnamed(tx, &e); err != nil {
		return err
	}
	s.conditions()
	if err := configdb.VMs.UpdateStatus(s.v, tx, &s.vm); err != nil {
		return err
	}
	if err := s.commit(ctx, tx); err != nil {
		return err
	}
	s.stopWaiting()
	s.silent = true
	s.result.After = attachRetry
	return nil
}

func upText(a *api.StartAfter, missing []string) string {
	what := "to run"
	if a.AfterCondition == api.AfterHealthy {
		what = "to run and its guest agent to answer"
		if len(missing) > 1 {
			what = "to run and their guest agents to answer"
		}
	}
	return strings.Join(missing, ", ") + " " + what
}

func areText(names []string) string {
	if len(names) == 1 {
		return names[0] + " is"
	}
	return strings.Join(names, ", ") + " are"
}

// missing are the VMs that are not up yet; counts is whether one counts at all.
func (s *step) missing(a *api.StartAfter) (missing []string, counts bool) {
	for _, name := range a.After {
		vm, err := configdb.VMs.Find(s.v, s.vm.Meta.Project, name)
		if err != nil && api.IgnoreNotFound(err) == nil || err == nil && (vm.Meta.Deleting() || vm.Spec.Power != api.PowerRunning) {
			continue // gone, or not meant to run
		}
		counts = true
		if err != nil || !s.isUp(&vm, a.AfterCondition) {
			missing = append(missing, name)
		}
	}
	return missing, counts
}

// isUp reports whether a VM runs, as far as this node can tell from its replica.
// The status of one whose node is dead says that it runs until that node is
// declared lost, and after a power cut until its node has looked.
func (s *step) isUp(vm *api.VM, c api.AfterCondition) bool {
	b, err := configdb.Bindings.Get(s.v, vm.Meta.ID)
	if err != nil || vm.Status.Phase != api.VMRunning || vm.Status.Epoch != b.Spec.Epoch || c == api.AfterHealthy && vm.Status.Agent == nil {
		return false
	}
	if b.Spec.NodeID == s.h.cfg.NodeID {
		p, ok := s.procs[vm.Meta.ID]
		return ok && p.State == ProcessRunning && p.PID == vm.Status.PID
	}
	n, err := configdb.Nodes.Get(s.v, b.Spec.NodeID)
	if err != nil || n.Status.Phase != api.NodeReady {
		return false
	}
	return vm.Meta.StatusRevision > s.in.waiting.revision || s.h.leaseHeld(s.now) >= livingTime
}

// noteLease remembers since when the present lease session lasts, under h.mu.
func (h *Hypervisor) noteLease(session uint64) {
	if h.leaseSession != session {
		h.leaseSession, h.leaseSince = session, h.cfg.Now()
	}
}

func (h *Hypervisor) leaseHeld(now time.Time) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.leaseSince.IsZero() {
		return 0
	}
	return now.Sub(h.leaseSince)
}

func (h *Hypervisor) noteWaiting(id string, on bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if on {
		h.awaiting[id] = true
	} else {
		delete(h.awaiting, id)
	}
}

// heldBackVMs names the VMs whose starts wait for others, because one of those
// may be what changed.
func (h *Hypervisor) heldBackVMs(*configdb.View, configdb.Change) (out []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for id := range h.awaiting {
		out = append(out, id)
	}
	return out
}
