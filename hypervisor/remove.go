// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// remove takes one step in the end of a VM: kill QEMU, give back its volumes
// and mark those that were made with it for deletion, wait until they are gone,
// then remove the object with its binding.
func (s *step) remove(ctx context.Context) error {
	id := s.vm.Meta.ID
	s.report(api.VMDeleting, "")
	if s.proc != nil && s.proc.State != ProcessExited {
		if err := s.h.kill(ctx, id); err != nil {
			return fmt.Errorf("end vm %s before its deletion: %w", s.vm.Meta.Name, err)
		}
	}
	if w := s.in.work; w != nil && !w.ended() {
		// It may be about to write to a volume that somebody else has next.
		s.in.stopWork()
		s.silent = true
		s.result.After = lookSoon
		return nil
	}
	s.in.detach()
	s.ended()
	if err := s.h.endTPM(ctx, id); err != nil {
		return err
	}
	if len(s.vm.Meta.Finalizers) > 0 {
		s.report(api.VMDeleting, "waiting for "+strings.Join(s.vm.Meta.Finalizers, ", "))
		return nil
	}
	s.forgetTags(ctx)
	left, err := s.giveBack(ctx)
	if err != nil {
		return err
	}
	if len(left) > 0 {
		s.report(api.VMDeleting, "waiting for the deletion of volume "+strings.Join(left, ", "))
		s.result.After = waitLook
		return nil
	}
	s.silent = true
	if len(s.vm.Spec.NICs) > 0 {
		s.h.unplug(ctx, id)
	}
	tx := &configdb.Txn{Actor: actor}
	configdb.ReleaseNICs(s.v, tx, &s.vm)
	configdb.ReleaseMachine(s.v, tx, &s.vm)
	configdb.ForgetLetGo(s.v, tx, &s.vm)
	if err := s.dropSnapshots(tx); err != nil {
		return err
	}
	configdb.ForgetDetached(s.v, tx, id)
	if d, err := configdb.Drills.Get(s.v, id); err == nil {
		configdb.Drills.DeleteUnnamed(tx, &d)
	}
	configdb.VMs.Delete(tx, &s.vm)
	configdb.Bindings.DeleteUnnamed(tx, &s.b)
	if op, err := configdb.Operations.Get(s.v, id); err == nil {
		configdb.Operations.DeleteUnnamed(tx, &op)
	}
	if a, err := configdb.Arrivals.Get(s.v, id); err == nil {
		configdb.Arrivals.DeleteUnnamed(tx, &a)
	}
	if err := s.commit(ctx, tx); err != nil {
		return err
	}
	s.h.log.Info("VM deleted", "vm", id, "name", s.vm.Meta.Name)
	return s.cleanUp(ctx)
}

// giveBack releases every volume that the VM referred to and marks its own for
// deletion, in one transaction. QEMU is dead by now, so nothing writes to them.
// It returns the names of its own volumes that still exist.
func (s *step) giveBack(ctx context.Context) (left []string, err error) {
	id := s.vm.Meta.ID
	volumes, err := configdb.Volumes.List(s.v)
	if err != nil {
		return nil, err
	}
	tx := &configdb.Txn{Actor: actor}
	owner := string(api.KindVM) + "/" + id
	for i := range volumes {
		vol := &volumes[i]
		ref := configdb.Volumes.RefPrefix(vol.Meta.ID) + owner
		if _, ok := s.v.Get(ref); ok {
			configdb.Volumes.Release(tx, vol.Meta.ID, api.KindVM, id)
		}
		if vol.Meta.Owner != owner {
			continue
		}
		if slices.ContainsFunc(configdb.Volumes.Referrers(s.v, vol.Meta.ID), func(by string) bool { return by != owner }) {
			vol.Meta.Owner = "" // it is another VM's disk by now
			if err := configdb.Volumes.UpdateSpec(s.v, tx, vol); err != nil {
				return nil, err
			}
			continue
		}
		left = append(left, vol.Meta.Name)
		s.h.awaitVolume(vol.Meta.ID, id)
		if vol.Meta.Deleting() {
			continue
		}
		now := s.now.UTC()
		vol.Meta.DeletingAt = &now
		if err := configdb.Volumes.UpdateSpec(s.v, tx, vol); err != nil {
			return nil, err
		}
	}
	return left, s.commit(ctx, tx)
}

// awaitVolume makes the end of a volume wake the VM: its references are gone by
// then.
func (h *Hypervisor) awaitVolume(volume, vm string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.waiting[volume] = vm
}

// cleanUp removes what the host keeps of a VM that is gone. What fails is tried
// again when the process table is looked at next.
func (s *step) cleanUp(ctx context.Context) error {
	id := s.vm.Meta.ID
	s.h.drop(id)
	err := os.RemoveAll(s.h.pathsOf(id).dir)
	return errors.Join(s.h.forget(ctx, id), err, s.h.unmark(id))
}
