// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import "time"

// Limits of requests.
const (
	maxBodyBytes   = 1 << 20
	maxHeaderBytes = 64 << 10
	maxKeyBytes    = 512 // of raw keys, as in configdb
	maxListItems   = 1000
	listItems      = 500 // when the client names no limit
	maxSelectors   = 32  // terms in labels= or fields=
	maxIdemKey     = 128
)

// Waits.
const (
	headerTimeout      = 10 * time.Second
	idleTimeout        = 2 * time.Minute
	bodyTimeout        = 30 * time.Second // for a body of at most maxBodyBytes
	replyTimeout       = 60 * time.Second // for a reply, on top of ?wait
	readTimeout        = 3 * time.Second  // for a linearizable view
	readyTimeout       = 2 * time.Second
	writeTimeout       = 10 * time.Second
	minRevisionTimeout = 10 * time.Second
	maxWait            = 300 * time.Second
	uploadStall        = 60 * time.Second // without a byte of an upload
	streamWrite        = 30 * time.Second // for one message to a slow reader
	pingInterval       = 20 * time.Second
)

// Concurrency on this node.
const (
	maxWatches  = 1024
	maxConsoles = 256
	maxUploads  = 16
	maxBackups  = 2 // each holds a state, and one with a pass phrase 64 MiB
	maxAttempts = 8 // of a transaction that conflicts
	// laneAttempts of one that reserves memory: it competes with the lanes of
	// all other nodes, of which the leader's is always a little faster.
	laneAttempts = 64
	laneCapacity = 1 // transactions that reserve memory, see change.reserve
)

// askAgain is the pause before the cluster is asked again for a revision that
// this node's replica does not have.
const askAgain = 200 * time.Millisecond

// Consoles.
const (
	defaultHistory  = 4096
	maxHistory      = 256 << 10
	maxConsoleFrame = 64 << 10
)

// Idempotency records live this long. Each new record looks at a few of its
// neighbours and removes those that are over, so that they never pile up.
const (
	idemLife  = 24 * time.Hour
	idemSweep = 16
)

// Deadlines of tasks.
const (
	vmCreateDeadline = 15 * time.Minute
	// vmOperationDeadline ends an operation that nobody ends otherwise.
	vmOperationDeadline = 24 * time.Hour
	vmPowerDeadline     = 5 * time.Minute
	importDeadline      = time.Hour
	uploadDeadline      = 24 * time.Hour
	storageDeadline     = 15 * time.Minute
)
