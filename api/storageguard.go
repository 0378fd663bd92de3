// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"slices"
	"time"
)

// StorageFence locks a node out of one pool; see ha/DESIGN.md. As long as there is
// one, whatever its state, the node starts nothing that uses the pool.
type StorageFence struct {
	// ID of the attempt.
	ID     string `json:"id"`
	PoolID string `json:"poolID"`
	Pool   string `json:"pool"`
	// Reason why, for people, and the term of the leader that began it.
	Reason string `json:"reason"`
	Term   uint64 `json:"term,omitempty"`
	// BeganAt is when it was commanded, InForceAt when the pool had confirmed it; by
	// the leader's wall clock. Without InForceAt it may be in force or not.
	BeganAt   time.Time  `json:"beganAt"`
	InForceAt *time.Time `json:"inForceAt,omitempty"`
	// Addresses that are locked out.
	Addresses []string `json:"addresses,omitempty"`
	// Epoch of the storage cluster's map (Ceph: the OSD map) that has it.
	Epoch uint64 `json:"epoch,omitempty"`
	// Owners had locks on the volumes, as ADDRESS:PORT/NONCE.
	Owners []string `json:"owners,omitempty"`
	// Failover is the evidence of it, when it is in force.
	Failover string `json:"failover,omitempty"`
}

// FenceOf returns the fence between a node and a pool.
func (s *NodeStatus) FenceOf(poolID string) (StorageFence, bool) {
	i := slices.IndexFunc(s.StorageFences, func(f StorageFence) bool { return f.PoolID == poolID })
	if i < 0 {
		return StorageFence{}, false
	}
	return s.StorageFences[i], true
}

// FenceToCome returns the fence of a pool if it has that ID and is not in force yet. One
// that is has let VMs start elsewhere: carried out late, it would lock out who has their
// volumes now.
func (s *NodeStatus) FenceToCome(poolID, id string) (StorageFence, bool) {
	f, ok := s.FenceOf(poolID)
	return f, ok && f.ID == id && f.InForceAt == nil
}

// LockedOut reports whether the node is certainly locked out of all these pools.
func (s *NodeStatus) LockedOut(pools []string) bool {
	return !slices.ContainsFunc(pools, func(id string) bool {
		f, ok := s.FenceOf(id)
		return !ok || f.InForceAt == nil
	})
}

// LocksOut reports whether pools of the type can lock a host out.
func (t PoolType) LocksOut() bool { return t == PoolRBD }
