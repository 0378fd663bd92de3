// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Command configdb is the fault campaign against the configuration database:
// real daemons on hosts made of network namespaces, each with an address and a
// small file system of its own, clients that talk REST to all of them, faults
// by a schedule, and a checker that looks at all that was answered. It is run
// by scripts/torture, which makes the namespaces that this program needs: one of
// its own and one for each host.
//
// What it makes lives in those namespaces, in a mount namespace of its own and in
// the folder that -work names. It ends its daemons; whatever else is left in the
// namespaces is ended by the script.
package main
