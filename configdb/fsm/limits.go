// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package fsm

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
	// SessionIdle is after how many later entries an idle session is forgotten.
	// It is counted in entries and not in time, so that no leader's clock can
	// make the nodes forget a session whose requests are still under way.
	SessionIdle = 1 << 20
	// sweepEvery is how many entries lie between two looks for idle sessions.
	sweepEvery = 1 << 10
	// MaxSessionWindow is the most requests of one session whose results are
	// remembered; a session with more in flight is refused.
	MaxSessionWindow = 1 << 14
)
