// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package reconcile turns changes of the configuration database into calls of
// one idempotent function per object: watch, deduplicated queue, workers.
//
// Guarantees:
//   - Reconcile is called for every object that a source names, after every
//     change of it, and never for one id by two workers at once.
//   - Changes that come while a call runs lead to one more call.
//   - Deletions are seen even when the watch had to begin anew, for which Run
//     keeps the keys (not the values) of its sources in memory.
//   - A failed call is repeated with exponential back-off between MinBackoff
//     and MaxBackoff; Result.After asks for a later look.
//   - A panic in Reconcile is an error of that object, with its stack in the
//     log; other objects go on. One in a source ends Run with an error.
//   - Run may be called again after it returned: what failed or was to be looked
//     at later is then due, and what was deleted meanwhile is looked at.
//
// Non-guarantees: it does not say what changed; look at the state (level
// triggered). Changes are coalesced.
//
// Run owns one goroutine per worker and one for the watch; they end with its
// context, and Run waits for them.
package reconcile
