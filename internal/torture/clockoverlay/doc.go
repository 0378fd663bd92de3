// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Command clockoverlay makes, in the folder that -dir names, an overlay for "go build
// -overlay" by which a program's wall clock can be stepped from outside: the hosts of
// a fault campaign share the machine's. It replaces one line of the standard library's
// time.Now; the product's code stays what it is.
//
// A program built with it maps the file that MUSTER_TORTURE_CLOCK names and adds the
// nanoseconds there (int64, the machine's byte order) to every reading of the wall
// clock, from the next reading on. Without the variable it is as any other; with one
// that names no such file it does not start. The monotonic reading, and so timers,
// deadlines of connections and differences of times that have one, are left alone.
//
// Not stepped, since they do not go through time.Now: times of files, clocks that are
// read by clock_gettime (the product reads CLOCK_BOOTTIME only, which no setting of the
// clock moves), the runtime's own traces, other programs (QEMU and its guests' RTC,
// qemu-img), and programs that get no environment, as the guard does, which reads no
// wall clock.
//
// It fails, and says so, with a Go whose time.Now does not have that line.
package main
