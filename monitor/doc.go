// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package monitor watches the cluster and tells people.
//
// Node runs on every node: collectors, an hour of series in memory, the answer
// to the leader's probe, and the SNMP agent. Service runs on the leader: it
// writes events from changes of state, evaluates rules into alerts and tells
// receivers. Lone runs on every node and tells receivers when the node has lost
// its quorum, so that nobody leads. See DESIGN.md for the reasons.
//
// Guarantees:
//   - An event of a change of state is written once: in the same transaction
//     as the mark that says it was, whoever leads.
//   - An alert is one object per rule and target; a new leader goes on with
//     it where the last one stopped, without a second one and without a gap.
//   - Every transition of an alert reaches every receiver at least once, or
//     the receiver is given up for that alert after GiveUp and an event says
//     so. A repetition has the same Message-ID, so that it can be recognised.
//   - One receiver that hangs delays no other; one collector that hangs delays
//     no other.
//   - Every write of the service carries the Raft term that it began in.
//   - An idle cluster writes nothing.
//
// Non-guarantees: a state that came and went between two looks is not told of,
// unless a counter shows it (epoch, crashes, time of loss). SNMP traps are UDP:
// sent is not received. Delivery is not exactly once: a leader that dies
// between sending and marking is followed by one that sends again.
//
// Goroutines: Service.Run owns one reconcile loop, one loop each for
// evaluation, probing, retention and delivery, and one goroutine per busy
// receiver and per probe; Node.Run owns those of the collectors, Lone.Run one per
// receiver while it tells. All wait for theirs.
//
// Limits: 10,000 events, 500 resolved alerts, 32 receivers, 4,000 series.
package monitor
