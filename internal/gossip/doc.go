// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package gossip tells each node which others seem to live, and how loaded they
// are. It is a hint and never the truth: what decides anything reads the
// configuration database, a lease or a majority.
//
// It may be used for what a person looks at (muster cluster status, muster node
// ls -o wide, /metrics), and to choose whom to ask first or what to try again
// sooner. It must not be used to declare a node lost, to renew or to end a lease,
// to count a quorum, to place a VM or to reckon capacity: packets get lost, can be
// recorded and sent again, and every member can say anything of every other.
//
// It is hashicorp/memberlist (SWIM) over the node's own port number: packets by
// UDP, encrypted with AES-256-GCM under the keys that SetKeys gives; exchanges of
// the whole state over TLS connections with the protocol muster-gossip, on which
// both sides prove which node they are. Node IDs are the names on the wire. An
// address that came by gossip is never used: SetMembers says where a node is.
//
// Timing, for a LAN: every node asks one other each half second. Who does not
// answer, directly, through others or over TLS, is suspect after 1 to 2 seconds, and
// dead 3 seconds later in a small cluster, 7 with 200 nodes (twice that when nobody
// confirms), unless it objects. A node that is stopped in good order has left at
// once. A summary of the load is sent every 5 seconds by up to 100 nodes; above that
// the whole cluster sends 20 in a second. Each has at most MaxSummaryBytes.
//
// Guarantees:
//   - A node that SetMembers does not name is never a peer, whatever is told of it
//     and whatever it knows.
//   - Nothing is written to a disk, and nothing enters the configuration database.
//   - Memory is bounded by the number of members, and so is the traffic of a node
//     (TestTraffic measures it).
//
// Non-guarantees: that a peer that is called dead is dead, or one that is called
// alive lives; that two nodes say the same; that a summary is not a little older
// than its age says, by the time that it took to get here.
//
// Service.Run owns all goroutines, memberlist's among them; they end with it,
// except probes under way, which end within seconds. A panic of this package ends
// Run with an error; one of memberlist's own would end the daemon.
package gossip
