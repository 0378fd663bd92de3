// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package load makes load for a replicated database and measures what comes
// back. It knows no particular system: it drives whatever implements its
// interfaces, all in the same way.
//
// Guarantees: a load is a closed loop, each client waits for its answer before
// it asks again; only calls that ended inside the measured window are counted;
// every key is written once. Latencies are kept one by one, so that percentiles
// are exact, not read from buckets.
//
// Not guaranteed: that the client costs nothing. It shares the machine's cores
// with the servers, as it does for every system under test.
//
// Goroutines: one per client or watcher, all ended and waited for before the
// functions return.
package load
