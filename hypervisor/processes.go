// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"fmt"
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
}

func newProcessTable(g Guard) processTable {
	return processTable{guard: g, lock: make(chan struct{}, 1)}
}

func (t *processTable) invalidate() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.valid = false
}

// get returns all processes by VM. The map must not be changed.
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
	list := make(map[string]Process, len(all))
	for _, p := range all {
		list[p.VM] = p
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.list = list
	return list, nil
}
