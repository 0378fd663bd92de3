// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package load

import (
	"context"
	"time"
)

// Session is the connection of one client to one node. It is used by one
// goroutine at a time.
type Session interface {
	// Put returns once the value is acknowledged.
	Put(ctx context.Context, key string, value []byte) error
	// Get is a linearizable read.
	Get(ctx context.Context, key string) ([]byte, error)
	Close()
}

// Cluster is three nodes of a system that run.
type Cluster interface {
	// Dial returns a session with a node, numbered from 0.
	Dial(ctx context.Context, node int) (Session, error)
	// Leader returns the node that leads.
	Leader(ctx context.Context) (int, error)
}

// Watched is a cluster that tells its clients of changes.
type Watched interface {
	Cluster
	// Watch opens n watches on a node, each of which would be another client
	// in practice, and calls seen with the watcher's number and the text that
	// Touch wrote, until the context ends. It returns once all are open, with
	// a function that waits until all have ended.
	Watch(ctx context.Context, node, n int, seen func(watcher int, text string)) (wait func() error, err error)
	// Toucher returns a function that makes one change that all watchers see,
	// through a node.
	Toucher(ctx context.Context, node int) (touch func(ctx context.Context, text string) error, done func(), err error)
}

// Killable is a cluster whose nodes can be lost.
type Killable interface {
	Cluster
	// DialShared returns a session whose calls can be given up at no cost: the
	// connection, which others share, stays.
	DialShared(ctx context.Context, node int) (Session, error)
	// Kill ends the servers of a node with SIGKILL.
	Kill(node int) error
	// Restart starts it again on its data and returns once it is up to date.
	Restart(ctx context.Context, node int) error
}

// Nodes is the size of every cluster.
const Nodes = 3

// ValueBytes is the size of a value.
const ValueBytes = 256

// callTimeout bounds one call of an ordinary load.
const callTimeout = 15 * time.Second
