// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package storetest holds the conformance suite of configdb.DB and an
// implementation on the bare state machine, without Raft, for tests of the
// modules above. It is imported by tests only.
package storetest

import (
	"testing"

	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/fsm"
)

// Mem is a DB of one node in memory. Revision and term behave as with Raft; the
// term is what the test sets.
type Mem struct{ *configdb.Offline }

// New returns an empty database that ends with the test.
func New(tb testing.TB) *Mem {
	m := &Mem{configdb.NewOffline(fsm.New(), 1)}
	tb.Cleanup(m.Close)
	return m
}
