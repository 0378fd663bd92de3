// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package ovs speaks with one Open vSwitch through its database (OVSDB, RFC
// 7047, schema ovs-vswitchd.conf.db(5)): bridges and ports, no flows.
//
// Guarantees:
//   - Everything that it makes carries external_ids:muster=<owner>, and it
//     changes and removes nothing else: not a bridge, not a port.
//   - State is what the database said last; Changed tells about news, Done
//     about the end of the connection, after which a new Conn is needed.
//   - Add and Remove are idempotent against the State that they were given.
//
// Non-guarantees: a row in the database is a wish; ovs-vswitchd carries it out
// later, or never when it does not run. Interface.OFPort says that it did.
//
// A Conn owns the goroutines of the database client and one that waits for its
// end; Close ends them.
package ovs
