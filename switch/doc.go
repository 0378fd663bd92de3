// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package vswitch (the folder is switch, a word that Go keeps for itself) makes
// the networks of the configuration database real on this node, with Open
// vSwitch, and gives the guests' network cards their places and addresses.
//
// Guarantees:
//   - The integration bridge, its ports and flows, the VXLAN devices and the
//     taps are what the database says, again and again: after a restart of the
//     daemon, of ovs-vswitchd or of ovsdb-server, and after somebody's hands.
//   - Nothing that does not carry external_ids:muster=<cluster>, or the alias of
//     this cluster for a network device, is changed or removed.
//   - Plug returns when ovs-vswitchd has taken the port in. A tap that a process
//     has open is never removed by the clean-up of left-overs.
//   - A guest sends only with its own MAC address, and on a network with an IP
//     pool only with its own IPv4 address; its DHCP messages do not leave the
//     node.
//   - SwitchState says why when something cannot be made; it is written on
//     change only.
//
// Non-guarantees: when ovs-vswitchd was restarted, frames pass unchecked until
// the flows are set again, a second at most. IPv6 source addresses are not
// checked. Frames in VXLAN tunnels are not encrypted.
//
// Limits: MaxNetworks networks; one uplink per node; the nodes' addresses must
// be IP addresses of one family.
//
// Run owns one goroutine per worker of its loop, one that follows Open vSwitch,
// one that follows network devices, and one per plugged card that answers DHCP.
// DESIGN.md has the reasons.
package vswitch
