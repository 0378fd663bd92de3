// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

// GossipState is what one node heard of another by gossip. It is a hint: nothing
// may be decided by it.
type GossipState string

// The states. A suspect did not answer; it has seconds to object before it is
// called dead. A node that has left was stopped in good order.
const (
	GossipUnknown GossipState = "unknown"
	GossipAlive   GossipState = "alive"
	GossipSuspect GossipState = "suspect"
	GossipDead    GossipState = "dead"
	GossipLeft    GossipState = "left"
)

// GossipHint is what the node that answers heard of another, or says of itself.
type GossipHint struct {
	State GossipState `json:"state" enum:"unknown,alive,suspect,dead,left"`
	// ForSeconds is how long it has been in that state, as far as the node that
	// answers knows.
	ForSeconds float64 `json:"forSeconds,omitempty"`
	// Load is the newest that the node told of itself; AgeSeconds how old it is.
	Load       *NodeLoad `json:"load,omitempty"`
	AgeSeconds float64   `json:"ageSeconds,omitempty"`
}

// NodeLoad is how a node fares. What it did not measure is left out.
type NodeLoad struct {
	// CPUPercent is the busy share of all its CPUs, 0 to 100.
	CPUPercent  *float64 `json:"cpuPercent,omitempty"`
	MemoryFree  Size     `json:"memoryFree,omitempty"`
	MemoryTotal Size     `json:"memoryTotal,omitempty"`
	// DiskFree and DiskTotal are of the file system of its data directory. DiskFull
	// says that its configuration database takes no entries.
	DiskFree  Size `json:"diskFree,omitempty"`
	DiskTotal Size `json:"diskTotal,omitempty"`
	DiskFull  bool `json:"diskFull,omitempty"`
	// Revision that it has applied.
	Revision uint64 `json:"revision,omitempty"`
	// VMs that run there.
	VMs int `json:"vms"`
	// Version of its daemon, and the feature level that it supports.
	Version      string `json:"version,omitempty"`
	FeatureLevel int    `json:"featureLevel,omitempty"`
}

// GossipKeys are the secrets of gossip, sealed with the cluster key. A node sends
// under Primary and takes what is under any of them. A new key comes as Next, until
// all have it, then becomes Primary; the old one stays as Previous for a while.
type GossipKeys struct {
	Primary  []byte `json:"sealedPrimary"`
	Next     []byte `json:"sealedNext,omitempty"`
	Previous []byte `json:"sealedPrevious,omitempty"`
	// Removed is how many nodes had been removed when the newest key was made:
	// those that are removed later know it.
	Removed int `json:"removed"`
}
