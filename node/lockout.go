// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/clusternet"
)

// lockoutCheck is how often the group is asked whether a removed node is still
// a member of it, while one may be.
const lockoutCheck = 100 * time.Millisecond

// lockOut closes what removed nodes have open, as soon as this replica knows of
// the removal, until the context ends.
//
// What the other node opened is closed at once. What this node opened to it is
// closed when it is no member of the Raft group any more: in a group of two the
// leader needs its vote for taking it out, and after a crash between the two
// steps also for becoming leader again.
func (m *member) lockOut(ctx context.Context) error {
	w := m.store.Watch(removedPrefix, 0)
	leaving := map[string]bool{}
	for {
		wctx, cancel := ctx, context.CancelFunc(func() {})
		if len(leaving) > 0 {
			wctx, cancel = context.WithTimeout(ctx, lockoutCheck)
		}
		b, err := w.Next(wctx)
		cancel()
		switch {
		case ctx.Err() != nil || errors.Is(err, configdb.ErrClosed):
			return nil
		case errors.Is(err, configdb.ErrCompacted):
			w = m.store.Watch(removedPrefix, 0)
			continue
		case err != nil && wctx.Err() == nil:
			return err
		}
		for _, c := range b.Changes {
			id := strings.TrimPrefix(c.Key, removedPrefix)
			if c.Deleted || id == m.info.NodeID {
				continue
			}
			leaving[id] = true
			if n := m.identity.Drop(id, clusternet.Accepted); n > 0 {
				m.log.Info("connections of a removed node closed", "node", string(c.Value), "connections", n)
			}
		}
		m.closeToLeft(leaving)
	}
}

// closeToLeft closes what this node has open to those that have left the group.
func (m *member) closeToLeft(leaving map[string]bool) {
	if len(leaving) == 0 {
		return
	}
	members, err := m.store.Members()
	if err != nil {
		return // asked again
	}
	still := map[string]bool{}
	for _, mb := range members {
		still[mb.NodeID] = true
	}
	for id := range leaving {
		if !still[id] {
			m.identity.Drop(id, clusternet.Dialled)
			delete(leaving, id)
		}
	}
}
