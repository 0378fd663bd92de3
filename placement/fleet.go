// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package placement

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// Fleet is the cluster as of one view, on which VMs are placed one after the
// other: each sees those that were placed before it. It is for one goroutine;
// its forks are each for one.
type Fleet struct {
	v      *configdb.View
	f      *fleet
	byID   map[string]*host
	avoid  map[string]string // reason by node ID
	shared *demands
}

// demands are what VMs ask for, read once for a fleet and its forks.
type demands struct {
	mu   sync.Mutex
	byVM map[string]demand
}

type demand struct {
	needs   []need
	machine *machine
	err     error
}

// LoadFleet reads the cluster. bindings and vms (by ID) are those of v; a VM
// that could not be read is in broken, because it may use memory.
func LoadFleet(v *configdb.View, bindings []api.Binding, vms map[string]*api.VM, broken map[string]error) (*Fleet, error) {
	f, err := loadWith(v, bindings, func(id string) (api.VM, error) {
		if vm := vms[id]; vm != nil {
			return *vm, nil
		}
		if err := broken[id]; err != nil {
			return api.VM{}, err
		}
		return api.VM{}, api.Errorf(api.CodeNotFound, "vm %q does not exist", id)
	}, "")
	if err != nil {
		return nil, fmt.Errorf("read the fleet: %w", err)
	}
	out := &Fleet{v: v, f: f, avoid: map[string]string{}, shared: &demands{byVM: map[string]demand{}}}
	out.index()
	return out, nil
}

func (f *Fleet) index() {
	f.byID = make(map[string]*host, len(f.f.hosts))
	for _, h := range f.f.hosts {
		f.byID[h.node.Meta.ID] = h
	}
}

// Fork returns a copy on which other VMs can be placed.
func (f *Fleet) Fork() *Fleet {
	hosts := make([]*host, len(f.f.hosts))
	for i, h := range f.f.hosts {
		c := *h
		c.bound = slices.Clip(c.bound) // so that the fork appends to its own
		hosts[i] = &c
	}
	inner := *f.f
	inner.hosts = hosts
	out := &Fleet{v: f.v, f: &inner, avoid: map[string]string{}, shared: f.shared}
	for id, why := range f.avoid {
		out.avoid[id] = why
	}
	out.index()
	return out
}

// Avoid lets a node take nothing, for a reason.
func (f *Fleet) Avoid(nodeID, reason string) { f.avoid[nodeID] = reason }

// Choose is Choose for a VM that is on none of the nodes that may be chosen.
// exclude are more nodes to avoid, for this VM; idle says that it will not run.
func (f *Fleet) Choose(vm *api.VM, exclude map[string]string, idle bool) (nodeID, node string, err error) {
	d := f.demand(vm)
	if d.err != nil {
		return "", "", d.err
	}
	avoid := f.avoid
	if len(exclude) > 0 {
		avoid = make(map[string]string, len(f.avoid)+len(exclude))
		for _, m := range []map[string]string{exclude, f.avoid} {
			for id, why := range m {
				avoid[id] = why
			}
		}
	}
	got, err := f.f.choose(Request{VM: *vm, Exclude: avoid, Idle: idle}, d.needs, d.machine)
	return got.NodeID, got.Node, err
}

func (f *Fleet) demand(vm *api.VM) demand {
	f.shared.mu.Lock()
	defer f.shared.mu.Unlock()
	d, ok := f.shared.byVM[vm.Meta.ID]
	if !ok {
		d.needs, d.machine, d.err = f.f.asks(f.v, vm)
		f.shared.byVM[vm.Meta.ID] = d
	}
	return d
}

// Put counts a VM at a node from now on. Where it was before it counts, too:
// that node is lost.
func (f *Fleet) Put(vm *api.VM, nodeID string) {
	h := f.byID[nodeID]
	if h == nil {
		return
	}
	h.vms++
	if usesMemory(vm) {
		h.used += vm.Status.HeldMemory(&vm.Spec) + OverheadPerVM
		h.bound = append(h.bound, vm)
	}
}

// Reserve is Reserve for what was put on the node.
func (f *Fleet) Reserve(tx *configdb.Txn, nodeID string) error {
	h := f.byID[nodeID]
	if h == nil {
		return errors.New("reserve memory: there is no such node")
	}
	reserve(f.v, tx, nodeID, h.used)
	return nil
}

// reserve makes a transaction conflict with others that place on the node.
func reserve(v *configdb.View, tx *configdb.Txn, nodeID string, used api.Size) {
	key := configdb.Root + "capacity/" + nodeID
	e, _ := v.Get(key)
	spec, _ := v.Get(configdb.Nodes.SpecKey(nodeID))
	tx.RequireRevision(key, e.Revision)
	tx.RequireRevision(configdb.Nodes.SpecKey(nodeID), spec.Revision)
	// The value is for people who look at the raw key; the revision matters.
	tx.Put(key, strconv.AppendInt(nil, int64(used/api.MiB), 10))
}
