// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/feature"
)

// guarding are the pools from which this node can be locked out to keep the VM from
// writing, so that its guard need not kill it with the lease; none if that is not
// enough, or not yet. A VM that has begun is under the guard's kill until its QEMU
// has opened its disks.
func (s *step) guarding(protected bool) []string {
	if !protected || !feature.StorageGuard.InForce(s.v) {
		return nil
	}
	pools := configdb.GuardingPools(s.v, &s.vm)
	if len(pools) == 0 || slices.Equal(pools, s.b.Spec.Guarding()) {
		return pools
	}
	if _, _, lease := s.h.cfg.Lease.Current(); !lease || !s.in.wasUp || s.vm.Status.Hardware == nil {
		return nil // what its QEMU has open is not known yet
	}
	for _, id := range pools {
		if !configdb.MayPromise(s.v, s.h.cfg.NodeID, id) {
			return nil
		}
	}
	return pools
}

// release frees the volumes before a start, unless the QEMU before ended in order. One
// that was killed leaves locks that the next would wait for, and another one, which
// should not be there, is locked out by it.
func (s *step) release(ctx context.Context) bool {
	if s.in.cleanEnd {
		return true
	}
	for _, name := range s.vm.Spec.Volumes() {
		if !s.stillOurs() {
			s.silent = true
			s.result.After = attachRetry
			return false
		}
		if err := s.h.cfg.Volumes.Release(ctx, s.v, s.vm.Meta.Project, name); err != nil {
			s.wait(api.VMStarting, fmt.Sprintf("waiting: volume %q is not free: %v", name, err))
			return false
		}
	}
	return true
}

// stillOurs reports that this node may start the VM as far as it knows at this
// moment: whoever has it since would be locked out of its volumes.
func (s *step) stillOurs() bool {
	_, revision, lease := s.h.cfg.Lease.Current()
	v := s.h.cfg.DB.Local()
	_, err := s.h.boundHere(v, s.vm.Meta.ID, s.b.Spec.Epoch)
	return lease && v.Revision() >= revision && err == nil
}

// lockedOut returns why this node may not use a pool of the VM.
func (h *Hypervisor) lockedOut(v *configdb.View, vm *api.VM) (why string, out bool) {
	n, err := configdb.Nodes.Get(v, h.cfg.NodeID)
	if err != nil {
		return "", false
	}
	f, out := configdb.LockedOutOf(v, &n, vm)
	if !out {
		return "", false
	}
	return fmt.Sprintf("this node is locked out of pool %s (%s)", f.Pool, f.Reason), true
}

// lockedOutText is how QEMU words ESHUTDOWN, with which a Ceph cluster answers a client
// that it has locked out. That client never gets in again.
const lockedOutText = "transport endpoint shutdown"

// maxIOReason is the longest reason that is kept of what QEMU says.
const maxIOReason = 200

// noteIOError keeps why a disk failed (QAPI BLOCK_IO_ERROR).
func (in *instance) noteIOError(data any) {
	m, _ := data.(map[string]any)
	reason, _ := m["reason"].(string)
	in.mu.Lock()
	defer in.mu.Unlock()
	in.ioReason = reason[:min(len(reason), maxIOReason)]
}

// ioError is why a disk failed last, and whether this QEMU, though not this node, is
// locked out of the disk's pool.
func (in *instance) ioError() (reason string, out bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.ioReason, strings.Contains(in.ioReason, lockedOutText)
}

// Quiet reports that no process that may use the pool is left or about to be
// started; with a fence in the database none will be. Otherwise it says what is left,
// and has that looked at.
func (h *Hypervisor) Quiet(ctx context.Context, poolID string) (left string, err error) {
	h.gate.Lock()
	defer h.gate.Unlock()
	v := h.cfg.DB.Local()
	n, err := configdb.Nodes.Get(v, h.cfg.NodeID)
	if err != nil {
		return "", err
	}
	if _, fenced := n.Status.FenceOf(poolID); !fenced {
		return "", fmt.Errorf("this node's copy of the database has no fence for pool %s", poolID)
	}
	h.procs.invalidate()
	procs, err := h.procs.get(ctx)
	if err != nil {
		return "", err
	}
	using := map[string]bool{}
	for id, p := range procs {
		if p.State != ProcessExited && h.mayUse(v, id, p.Epoch, poolID) {
			using[id] = true
		}
	}
	h.mu.Lock()
	for id, in := range h.instances {
		if in.unsure.Load() {
			using[id] = true
		}
	}
	h.mu.Unlock()
	var names []string
	for id := range using {
		name := id
		if vm, err := configdb.VMs.Get(v, id); err == nil {
			name = vm.Meta.Name
		}
		names = append(names, name)
		h.loop.Enqueue(id)
	}
	slices.Sort(names)
	if more := len(names) - maxLeft; more > 0 {
		names = append(names[:maxLeft], fmt.Sprintf("%d more", more))
	}
	if len(names) > 0 {
		left = "processes of VMs are left: " + strings.Join(names, ", ")
	}
	return left, nil
}

// maxLeft is how many VMs are named that stand in the way.
const maxLeft = 8

// mayUse reports whether the process of a VM may have disks in a pool. What the
// database says of a VM is true for the process only that runs under its binding, and
// after its hardware was reported.
func (h *Hypervisor) mayUse(v *configdb.View, id string, epoch uint64, poolID string) bool {
	vm, err := configdb.VMs.Get(v, id)
	if err != nil || vm.Status.Hardware == nil {
		return true
	}
	b, err := configdb.Bindings.Get(v, id)
	if err != nil || b.Spec.NodeID != h.cfg.NodeID || !b.Spec.LetsGoOn(epoch) {
		return true
	}
	pools, err := configdb.VolumesByPool(v, &vm)
	return err != nil || len(pools[poolID]) > 0
}
