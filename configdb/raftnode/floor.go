// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// floorPause is between two looks whether no heartbeat is being handled.
const floorPause = time.Millisecond

// floor is the term that this node may not fall below.
//
// Raft handles a leader's heartbeats beside its main loop, and sets their term some time
// after it has compared it with its own: a voter that leaves for a higher term meanwhile
// would be pulled back. So when the floor is raised no heartbeat is being handled, and
// those of a term below it go through the main loop from then on, which does one thing
// at a time and never takes on a lower term. All other requests go there anyway. After a
// restart the term on the disk is enough: no heartbeat has seen a lower one.
type floor struct {
	mu   sync.RWMutex // held for reading while a heartbeat is handled
	term atomic.Uint64
}

// raise is over when every heartbeat that may have been handled under the old floor is.
func (f *floor) raise(ctx context.Context, term uint64) (was uint64, err error) {
	tick := time.NewTicker(floorPause)
	defer tick.Stop()
	for !f.mu.TryLock() { // a heartbeat waits for a full disk without an end
		select {
		case <-tick.C:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
	defer f.mu.Unlock()
	was = f.term.Load()
	f.term.Store(max(was, term))
	return was, nil
}

// lower takes back a raise after which the term was not left.
func (f *floor) lower(was uint64) { f.term.Store(was) }

// handle has Raft handle a heartbeat, unless its term is below the floor.
func (f *floor) handle(rpc raft.RPC, raftHandles func(raft.RPC)) bool {
	f.mu.RLock()
	defer f.mu.RUnlock() // also when the disk ends this goroutine
	if r, ok := rpc.Command.(*raft.AppendEntriesRequest); !ok || r.Term < f.term.Load() {
		return false
	}
	raftHandles(rpc)
	return true
}

// SetHeartbeatHandler implements raft.Transport.
func (t transport) SetHeartbeatHandler(raftHandles func(raft.RPC)) {
	t.NetworkTransport.SetHeartbeatHandler(func(rpc raft.RPC) {
		if t.floor.handle(rpc, raftHandles) {
			return
		}
		select {
		case t.calls <- rpc:
		case <-t.closing:
		}
	})
}
