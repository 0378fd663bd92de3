// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/muster-vm/muster/internal/guard"
)

// ownerFile says in a run directory whose guard and VMs are there.
const ownerFile = "owner.json"

// runDirFile says in a data directory where the guard and VMs of its node are.
const runDirFile = "run-dir"

// guardAnswer bounds what is asked of a guard at start.
const guardAnswer = 5 * time.Second

// takeRunDir makes a run directory that of a node. The guard of another node in
// it is ended if it runs nothing; otherwise the directory is refused, because a
// guard that serves two nodes keeps neither's promise.
func takeRunDir(dir string, info *membership) error {
	path := filepath.Join(dir, ownerFile)
	var owner membership
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return writeOwner(path, info)
	case err != nil:
		return fmt.Errorf("run directory: %w", err)
	case json.Unmarshal(b, &owner) == nil && owner.NodeID == info.NodeID:
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), guardAnswer)
	defer cancel()
	if c, err := guard.Dial(ctx, dir); err == nil {
		defer func() { _ = c.Close() }()
		if err := c.Stop(ctx); err != nil {
			return fmt.Errorf("the run directory %s has the guard and VMs of node %s of cluster %s (%w); choose another with --run-dir", dir, owner.Node, owner.Cluster, err)
		}
	}
	return writeOwner(path, info)
}

func writeOwner(path string, info *membership) error {
	b, err := json.Marshal(membership{ClusterID: info.ClusterID, Cluster: info.Cluster, NodeID: info.NodeID, Node: info.Node})
	if err != nil {
		return err
	}
	return writeFile(path, append(b, '\n'), 0o600)
}
