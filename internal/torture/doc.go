// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package torture is the part of the fault campaigns that touches nothing: the
// schedule of faults and the streams of operations, both drawn from a seed, and
// the rules that decide what was promised and not kept. The campaigns
// themselves are programs in the folders below; scripts/torture runs them.
//
// Guarantees: one seed gives one schedule and, for each client, one stream of
// operations, whatever happens meanwhile. Non-guarantees: how they interleave
// is up to the machine, as is who leads when a fault is meant for the leader.
//
// The package owns no goroutines.
package torture
