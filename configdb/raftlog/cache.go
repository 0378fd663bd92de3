// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftlog

import "github.com/hashicorp/raft"

// cache holds the newest entries, which replication reads at once.
type cache struct {
	first   uint64
	entries []*raft.Log // first, first+1, …
	bytes   int
}

func (c *cache) get(index uint64) *raft.Log {
	if index < c.first || index >= c.first+uint64(len(c.entries)) {
		return nil
	}
	return c.entries[index-c.first]
}

func (c *cache) add(e *raft.Log) {
	if e.Index != c.first+uint64(len(c.entries)) {
		*c = cache{first: e.Index}
	}
	c.entries = append(c.entries, e)
	c.bytes += weight(e)
	over := 0
	for len(c.entries)-over > 1 && (c.bytes > cacheBytes || len(c.entries)-over > cacheEntries) {
		c.bytes -= weight(c.entries[over])
		c.entries[over] = nil
		over++
	}
	c.entries, c.first = c.entries[over:], c.first+uint64(over)
}

// drop forgets the entries from low up to high, exclusive, and what lies on the
// shorter side of them.
func (c *cache) drop(low, high uint64) {
	end := c.first + uint64(len(c.entries))
	if low >= end || high <= c.first {
		return
	}
	if low <= c.first {
		*c = cache{}
		return
	}
	for _, e := range c.entries[low-c.first:] {
		c.bytes -= weight(e)
	}
	c.entries = c.entries[:low-c.first]
}

func weight(e *raft.Log) int { return len(e.Data) + len(e.Extensions) + 64 }
