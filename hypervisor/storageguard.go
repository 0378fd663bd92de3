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
	if _, _, lease := s.h.cfg.Lease.Current(); !lease || !s.in.wasUp {
		return nil
	}
	for _, id := range pools {
		if _, err := configdb.FenceAddresses(s.v, s.h.cfg.NodeID, id); err != nil {
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
		if err := s.h.cfg.Volumes.Release(ctx, s.v, s.vm.Meta.Project, name); err != nil {
			s.wait(api.VMStarting, fmt.Sprintf("waiting: volume %q is not free: %v", name, err))
			return false
		}
	}
	return true
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
// started; with a fence in the database none will be. Otherwise it says what is left.
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
	ids := map[string]bool{}
	for name, p := range procs {
		if p.State != ProcessExited {
			ids[strings.TrimPrefix(name, tpmPrefix)] = true
		}
	}
	h.mu.Lock()
	strangers := len(h.strangers)
	for id, in := range h.instances {
		if in.unsure.Load() {
			ids[id] = true
		}
	}
	h.mu.Unlock()
	if strangers > 0 {
		return fmt.Sprintf("%d QEMUs run whose VMs are not in the database", strangers), nil
	}
	for id := range ids {
		vm, err := configdb.VMs.Get(v, id)
		if err != nil {
			return fmt.Sprintf("a process of vm %s, which is not known", id), nil
		}
		pools, err := configdb.VolumesByPool(v, &vm)
		if err != nil || len(pools[poolID]) > 0 {
			h.loop.Enqueue(id)
			return "a process of vm " + vm.Meta.Name, nil
		}
	}
	return "", nil
}
