// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package fsm

import "time"

// Limits, checked before a command is proposed and again when it is decoded.
const (
	// MaxKeyBytes is the longest key.
	MaxKeyBytes = 512
	// MaxValueBytes is the largest value.
	MaxValueBytes = 1 << 20
	// MaxTxnOps is the most preconditions and the most changes of one
	// transaction.
	MaxTxnOps = 1024
	// MaxTxnBytes is the largest encoded transaction.
	MaxTxnBytes = 4 << 20
	// MaxPackTxns and MaxPackBytes bound the transactions in one log entry.
	MaxPackTxns  = 1024
	MaxPackBytes = 8 << 20
	// HistoryLength is how many changes a watcher may lag behind.
	HistoryLength = 1 << 16
	// SessionIdle is the leader time after which an idle session is forgotten.
	SessionIdle = time.Hour
	// MaxSessionWindow is the most requests of one session whose results are
	// remembered; a session with more in flight is refused.
	MaxSessionWindow = 1 << 14
)
