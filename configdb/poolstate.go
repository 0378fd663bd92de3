// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import "github.com/muster-vm/muster/api"

// PoolStateID is the ID of a node's view of a pool.
func PoolStateID(poolID, nodeID string) string { return poolID + "." + nodeID }

// PoolStateOf is a node's view of a pool.
func PoolStateOf(v *View, poolID, nodeID string) (api.PoolState, error) {
	return PoolStates.Get(v, PoolStateID(poolID, nodeID))
}
