// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/contain"
	"github.com/muster-vm/muster/monitor"
)

// methodTold asks a node whom it told of the quorum that it has lost.
const methodTold = "monitor.told"

// maxAsked is how many neighbours are asked, and waited for.
const maxAsked = 5

// wireLone builds what tells people that this node has lost its quorum.
func (m *member) wireLone() {
	path := filepath.Join(m.cfg.DataDir, toldFile)
	m.lone = monitor.NewLone(monitor.LoneConfig{
		DB: m.store, NodeID: m.info.NodeID, NodeName: m.info.Node, Cluster: m.info.Cluster, ClusterID: m.info.ClusterID,
		Sealer: sealer{m.info.clusterKey}, Neighbours: neighbours{m}, Loss: m.noQuorum,
		Load: func() ([]byte, error) {
			b, err := os.ReadFile(path)
			if errors.Is(err, fs.ErrNotExist) {
				return nil, nil
			}
			return b, err
		},
		Save: func(b []byte) error { return writeFile(path, b, 0o600) },
		Log:  m.log.With("module", "monitor"),
	})
	m.rpc.Handle(methodTold, func(context.Context, []byte) ([]byte, error) { return json.Marshal(m.lone.Told()) })
}

// neighbours are the members that gossip hears, in the order in which they tell of
// a lost quorum.
type neighbours struct{ m *member }

// alive returns the first of them, and how many come before this node.
func (n neighbours) alive() (list []configdb.Member, before int) {
	members, err := n.m.store.Members()
	if err != nil {
		return nil, 0 // only when the store is closed
	}
	hints := n.m.hints()
	self := configdb.Member{NodeID: n.m.info.NodeID}
	list = slices.DeleteFunc(members, func(mb configdb.Member) bool {
		if mb.NodeID == self.NodeID {
			self = mb
			return true
		}
		h := hints[mb.NodeID]
		return h == nil || h.State != api.GossipAlive
	})
	order := func(a, b configdb.Member) int {
		if a.Voter != b.Voter {
			if a.Voter {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.NodeID, b.NodeID)
	}
	slices.SortFunc(list, order)
	before, _ = slices.BinarySearchFunc(list, self, order)
	return list[:min(len(list), maxAsked)], min(before, maxAsked)
}

// Before implements monitor.Neighbours.
func (n neighbours) Before() int {
	_, before := n.alive()
	return before
}

// Told implements monitor.Neighbours.
func (n neighbours) Told(ctx context.Context) (all monitor.Told) {
	list, _ := n.alive()
	told := make([]monitor.Told, len(list))
	var wg sync.WaitGroup
	for i := range list {
		wg.Go(func() {
			err := contain.Call(func() error {
				b, err := n.m.client.Call(ctx, list[i].NodeID, list[i].Address, methodTold, nil)
				if err != nil {
					return err
				}
				return json.Unmarshal(b, &told[i])
			})
			if err != nil { // as if it had told nobody
				n.m.log.Info("not heard whom a node told of the lost quorum", "node", list[i].NodeID, "err", err)
				told[i] = monitor.Told{}
			}
		})
	}
	wg.Wait()
	for _, t := range told {
		all.Told, all.Telling = append(all.Told, t.Told...), append(all.Telling, t.Telling...)
	}
	return all
}
