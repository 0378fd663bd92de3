// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// This file is the owner's part of "A start that fails", ha/DESIGN.md: what is
// tried is committed before, so that a leader that moves the VM on because it was
// given up can never meet a start of it.

// triesAlone is how long an owner waits for a leader that finds another node
// before it tries again itself: one of an older version never answers.
const triesAlone = 5 * time.Minute

// counted reports whether the starts of the VM are counted.
func (s *step) counted() bool {
	return s.vm.Spec.HA == api.HARestart && s.vm.Spec.Power != api.PowerStopped && s.vm.Spec.Power != api.PowerSuspended && !s.vm.Meta.Deleting()
}

// heldBack reports whether nothing is to be started here.
func (s *step) heldBack() bool {
	if !api.GivenUp(&s.vm, s.b.Spec.Epoch) {
		return false
	}
	t := api.TriesOf(&s.vm, s.b.Spec.Epoch)
	alone := triesAlone
	if t.Drill {
		alone = drillAlone
	}
	if t.At != nil && s.now.Sub(*t.At) > alone {
		return false // beginTry takes it back, before anything is started
	}
	s.silent = true // the status says it all
	s.result.After = waitLook
	return true
}

// beginTry commits that a start begins. Unless that is certain, none does.
func (s *step) beginTry(ctx context.Context) error {
	if !s.counted() {
		return nil
	}
	t := api.TriesOf(&s.vm, s.b.Spec.Epoch)
	if t.GivenUp {
		t.GivenUp, t.Drill, t.Failed = false, false, 0
	}
	t.Begun++
	was := s.vm.Status.Phase
	s.vm.Status.Tries = &t
	if was != api.VMCreating && was != "" {
		s.report(api.VMStarting, "QEMU is being started")
	}
	s.conditions()
	tx := &configdb.Txn{Actor: actor}
	if err := configdb.VMs.UpdateStatus(s.v, tx, &s.vm); err != nil {
		return err
	}
	return s.commit(ctx, tx)
}

// noteTries counts a start that failed, and gives the VM up after as many as its
// spec says.
func (s *step) noteTries() {
	if !s.counted() || s.vm.Status.Phase == api.VMRunning || s.vm.Status.Phase == api.VMPaused {
		s.vm.Status.Tries = nil
		return
	}
	if !s.startFailed || s.in.unsure.Load() || s.proc != nil && s.proc.State != ProcessExited {
		return
	}
	t := api.TriesOf(&s.vm, s.b.Spec.Epoch)
	if t.GivenUp {
		return
	}
	if t.Failed++; t.Failed >= s.vm.Spec.StartAttempts() {
		at := s.now.UTC()
		t.GivenUp, t.At = true, &at
		if !slices.Contains(t.Nodes, s.b.Spec.NodeID) {
			t.Nodes = append(t.Nodes, s.b.Spec.NodeID)
		}
		s.vm.Status.Message += fmt.Sprintf(" (given up here after %d attempts; another node is looked for)", t.Failed)
		s.h.log.Warn("a VM is given up, so that another node starts it", "vm", s.vm.Meta.ID, "attempts", t.Failed, "why", s.vm.Status.Message)
	}
	s.vm.Status.Tries = &t
}
