// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/muster-vm/muster/configdb"
)

// Notes are the places in pools where each node leaves a note that the others read.
// They work without network and database; what they deliver was written by the node
// that it names, at some time.
type Notes interface {
	// Pools returns the IDs of those that can be used now.
	Pools() []string
	Write(ctx context.Context, poolID string, note []byte) error
	// Read returns nil if there is none.
	Read(ctx context.Context, poolID, nodeID string) ([]byte, error)
}

// Electorate is what ha needs of Raft while nobody leads.
type Electorate interface {
	// Abstain leaves all terms before the given one for good, unless this node knows a
	// leader.
	Abstain(ctx context.Context, term uint64) (configdb.Abstention, error)
	// Leaderless returns for how long this node has known no leader.
	Leaderless() time.Duration
	Term() uint64
	// Leader returns the ID of who leads, as far as this node knows; empty if nobody does.
	Leader() string
	// Voters returns the IDs of those who vote, as far as this node knows.
	Voters() []string
}

// maxAnswered is how many questions a note has answers to.
const maxAnswered = 256

// note is what a node leaves in pools.
type note struct {
	Life uint64 `json:"life"` // of the cluster
	Node string `json:"node"`
	// Boot is of this daemon, Number grows with each note of it.
	Boot   string `json:"boot"`
	Number uint64 `json:"number"`
	// Sees is how many other nodes this one hears over the network.
	Sees    int       `json:"sees"`
	Asks    *question `json:"asks,omitempty"`
	Answers []answer  `json:"answers,omitempty"`
}

// question asks for the lease.
type question struct {
	ID string `json:"id"` // random, of this question alone
	// Leave is the term that the voters shall be in, if nobody leads; 0: it is the
	// leader alone that is asked.
	Leave uint64 `json:"leave,omitempty"`
}

// answer is one to the questions of several nodes.
type answer struct {
	To    []string     `json:"to"` // IDs of the questions
	Grant *renewAnswer `json:"grant,omitempty"`
	Left  *abstention  `json:"left,omitempty"`
}

// abstention is configdb's, as it is written.
type abstention struct {
	Term   uint64   `json:"term"`
	Voted  bool     `json:"voted,omitempty"`
	Voters []string `json:"voters"`
}

func readNote(b []byte, life uint64, nodeID string) (*note, error) {
	var n note
	if err := json.Unmarshal(b, &n); err != nil {
		return nil, fmt.Errorf("note of node %s: %w", nodeID, err)
	}
	if n.Node != nodeID || n.Life != life {
		return nil, fmt.Errorf("note of node %s: it is of node %.40q in life %d of the cluster, this is life %d", nodeID, n.Node, n.Life, life)
	}
	return &n, nil
}
