// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Command ha is the fault campaign against the promise that no two hosts run one
// VM and that a protected VM comes back: real daemons, guards and QEMUs on hosts
// made of network namespaces, guests that count on their disks and say so, and
// faults. scripts/torture ha runs it.
//
// It looks from outside: at the processes of this machine for two QEMUs of one
// VM, at the guests' consoles for a counter that goes back or is written by two
// boots at once, and at the time until every VM counts again. It stands for the
// hosts' watchdogs: a host whose guard did not pet for five seconds loses all its
// processes at once.
//
// It owns the namespaces' processes while it runs and writes below the folder that
// -work names.
package main
