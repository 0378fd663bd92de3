// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
)

// processTable is the guard's list, asked for again after anything that may
// have changed it, so that a look at one VM does not list all of them.
type processTable struct {
	guard Guard
	lock  chan struct{} // one token: who takes it may ask

	mu    sync.Mutex
	valid bool
	list  map[string]Process
	tpms  map[string]Process // by VM
}

func newProcessTable(g Guard) processTable {
	return processTable{guard: g, lock: make(chan struct{}, 1)}
}

func (t *processTable) invalidate() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.valid = false
}

// get returns the QEMU processes by VM. The map must not be changed.
func (t *processTable) get(ctx context.Context) (map[string]Process, error) {
	ctx, cancel := context.WithTimeout(ctx, GuardDeadline)
	defer cancel()
	select {
	case t.lock <- struct{}{}:
		defer func() { <-t.lock }()
	case <-ctx.Done():
		return nil, fmt.Errorf("list the guard's processes: %w", context.Cause(ctx))
	}
	t.mu.Lock()
	if t.valid {
		defer t.mu.Unlock()
		return t.list, nil
	}
	t.valid = true // what happens during the call makes it invalid again
	t.mu.Unlock()
	all, err := t.guard.List(ctx)
	if err != nil {
		t.invalidate()
		return nil, fmt.Errorf("list the guard's processes: %w", err)
	}
	list, tpms := make(map[string]Process, len(all)), map[string]Process{}
	for _, p := range all {
		if vm, ok := isTPM(p.VM); ok {
			tpms[vm] = p
			continue
		}
		list[p.VM] = p
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.list, t.tpms = list, tpms
	return list, nil
}

// tpm is the process of a VM's TPM, as get saw it last.
func (t *processTable) tpm(vm string) (Process, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, ok := t.tpms[vm]
	return p, ok
}

// tpmVMs are the VMs whose TPM the guard knows.
func (t *processTable) tpmVMs() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Collect(maps.Keys(t.tpms))
}
