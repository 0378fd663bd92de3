// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"fmt"
	"maps"
	"slices"

	"github.com/muster-vm/muster/api"
)

// VolumesByPool are the IDs of the volumes that a VM has by its spec, or still has
// while it runs, by the ID of their pool. With an error not all were found.
func VolumesByPool(v *View, vm *api.VM) (map[string][]string, error) {
	names := vm.Spec.Volumes()
	if hw := vm.Status.Hardware; hw != nil {
		names = append(names, hw.Volumes()...)
	}
	slices.Sort(names)
	out := map[string][]string{}
	for _, name := range slices.Compact(names) {
		vol, err := Volumes.Find(v, vm.Meta.Project, name)
		if err != nil {
			return out, err
		}
		pool, err := Pools.Find(v, "", vol.Spec.Pool)
		if err != nil {
			return out, fmt.Errorf("volume %q: %w", name, err)
		}
		out[pool.Meta.ID] = append(out[pool.Meta.ID], vol.Meta.ID)
	}
	return out, nil
}

// GuardingPools are the IDs of the pools from which a node has to be locked out to
// keep a VM from writing, sorted; none if that does not keep it, because something
// that it writes is elsewhere, or there is nothing.
func GuardingPools(v *View, vm *api.VM) []string {
	pools, err := VolumesByPool(v, vm)
	if err != nil {
		return nil
	}
	for id := range pools {
		if pool, err := Pools.Get(v, id); err != nil || !pool.Spec.Type.LocksOut() {
			return nil
		}
	}
	return slices.Sorted(maps.Keys(pools))
}

// FenceAddresses are the addresses by which a node is locked out of a pool. There are
// none, with the reason, if the pool has not told, or another node has one of them, too.
func FenceAddresses(v *View, nodeID, poolID string) ([]string, error) {
	own, err := PoolStateOf(v, poolID, nodeID)
	if err != nil && api.CodeOf(err) != api.CodeNotFound {
		return nil, err
	}
	if err != nil || len(own.Status.Addresses) == 0 {
		return nil, api.Errorf(api.CodeRefused, "it is not known under which addresses the pool sees the node")
	}
	nodes, err := Nodes.List(v)
	if err != nil {
		return nil, err
	}
	for i := range nodes {
		n := &nodes[i]
		other, err := PoolStateOf(v, poolID, n.Meta.ID)
		if n.Meta.ID == nodeID || err != nil {
			continue
		}
		for _, a := range own.Status.Addresses {
			if slices.Contains(other.Status.Addresses, a) {
				return nil, api.Errorf(api.CodeRefused, "the pool sees node %s under the same address %s, which would be locked out, too", n.Meta.Name, a)
			}
		}
	}
	return own.Status.Addresses, nil
}

// MayPromise reports whether VMs of a node may rely on it being locked out of a pool.
// Addresses of an earlier boot of its host are those of what ran then, not of what runs
// now.
func MayPromise(v *View, nodeID, poolID string) bool {
	own, err := PoolStateOf(v, poolID, nodeID)
	if err != nil || own.Status.HostBoot == "" {
		return false
	}
	_, err = FenceAddresses(v, nodeID, poolID)
	return err == nil
}

// LockedOutOf returns a pool of the VM that a node is locked out of, or may be.
func LockedOutOf(v *View, n *api.Node, vm *api.VM) (api.StorageFence, bool) {
	if len(n.Status.StorageFences) == 0 {
		return api.StorageFence{}, false
	}
	pools, err := VolumesByPool(v, vm)
	for _, f := range n.Status.StorageFences {
		if len(pools[f.PoolID]) > 0 || err != nil {
			return f, true
		}
	}
	return api.StorageFence{}, false
}
