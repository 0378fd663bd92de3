// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Command configdb is the fault campaign against the configuration database:
// real daemons on hosts made of network namespaces, each with an address and a
// small file system of its own, clients that talk REST to all of them, faults
// by a schedule, and a checker that looks at all that was answered. It is run
// by scripts/torture, which makes the namespace that this program needs.
//
// What it makes lives in that namespace and in the folder that -work names. It
// ends its own processes; whatever is left in the namespaces of its hosts is
// ended by the script.
package main
