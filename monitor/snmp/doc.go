// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package snmp is the agent that answers SNMP v2c and v3 on every node, and
// the numbers of MUSTER-MIB.
//
// The agent stands on gosnmp's packets. GoSNMPServer was weighed and not
// taken: it does not check the authentication of v3 messages, its answers to
// GETBULK have no bound, and a request without variables panics in it.
//
// Guarantees:
//   - It is read only; a SET is answered with notWritable and changes nothing.
//   - A wrong community, an unknown user and a message that is not authentic
//     get no data; a wrong community gets no answer at all. Each is counted.
//   - v3 is answered with authentication and privacy only (SHA, AES-128),
//     within the time window of RFC 3414.
//   - An answer has at most maxAnswer bytes and maxBindings variables, whatever
//     is asked; no request makes the agent panic.
//
// Non-guarantees: values are of this node's replica and at most CacheFor old.
//
// Goroutines: Agent.Run owns one, which serves one request after the other.
package snmp
