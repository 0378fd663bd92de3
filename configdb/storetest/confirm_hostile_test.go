// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storetest

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/muster-vm/muster/configdb"
)

// Replicas without a vote must not stand in for voters when a leader asks
// whether it still leads: leases and linearizable reads hang on that answer.
func TestReplicasDoNotConfirmALeader(t *testing.T) {
	c := NewCluster(t, 3)
	dir := t.TempDir()
	var replicas []*Node
	for _, name := range []string{"a", "b"} {
		n := c.newNode(len(c.Nodes), filepath.Join(dir, name))
		c.mu.Lock()
		c.Nodes = append(c.Nodes, n)
		c.mu.Unlock()
		n.Start()
		c.Eventually("add a replica", func() error { return c.Leader().AddMember(n.ID, n.Address, false) })
		replicas = append(replicas, n)
	}
	var leader *Node
	var l configdb.Leadership
	c.Eventually("the replicas follow", func() error {
		leader = c.Leader()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		for _, n := range replicas {
			if _, err := n.WaitRevision(ctx, leader.Local().Revision()); err != nil {
				return err
			}
		}
		var ok bool
		if l, ok = leader.Leadership(); !ok {
			return errors.New("the leader changed by itself")
		}
		return nil
	})
	c.Isolate(append(replicas, leader)...)
	for end := time.Now().Add(time.Second); time.Now().Before(end); {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		err := leader.Confirm(ctx, l.Term)
		cancel()
		if err == nil {
			t.Fatal("a leader that reaches no other voter was confirmed by its replicas")
		}
	}
}
