// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package api holds the typed objects of a cluster: what users write (spec),
// what the owning module reports (status), their defaults, validation and
// stored encoding. It imports the standard library only, owns no goroutine
// and reads no clock except in NewID and NewMeta.
//
// Guarantees:
//   - Encode and Decode of one schema number are stable: golden files hold
//     every encoding that a release ever wrote.
//   - Spec and status are separate values under separate keys, so that a node
//     of an older version that writes a status cannot strip spec fields that
//     it does not know.
//   - A value whose schema is newer than this program is read but never
//     rewritten (ErrNewerSchema). One of the same schema that has fields which
//     this program does not know keeps them when it is rewritten (Rewritten).
//   - Validation errors name the field and the remedy.
//
// Non-guarantees: references between objects (a VM's pool) are checked in the
// transaction that writes them, not here.
package api
