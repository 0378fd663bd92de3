// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import "time"

// Limits of connections.
const (
	MaxConnections        = 128
	MaxConnectionsPerUser = 16
	// MaxLogins that are under way at once, in all and from one address.
	MaxLogins        = 32
	MaxLoginsPerIP   = 8
	MaxAuthTries     = 6
	MaxChannels      = 8 // sessions over one connection
	LoginTimeout     = 20 * time.Second
	hostKeyTimeout   = 10 * time.Second
	DefaultIdle      = 15 * time.Minute // without a key pressed
	DefaultRecheck   = 10 * time.Second // is the user still welcome
	KeepAlive        = 30 * time.Second
	KeepAliveTimeout = 60 * time.Second
	eofTimeout       = 15 * time.Second // for the client to confirm an end of input
	fullTimeout      = 5 * time.Second  // of a connection over a limit, to be told so
)

// Limits of sessions.
const (
	// MaxLine is the longest line of the shell and the longest command of
	// "ssh node COMMAND", in bytes.
	MaxLine = 64 << 10
	// maxTypeAhead is how much input waits while a command runs.
	maxTypeAhead = 64 << 10
	// maxHistory lines of at most maxHistoryLine bytes are remembered.
	maxHistory     = 200
	maxHistoryLine = 4 << 10
	// completionDeadline is how long TAB may ask the cluster.
	completionDeadline = 2 * time.Second
	// maxListed candidates are shown for a TAB.
	maxListed = 100
	// minColumns and maxColumns bound what a client says of its terminal.
	minColumns, maxColumns = 20, 1000
	defaultColumns         = 80
	defaultRows            = 24
	inputChunk             = 4 << 10
)
